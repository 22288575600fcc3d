"""Codecs: vectors as binary bodies of a known length, and what rounding them loses.

    codec     bytes for d entries                      entry
    float32   4 d                                      little-endian IEEE 754
    bfloat16  2 d                                      the upper half of a float32, little-endian
    int8      d + 4 ⌈d / 1024⌉                         scale · q, q in −127 … 127
    int4      Σ over blocks of 4 + ⌈entries / 2⌉       scale · q, q in −7 … 7

int8 and int4 come in blocks of 1024 entries, of which the last may be shorter. A block is its scale
as a little-endian float32, then its q in two's complement. Of two int4 in a byte the first is the
lower half. A half that is left over is 0. The scale is the largest magnitude of the block divided
by 127 or 7.

The statistics of a model are behind the entries of an update. They are averaged, and stay float32
whatever the codec.

Rounding is stochastic: a value between two representable ones becomes either, such that the mean is
the value. What one body loses is added to the next vector (error feedback), so the sum over rounds
loses no more than the last residual.

    ENCODE(Δ, residual r, scale s of a block, u uniform in [0, 1) for each entry):
        x = Δ + r
        q = ⌊x / s + u⌋                          # E[s · q] = x
        r = x − s · q
        return (s, q), r

D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic: QSGD: Communication-Efficient SGD via
Gradient Quantization and Encoding. NeurIPS 2017, section 3.1, for the rounding (arXiv:1610.02132).
F. Seide, H. Fu, J. Droppo, G. Li, D. Yu: 1-Bit Stochastic Gradient Descent and its Application to
Data-Parallel Distributed Training of Speech DNNs. Interspeech 2014, for the residual; S. P.
Karimireddy, Q. Rebjock, S. U. Stich, M. Jaggi: Error Feedback Fixes SignSGD and other Gradient
Compression Schemes. ICML 2019, Algorithm 2 (arXiv:1901.09847).

Differences from the papers: s comes from the largest magnitude of 1024 entries and not from the
norm of the whole vector. There is no entropy code, so that the length is known beforehand. What is
compressed is a client's update of a round, not a gradient. A client that is not in a round keeps
its residual until it is.

Guarantee: `decode_vector` returns finite entries or refuses the body, and reads no byte before the
length is right. `decode_blocks` does so in memory that does not depend on the length.

Compatibility: a codec never changes; another layout is another name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from potluck.core.errors import ProtocolError
from potluck.core.seeds import stream
from potluck.core.spec import Spec
from potluck.core.update import Vector

Codec: TypeAlias = Literal["float32", "bfloat16", "int8", "int4"]
CODECS: tuple[Codec, ...] = get_args(Codec)
BLOCK = 1024
"""Entries that share a scale."""

_LARGEST = {"int8": 127, "int4": 7}
_RUN = 64 * BLOCK  # entries that decode_blocks gives at a time


class Encoded(NamedTuple):
    """A body, and what it lost: add the residual to the next vector."""

    body: bytes
    residual: Vector  # [dim]


def encode_update(
    delta: Vector,
    codec: Codec,
    residual: Vector | None,
    *,
    seed: int,
    round: int,
    client: int,
    num_statistics: int = 0,
) -> Encoded:
    """Encodes a client's update of a round, simulated or real.

    Args:
        residual: of the client's last update that counted; None before.
        num_statistics: how many of the entries, the last ones, have no residual and stay float32.

    Raises:
        ProtocolError: as `encode_vector`.
    """
    size = delta.size - num_statistics
    random = stream(seed, "rounding", round, client)
    encoded = encode_vector(delta[:size], codec, random, residual)
    if num_statistics == 0:
        return encoded
    _check_finite(delta[size:])
    return encoded._replace(body=encoded.body + delta[size:].astype("<f4").tobytes())


def encode_vector(
    vector: Vector,
    codec: Codec,
    random: np.random.Generator,
    residual: Vector | None = None,
) -> Encoded:
    """Encodes `vector` plus the residual of the body before.

    Raises:
        ProtocolError: "not_finite", with NaN or infinity in the vector or the sum.
    """
    _check(codec, vector.size)
    if residual is not None and residual.shape != vector.shape:
        raise ValueError(
            f"residual must have the vector's shape {vector.shape}, "
            f"got residual.shape={residual.shape}. Start again with None."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = np.asarray(vector if residual is None else vector + residual, np.float32)
    _check_finite(wanted)
    if codec == "float32":
        return Encoded(wanted.astype("<f4").tobytes(), np.zeros_like(wanted))
    if codec == "bfloat16":
        body = _encode_bfloat16(wanted, random)
    else:
        body = _encode_quantised(wanted, codec, random)
    return Encoded(body, wanted - _decode_run(body, codec, wanted.size))


def encoded_bytes(codec: Codec, dim: int) -> int:
    """Returns the exact length of the body of a vector with `dim` entries."""
    _check(codec, dim)
    if codec == "float32":
        return 4 * dim
    if codec == "bfloat16":
        return 2 * dim
    full, rest = divmod(dim, BLOCK)
    return full * _block_bytes(codec, BLOCK) + (_block_bytes(codec, rest) if rest else 0)


def update_bytes(codec: Codec, spec: Spec, vectors: int = 1) -> int:
    """Returns the length of an update: `vectors` of what is trained, and statistics in float32."""
    trained = vectors * spec.size("trained")
    return (encoded_bytes(codec, trained) if trained else 0) + 4 * spec.size("statistic")


def check_codec(codec: str) -> None:
    """Refuses the name of an unknown codec.

    Raises:
        ValueError: with the nearest known name.
    """
    if codec not in CODECS:
        near = difflib.get_close_matches(codec, CODECS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got codec={codec!r}.{hint}")


def decode_vector(body: bytes, codec: Codec, dim: int) -> Vector:
    """Returns the vector in a body: [dim], finite.

    Raises:
        ProtocolError: "wrong_length", "not_finite", or "malformed" for what `encode_vector` never
            writes.
    """
    expected = encoded_bytes(codec, dim)
    if len(body) != expected:
        raise _wrong_length(codec, dim, expected, len(body))
    return _decode_run(body, codec, dim)


def decode_blocks(
    chunks: Iterable[bytes], codec: Codec, dim: int, num_statistics: int = 0
) -> Iterator[Vector]:
    """Yields the vector of a body that arrives in chunks, at most 65,536 entries at a time.

    The chunks may have any size.

    Args:
        num_statistics: entries behind the vector's; no piece has entries of both.

    Raises:
        ProtocolError: as `decode_vector`, after the pieces before the fault; use none of them then.
    """
    expected = encoded_bytes(codec, dim) + 4 * num_statistics
    buffer = bytearray()
    left, then, num_bytes = dim, num_statistics, 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > expected:
            raise _wrong_length(codec, dim + num_statistics, expected, num_bytes)
        buffer += chunk
        while left:
            entries = min(_RUN, left)
            needed = encoded_bytes(codec, entries)
            if len(buffer) < needed:
                break
            yield _decode_run(bytes(buffer[:needed]), codec, entries)
            del buffer[:needed]
            left -= entries
            if left == 0:
                codec, left, then = "float32", then, 0
    if num_bytes != expected:
        raise _wrong_length(codec, dim + num_statistics, expected, num_bytes)


def _decode_run(body: bytes, codec: Codec, dim: int) -> Vector:
    """Decodes a body of the right length, in which every block but the last is full."""
    if codec == "float32":
        vector = np.frombuffer(body, "<f4").astype(np.float32)
    elif codec == "bfloat16":
        vector = (np.frombuffer(body, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raw = np.frombuffer(body, np.uint8)
        whole = dim - dim % BLOCK
        width = _block_bytes(codec, BLOCK)
        end = whole // BLOCK * width
        blocks = _decode_rows(raw[:end].reshape(-1, width), codec, BLOCK)
        vector = blocks.reshape(-1)
        if whole < dim:
            last = _decode_rows(raw[end:].reshape(1, -1), codec, dim - whole)
            vector = np.concatenate([vector, last[0]])
    _check_finite(vector)
    return vector


def _decode_rows(rows: Any, codec: Codec, entries: int) -> Any:
    """Decodes blocks of one length: uint8 [blocks, bytes] → float32 [blocks, entries]."""
    scales = np.ascontiguousarray(rows[:, :4]).view("<f4")  # [blocks, 1]
    if codec == "int8":
        steps = rows[:, 4:].view(np.int8)
    else:
        steps = np.empty((len(rows), 2 * (rows.shape[1] - 4)), np.int8)
        # Shifted up and down again as signed numbers, each half keeps its sign.
        steps[:, 0::2] = (rows[:, 4:] << 4).view(np.int8) >> 4
        steps[:, 1::2] = rows[:, 4:].view(np.int8) >> 4
        if steps[:, entries:].any():
            raise ProtocolError("malformed", "a half byte left over must be 0, got another.")
        steps = steps[:, :entries]
    _check_finite(scales)
    if (scales < 0).any() or (steps < -_LARGEST[codec]).any():
        raise ProtocolError(
            "malformed",
            f"scales must be at least 0 and steps at least {-_LARGEST[codec]}, got less. "
            "Send what docs/protocol.md describes.",
        )
    with np.errstate(over="ignore"):
        return steps.astype(np.float32) * scales


def _encode_bfloat16(vector: Vector, random: np.random.Generator) -> bytes:
    bits = vector.view(np.uint32)
    noise = np.frombuffer(random.bytes(2 * vector.size), "<u2")
    upper = ((bits + noise) >> 16).astype("<u2")  # the carry is the step up, in magnitude
    infinite = (upper & 0x7FFF) == 0x7F80
    upper[infinite] -= 1  # the largest finite number; the residual keeps the rest
    return upper.tobytes()


def _encode_quantised(vector: Vector, codec: Codec, random: np.random.Generator) -> bytes:
    whole = vector.size - vector.size % BLOCK
    body = _encode_rows(vector[:whole].reshape(-1, BLOCK), codec, random)
    if whole < vector.size:
        body += _encode_rows(vector[whole:].reshape(1, -1), codec, random)
    return body


def _encode_rows(values: Vector, codec: Codec, random: np.random.Generator) -> bytes:
    """Encodes blocks of one length: float32 [blocks, entries] → their bytes."""
    blocks, entries = values.shape
    rows = np.zeros((blocks, _block_bytes(codec, entries)), np.uint8)
    largest = _LARGEST[codec]
    magnitudes = np.abs(values).max(axis=1, keepdims=True, initial=0)
    scales = (magnitudes / largest).astype("<f4")
    # Rounded up, the largest of all scales times `largest` would be infinite.
    np.minimum(scales, np.nextafter(np.finfo(np.float32).max / largest, np.float32(0)), out=scales)
    rows[:, :4] = scales.view(np.uint8)
    inverse = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=inverse, where=scales > 1e-38)  # else 0: it may overflow
    steps = values * inverse
    steps += random.random(values.shape, np.float32)
    np.floor(steps, out=steps)
    np.clip(steps, -largest, largest, out=steps)
    if codec == "int8":
        rows[:, 4:] = steps.astype(np.int8).view(np.uint8)
    else:
        halves = steps.astype(np.int8).view(np.uint8) & 0xF
        rows[:, 4:] = halves[:, 0::2]
        rows[:, 4 : 4 + entries // 2] |= halves[:, 1::2] << 4
    return rows.tobytes()


def _block_bytes(codec: Codec, entries: int) -> int:
    return 4 + (entries if codec == "int8" else (entries + 1) // 2)


def _check(codec: Codec, dim: int) -> None:
    check_codec(codec)
    if dim < 1:
        raise ValueError(f"a vector must have at least one entry, got dim={dim}.")


def _check_finite(vector: Any) -> None:
    if not np.isfinite(vector).all():
        raise ProtocolError(
            "not_finite", "the vector must be finite, got NaN or infinity. Train again, or fail."
        )


def _wrong_length(codec: Codec, dim: int, expected: int, got: int) -> ProtocolError:
    return ProtocolError(
        "wrong_length",
        f"{dim} entries in {codec} must be {expected} bytes, got {got}. Encode them again.",
    )
