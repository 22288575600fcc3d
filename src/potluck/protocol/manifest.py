"""A signed manifest: the model, the plan, and the time in which it is valid.

    signature = Ed25519(run key, "potluck-manifest-v1" ⏎ manifest bytes)

The server signs the bytes; a device verifies the very bytes that it got, with the key that it
pinned at enrolment, and only then reads them. The model itself is a blob, named by its SHA-256.

Guarantee: whoever controls a device's connection without the run key can change no model and no
plan. They can hand out none of another run, and none after it has expired by the device's own
clock. To a device that keeps the last version it saw they can hand out no older one.

Compatibility: as for messages; the signed bytes change their first line with the version.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import Field, JsonValue

from potluck.core import ProtocolError, Spec
from potluck.protocol.keys import is_signature, sign_bytes
from potluck.protocol.messages import (
    MAX_MANIFEST_BYTES,
    Count,
    Digest,
    Id,
    Message,
    Milliseconds,
    Name,
    NumBytes,
    validate,
)
from potluck.protocol.strict_json import MAX_INTEGER, encode_json, parse_json, refuse

_PURPOSE = b"potluck-manifest-v1\n"

# No quotes or backslashes: the digest of a spec is over names in quotes.
_TensorName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,200}$")]
_Size: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Shape: TypeAlias = Annotated[tuple[_Size, ...], Field(max_length=8, strict=False)]


class ManifestSpec(Message):
    """The names and shapes inside the vector, in their order, and the digest of both.

    Where there are statistics, it also has their number: they are the last tensors.
    """

    names: Annotated[tuple[_TensorName, ...], Field(min_length=1, max_length=4096, strict=False)]
    shapes: Annotated[tuple[_Shape, ...], Field(min_length=1, max_length=4096, strict=False)]
    digest: Id
    num_statistics: Count = 0

    @classmethod
    def of(cls, spec: Spec) -> ManifestSpec:
        """Returns the spec of what travels (`Spec.packed`)."""
        return cls(
            names=spec.names,
            shapes=spec.shapes,
            digest=spec.digest(),
            num_statistics=spec.num_buffers,
        )

    def spec(self) -> Spec:
        return Spec.of_packed(self.names, self.shapes, self.num_statistics)


class Manifest(Message):
    """A model, its plan, and the place of both in the run."""

    version: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    """The number of the manifest in the run; it never falls within an epoch."""
    previous: Count
    """The version before; 0 before the first."""
    run: Name
    round: Count
    spec: ManifestSpec
    length_bytes: NumBytes
    sha256: Digest
    """The digest of the model: `length_bytes` of little-endian float32."""
    plan: dict[str, JsonValue]
    """The algorithm's settings and the task, for the device's runtime."""
    rounds: Count = 0
    """The number of rounds of the whole run; 0: unknown."""
    created_ms: Milliseconds
    expires_ms: Milliseconds
    epoch: Count = 0
    """Raised by an operator alone, where a server was restored: versions count from there anew."""
    audit: Digest | None = None
    """Hash of the last row of the server's audit log, which is kept so that no end is cut off."""


def sign_manifest(private_key: bytes, manifest: Manifest) -> tuple[bytes, bytes]:
    """Returns the canonical bytes of a manifest and their signature.

    Raises:
        ValueError: a manifest that no device would accept.
    """
    data = encode_json(manifest.model_dump(exclude_defaults=True))
    try:
        _parse(data)
    except ProtocolError as error:
        raise ValueError(str(error)) from None
    return data, sign_bytes(private_key, _PURPOSE + data)


def verify_manifest(
    data: bytes,
    signature: bytes,
    server_key: bytes,
    *,
    run: str,
    now_ms: int,
    last_seen_version: int,
    last_seen_epoch: int = 0,
) -> Manifest:
    """Returns the manifest in signed bytes, if it may be used.

    Args:
        server_key: pinned at enrolment, as `run` is.
        now_ms: Unix time as the server counts it.
        last_seen_version: the highest version that was accepted of the last epoch; 0 before the
            first. The same version is accepted again: a round may be tried again with the same
            model.
        last_seen_epoch: the highest epoch that was ever accepted.

    Raises:
        ProtocolError: "manifest_signature", "manifest_malformed", "manifest_foreign",
            "manifest_expired" or "manifest_rollback", in the order of the checks.
    """
    if not is_signature(server_key, signature, _PURPOSE + data):
        _refuse("signature", "signed by the run's key", "another signature")
    try:
        manifest = _parse(data)
    except ProtocolError as error:
        raise ProtocolError("manifest_malformed", str(error)) from None
    if manifest.run != run:
        _refuse("foreign", f"of the run {run}", f"run={manifest.run}")
    if now_ms >= manifest.expires_ms:
        _refuse("expired", f"valid at now_ms={now_ms}", f"expires_ms={manifest.expires_ms}")
    if (manifest.epoch, manifest.version) < (last_seen_epoch, last_seen_version):
        least = f"at least version {last_seen_version} of epoch {last_seen_epoch}"
        _refuse("rollback", least, f"version={manifest.version} of epoch={manifest.epoch}")
    return manifest


def _parse(data: bytes) -> Manifest:
    content: Any = parse_json(data, MAX_MANIFEST_BYTES)
    manifest = validate(Manifest, content)
    if len(manifest.spec.names) != len(manifest.spec.shapes):
        refuse("spec must have a shape for each name, got another number")
    if len(set(manifest.spec.names)) != len(manifest.spec.names):
        refuse("spec.names must differ, got one twice")
    if manifest.spec.num_statistics >= len(manifest.spec.names):
        refuse("spec.num_statistics must leave a trained tensor, got as many as there are names")
    spec = manifest.spec.spec()
    if manifest.spec.digest != spec.digest():
        refuse(f"spec.digest must be {spec.digest()}, got digest={manifest.spec.digest}")
    if manifest.length_bytes != spec.num_bytes:
        refuse(f"length_bytes must be {spec.num_bytes}, got length_bytes={manifest.length_bytes}")
    if manifest.previous >= manifest.version:
        refuse(f"previous must be below version, got previous={manifest.previous}")
    if manifest.created_ms >= manifest.expires_ms:
        refuse(f"expires_ms must be after created_ms, got expires_ms={manifest.expires_ms}")
    return manifest


def _refuse(reason: str, expected: str, got: str) -> None:
    raise ProtocolError(
        f"manifest_{reason}",
        f"the manifest must be {expected}, got {got}. Keep the old model and report the failure.",
    )
