"""Keys and signed requests: RFC 8032, golden signatures, and everything that is refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core import ProtocolError
from potluck.protocol import (
    MAX_SKEW_MS,
    Claim,
    check_body,
    fingerprint,
    new_key,
    public_key,
    read_claim,
    sign_request,
    verify_request,
)
from potluck.protocol.keys import is_signature, sign_bytes

PRIVATE = bytes(range(32))
RUN_KEY = bytes.fromhex("29acbae141bccaf0b22e1a94d34d0bc7361e526d0bfe12c89794bc9322966dd7")
PUBLIC = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
NOW = 1767225600000
REQUEST = ("POST", "potluck.example:8443", "/v1/check-in")

# RFC 8032, section 7.1: tests 1, 2 and 3.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


def headers(body: bytes = b"{}", **changes: int) -> dict[str, str]:
    numbers = {"sequence": 42, "time_ms": NOW, **changes}
    return sign_request(PRIVATE, *REQUEST, body, run_key=RUN_KEY, **numbers)


def claim(fields: dict[str, str]) -> Claim:
    return read_claim([(name.encode(), value.encode()) for name, value in fields.items()])


def code_of(
    claim: Claim,
    *request: str,
    key: bytes | None = PUBLIC,
    run_key: bytes = RUN_KEY,
    now_ms: int = NOW,
    last: int = 41,
) -> str | None:
    """The code with which a claim is refused; None if it passes."""
    try:
        verify_request(
            claim,
            key,
            *(request or REQUEST),
            run_key=run_key,
            now_ms=now_ms,
            last_sequence=last,
        )
    except ProtocolError as error:
        return error.code
    return None


@pytest.mark.parametrize(("private", "public", "message", "signature"), RFC_8032)
def test_keys_are_those_of_rfc_8032(
    private: str, public: str, message: str, signature: str
) -> None:
    key, data = bytes.fromhex(private), bytes.fromhex(message)
    assert public_key(key).hex() == public
    assert sign_bytes(key, data).hex() == signature
    assert is_signature(bytes.fromhex(public), bytes.fromhex(signature), data)
    assert not is_signature(bytes.fromhex(public), bytes.fromhex(signature), data + b"\0")


def test_a_fingerprint_follows_from_the_key() -> None:
    assert public_key(PRIVATE) == PUBLIC
    assert fingerprint(PUBLIC) == hashlib.sha256(PUBLIC).digest()[:16].hex()
    assert fingerprint(PUBLIC) == "56475aa75463474c0285df5dbf2bcab7"
    assert len(new_key()) == 32
    assert new_key() != new_key()


def test_a_key_of_another_size_is_a_value_error() -> None:
    for call in (public_key, fingerprint):
        with pytest.raises(ValueError, match="must be 32 raw bytes, got len"):
            call(PRIVATE.hex().encode())


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=70))
def test_a_random_signature_by_a_random_key_is_none(key: bytes, signature: bytes) -> None:
    assert not is_signature(key, signature, b"data")


def test_golden_headers() -> None:
    body = (
        b'{"accepts":["int8","float32"],"eligibility":{"charging":true,"free_memory_bytes":'
        b'2000000000,"idle":true},"run":"digits","runtime":{"name":"torch","version":"2.13.0"},'
        b'"type":"check_in"}'
    )
    assert headers(body) == {
        "Potluck-Device": "56475aa75463474c0285df5dbf2bcab7",
        "Potluck-Sequence": "42",
        "Potluck-Time": "1767225600000",
        "Potluck-Digest": "a00c785b8494c02b2e9ee9c7019ab1aa26cf2f31681af9ef2e18680721e43207",
        "Potluck-Signature": (
            "41ad03a6c03ff602a60610c8f1e7731807198c72e4fc966d19155587213ca1d5"
            "4d5f8dedaaead46e684abb50664cc8795676e42d48d95ff8c854115b3a4ac70a"
        ),
    }


def test_a_signed_request_passes_whatever_the_case_of_its_header_names() -> None:
    fields = headers()
    assert code_of(claim(fields)) is None
    assert code_of(claim({name.upper(): value for name, value in fields.items()})) is None
    assert code_of(claim({**fields, "Accept": "*/*", "Potluck-Other": "x"})) is None
    check_body(hashlib.sha256(b"{}").hexdigest(), claim(fields))


@pytest.mark.parametrize(
    "request_",
    [
        ("PUT", *REQUEST[1:]),
        ("POST", "potluck.example", "/v1/check-in"),
        ("POST", "other.example:8443", "/v1/check-in"),
        (*REQUEST[:2], "/v1/report"),
        (*REQUEST[:2], "/v1/check-in?"),
        (*REQUEST[:2], "/v1/check-in?offset=0"),
    ],
)
def test_another_method_authority_path_or_query_is_a_bad_signature(
    request_: tuple[str, str, str],
) -> None:
    assert code_of(claim(headers()), *request_) == "bad_signature"


def test_every_part_of_a_claim_is_signed() -> None:
    good = claim(headers())
    for changed in (
        good._replace(sequence=43),
        good._replace(time_ms=NOW + 1),
        good._replace(digest="0" * 64),
        good._replace(signature=bytes(64)),
        good._replace(signature=good.signature[:-1] + bytes([good.signature[-1] ^ 1])),
    ):
        assert code_of(changed) == "bad_signature"


def test_a_device_that_is_not_known_or_has_another_key_is_unknown() -> None:
    good = claim(headers())
    assert code_of(good, key=None) == "unknown"
    assert code_of(good, key=public_key(bytes(32))) == "unknown"
    assert code_of(good._replace(device="0" * 32)) == "unknown"


def test_each_sequence_number_passes_once_and_in_order() -> None:
    good = claim(headers())
    assert [code_of(good, last=last) for last in (0, 41, 42, 43, 2**53 - 1)] == [
        None,
        None,
        "replayed",
        "replayed",
        "replayed",
    ]


def test_the_clock_may_be_off_by_five_minutes_either_way() -> None:
    for skew in (-MAX_SKEW_MS, -1, 0, 1, MAX_SKEW_MS):
        assert code_of(claim(headers(time_ms=NOW + skew))) is None
    for skew in (-86_400_000, -MAX_SKEW_MS - 1, MAX_SKEW_MS + 1, 86_400_000):
        assert code_of(claim(headers(time_ms=NOW + skew))) == "clock"
    with pytest.raises(ProtocolError, match=f"within 300 s of server_time_ms={NOW}"):
        verify_request(
            claim(headers(time_ms=1)),
            PUBLIC,
            *REQUEST,
            run_key=RUN_KEY,
            now_ms=NOW,
            last_sequence=0,
        )


def test_who_cannot_sign_learns_nothing_of_clock_and_sequence() -> None:
    forged = claim(headers(time_ms=1))._replace(signature=bytes(64))
    assert code_of(forged, last=100) == "bad_signature"


def test_the_body_is_checked_after_the_claim() -> None:
    with pytest.raises(ProtocolError, match="must have the SHA-256") as caught:
        check_body(hashlib.sha256(b"{ }").hexdigest(), claim(headers()))
    assert caught.value.code == "digest"


@pytest.mark.parametrize("name", list(headers()))
@pytest.mark.parametrize(
    "value", ["", " ", "0", "-1", "+1", "01", "1e3", "A" * 64, "é", "1" * 17, "9" * 16, "0" * 9999]
)
def test_a_header_not_in_its_exact_form_is_malformed(name: str, value: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        claim({**headers(), name: value})
    assert caught.value.code == "malformed"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", list(headers()))
def test_a_header_that_is_missing_or_there_twice_is_malformed(name: str) -> None:
    fields = headers()
    with pytest.raises(ProtocolError, match=f"the header {name.lower()} must be there once"):
        read_claim([(k.encode(), v.encode()) for k, v in [*fields.items(), (name, fields[name])]])
    del fields[name]
    with pytest.raises(ProtocolError, match=f"the header {name.lower()} must be there in"):
        claim(fields)


def test_no_header_at_all_is_unsigned() -> None:
    with pytest.raises(ProtocolError) as caught:
        claim({"Authorization": "Bearer x"})
    assert caught.value.code == "unsigned"


@pytest.mark.parametrize(
    "request_",
    [
        ("post", *REQUEST[1:]),
        ("POST", "a\nb", "/v1/check-in"),
        (*REQUEST[:2], "/v1/a\n" + "0" * 64),
        (*REQUEST[:2], "/v1/é"),
        (*REQUEST[:2], "/v1/" + "x" * 2048),
        (*REQUEST[:2], ""),
    ],
)
def test_a_line_break_cannot_enter_the_signed_bytes(request_: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        sign_request(PRIVATE, *request_, run_key=RUN_KEY, sequence=1, time_ms=NOW)
    assert code_of(claim(headers()), *request_) == "malformed"


def test_numbers_that_a_double_cannot_hold_are_not_signed() -> None:
    for wrong in (0, -1, 2**53):
        with pytest.raises(ValueError, match="between 1 and 2"):
            headers(sequence=wrong)
        with pytest.raises(ValueError, match="between 1 and 2"):
            headers(time_ms=wrong)


@given(
    st.binary(max_size=50),
    st.from_regex(r"/[!-~]{0,50}", fullmatch=True),
    st.integers(1, 2**53 - 1),
)
def test_any_request_passes_as_signed(body: bytes, path: str, sequence: int) -> None:
    numbers = {"sequence": sequence, "time_ms": NOW}
    fields = sign_request(PRIVATE, "PUT", "localhost", path, body, run_key=RUN_KEY, **numbers)
    good = claim(fields)
    assert code_of(good, "PUT", "localhost", path, last=sequence - 1) is None
    check_body(hashlib.sha256(body).hexdigest(), good)
