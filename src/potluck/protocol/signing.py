"""Signed requests, each of which is valid once.

    signed bytes = "potluck-request-v2" ⏎ fingerprint of the run's key ⏎ METHOD ⏎ authority ⏎
                   path?query ⏎ SHA-256 of the body ⏎ device ⏎ sequence ⏎ time

The five headers hold what cannot be seen from the request itself. A server reads and verifies them
before it reads a byte of the body, and the body against its digest afterwards.

Guarantee: a request that passes was made by the owner of the key, for this run, method, authority,
path and body. Its time is at most `MAX_SKEW_MS` from the server's. It passes once, as long as the
server keeps the last sequence number of each device through restarts. What was signed for one run
is refused by every other, so a second server gains nothing by passing it on.

Compatibility: any change of the signed bytes changes their first line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from potluck.core import ProtocolError
from potluck.protocol.keys import fingerprint, is_signature, public_key, sign_bytes
from potluck.protocol.strict_json import MAX_INTEGER, refuse

MAX_SKEW_MS = 300_000
"""The largest difference between a request's time and the server's."""

_PURPOSE = "potluck-request-v2"
_NUMBER = rb"[1-9][0-9]{0,15}"
_HEADERS = {
    b"potluck-device": re.compile(rb"[0-9a-f]{32}"),
    b"potluck-sequence": re.compile(_NUMBER),
    b"potluck-time": re.compile(_NUMBER),
    b"potluck-digest": re.compile(rb"[0-9a-f]{64}"),
    b"potluck-signature": re.compile(rb"[0-9a-f]{128}"),
}
# Neither may hold a line break, or one request's signed bytes could be read as another's.
_METHOD = re.compile(r"[A-Z]{1,16}")
_VISIBLE = re.compile(r"[!-~]{1,2048}")


class Claim(NamedTuple):
    """The content of a request's signature headers, before it is verified."""

    device: str
    sequence: int
    time_ms: int
    digest: str
    """SHA-256 of the body, in hex."""
    signature: bytes


def sign_request(
    private_key: bytes,
    method: str,
    authority: str,
    path: str,
    body: bytes = b"",
    *,
    run_key: bytes,
    sequence: int,
    time_ms: int,
) -> dict[str, str]:
    """Returns the headers that sign a request.

    Args:
        run_key: the public key of the run that it is for, as it was pinned.
        authority: host or host:port, in lower case, as in the `Host` header.
        path: with its query, exactly as sent.
        sequence: above that of every earlier request by this key. Store it before sending.
        time_ms: Unix time as the server counts it.
    """
    for name, number in (("sequence", sequence), ("time_ms", time_ms)):
        if not 1 <= number <= MAX_INTEGER:
            raise ValueError(
                f"{name} must be between 1 and 2^53 - 1, got {name}={number}. "
                "Count requests from 1, and time in milliseconds."
            )
    device = fingerprint(public_key(private_key))
    claim = Claim(device, sequence, time_ms, hashlib.sha256(body).hexdigest(), b"")
    signature = sign_bytes(private_key, signed_bytes(claim, run_key, method, authority, path))
    return {
        "Potluck-Device": claim.device,
        "Potluck-Sequence": str(claim.sequence),
        "Potluck-Time": str(claim.time_ms),
        "Potluck-Digest": claim.digest,
        "Potluck-Signature": signature.hex(),
    }


def read_claim(headers: Iterable[tuple[bytes, bytes]]) -> Claim:
    """Returns the claim in a request's headers, which are pairs of name and value in any order.

    Raises:
        ProtocolError: "unsigned" without any of the five, "malformed" if one is missing, there
            twice, or not exactly in its form.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        key = name.lower()
        if key in _HEADERS:
            if key in found:
                refuse(f"the header {key.decode()} must be there once, got it twice")
            found[key] = value
    if not found:
        raise ProtocolError(
            "unsigned", "a request must be signed, got no Potluck-… headers. Enrol, and sign it."
        )
    for key, form in _HEADERS.items():
        if form.fullmatch(found.get(key, b"")) is None:
            refuse(f"the header {key.decode()} must be there in its exact form, got another")
    device, sequence, time_ms, digest, signature = (found[key].decode() for key in _HEADERS)
    for number in (int(sequence), int(time_ms)):
        if number > MAX_INTEGER:
            refuse(f"sequence and time must be at most {MAX_INTEGER}, got {number}")
    return Claim(device, int(sequence), int(time_ms), digest, bytes.fromhex(signature))


def verify_request(
    claim: Claim,
    public_key: bytes | None,
    method: str,
    authority: str,
    path: str,
    *,
    run_key: bytes,
    now_ms: int,
    last_sequence: int,
) -> None:
    """Checks a claim against the request that carried it; pure, and without the body.

    Args:
        public_key: that of the device that the claim names; None if there is none.
        run_key: the public key of the run that is served here.
        last_sequence: of the last request that passed; 0 before the first.

    Raises:
        ProtocolError: "unknown", "malformed", "bad_signature", "clock" or "replayed", in the order
            of the checks: a caller without the key learns nothing about clocks and sequence
            numbers.
    """
    if public_key is None or fingerprint(public_key) != claim.device:
        raise ProtocolError(
            "unknown", f"the device must be enrolled, got device={claim.device}. Enrol again."
        )
    try:
        data = signed_bytes(claim, run_key, method, authority, path)
    except ValueError as error:
        raise ProtocolError("malformed", str(error)) from None
    if not is_signature(public_key, claim.signature, data):
        raise ProtocolError(
            "bad_signature",
            "the signature must be over this run, method, authority, path and body digest, got "
            "another. Check the signed bytes against docs/protocol.md, and the device's version.",
        )
    if abs(claim.time_ms - now_ms) > MAX_SKEW_MS:
        raise ProtocolError(
            "clock",
            f"Potluck-Time must be within {MAX_SKEW_MS // 1000} s of server_time_ms={now_ms}, "
            f"got time_ms={claim.time_ms}. Correct by the difference and sign again.",
        )
    if claim.sequence <= last_sequence:
        raise ProtocolError(
            "replayed",
            f"Potluck-Sequence must be above that of every earlier request, "
            f"got sequence={claim.sequence}. Count on from the last one and sign again.",
        )


def check_body(sha256: str, claim: Claim) -> None:
    """Checks the digest of the body that was read, in hex, against the signed one.

    Raises:
        ProtocolError: "digest".
    """
    if sha256 != claim.digest:
        raise ProtocolError(
            "digest",
            f"the body must have the SHA-256 {claim.digest} that was signed, got sha256={sha256}. "
            "Send it again.",
        )


def signed_bytes(claim: Claim, run_key: bytes, method: str, authority: str, path: str) -> bytes:
    """Returns the bytes that the signature covers; that of the claim itself is left out.

    Raises:
        ValueError: a method, authority or path that cannot be in a request.
    """
    if _METHOD.fullmatch(method) is None:
        raise ValueError(f"method must be upper case, got method={method[:24]!r}. Use GET.")
    for name, text in (("authority", authority), ("path", path)):
        if _VISIBLE.fullmatch(text) is None:
            raise ValueError(
                f"{name} must be 1 to 2048 visible ASCII characters, got {name}={text[:80]!r}. "
                "Escape the rest with %."
            )
    lines = (_PURPOSE, fingerprint(run_key), method, authority, path, claim.digest, claim.device)
    return "\n".join((*lines, str(claim.sequence), str(claim.time_ms))).encode()
