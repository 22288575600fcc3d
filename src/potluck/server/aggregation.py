"""From accepted blobs to the weighted mean, as a stream; and what makes a blob acceptable.

Updates are read in blocks and added to a fixed-point sum (`core.FixedPointMean`), which is exact:
any order of arrival gives the same bits, those of the simulation. At any time there are one sum,
its scratch and one block in memory, whatever the cohort.

Guarantee: an update that was accepted can always be summed. Its values are finite, its norm and
weight are bounded, and its largest entry is at most the share of the sum's range that one of the
round's slots has. So a bad update is refused by itself, and never makes a round fail.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from potluck.core import FixedPointMean, ProtocolError, RefusedError, StorageError, Vector
from potluck.protocol import Codec, decode_blocks
from potluck.server import faults
from potluck.server.settings import RoundSettings

BLOCK = 1 << 18  # entries
_RANGE = 2.0**32


class Stored(NamedTuple):
    """One accepted update."""

    client: int
    sha256: str
    weight: float
    codec: Codec
    pieces: Callable[[], Iterator[bytes]]


class DamagedError(StorageError):
    """A stored update has another digest than when it was accepted."""


def check_claims(settings: RoundSettings, *, weight: float, loss: float, num_steps: int) -> None:
    """Refuse numbers of a report that cannot be right.

    Raises:
        RefusedError: bad_update.
    """
    if not 0.0 < weight <= settings.max_weight:
        raise RefusedError(
            "bad_update",
            f"weight must be above 0 and at most {settings.max_weight:g}, got weight={weight!r}.",
        )
    if not math.isfinite(loss) or num_steps < 0:
        raise RefusedError(
            "bad_update",
            f"loss must be finite and num_steps not negative, got loss={loss!r}, "
            f"num_steps={num_steps!r}.",
        )


def check_update(
    pieces: Iterator[bytes],
    codec: Codec,
    dim: int,
    sha256: str,
    *,
    weight: float,
    slots: int,
    settings: RoundSettings,
) -> None:
    """Read an update once: digest, length, finite values, norm, and room in the sum.

    Raises:
        RefusedError: digest: these are not the bytes that were announced; bad_update, not_finite,
            malformed.
    """
    digest = hashlib.sha256()
    squares, largest = 0.0, 0.0
    hashed = _hashed(pieces, digest)
    fault: ProtocolError | None = None
    try:
        for block in decode_blocks(hashed, codec, dim):
            wide = block.astype(np.float64)
            squares += float(np.dot(wide, wide))
            largest = max(largest, float(np.abs(wide).max(initial=0.0)))
    except ProtocolError as error:
        fault = error
        for _ in hashed:  # other bytes than were announced are told so first
            pass
    if digest.hexdigest() != sha256:
        raise RefusedError("digest", "the bytes must have the announced digest. Send them again.")
    if fault is not None:
        raise RefusedError(fault.code, str(fault))
    norm = math.sqrt(squares)
    if not norm <= settings.max_norm:
        raise RefusedError(
            "bad_update",
            f"an update must have a norm of at most {settings.max_norm:g}, "
            f"got norm={norm:g}. Lower the client learning rate.",
        )
    if not weight * largest < _RANGE / (slots + 1):
        raise RefusedError(
            "bad_update",
            f"weight times the largest entry must be below {_RANGE / (slots + 1):g}, "
            f"got weight={weight:g} and {largest:g}. Lower the client learning rate.",
        )


def aggregate(updates: Iterable[Stored], dim: int) -> Vector:
    """The weighted mean of accepted updates.

    Raises:
        DamagedError: a blob is not what was accepted.
    """
    sums = [FixedPointMean(min(BLOCK, dim - start)) for start in range(0, dim, BLOCK)]
    for update in sorted(updates):  # the order matters to the total of the weights alone
        digest = hashlib.sha256()
        blocks = decode_blocks(_hashed(update.pieces(), digest), update.codec, dim)
        for total, block in zip(sums, _recut(blocks), strict=True):
            total.add(block, update.weight)
        if digest.hexdigest() != update.sha256:
            raise DamagedError(f"the stored update of client {update.client} was damaged")
        faults.reach("aggregate.report")
    return np.concatenate([total.mean() for total in sums])


def _recut(blocks: Iterator[Vector]) -> Iterator[Vector]:
    """The same entries in blocks of `BLOCK`, the last one shorter."""
    held: list[Vector] = []
    count = 0
    for block in blocks:
        while len(block):
            taken = block[: BLOCK - count]
            block = block[len(taken) :]
            held.append(taken)
            count += len(taken)
            if count == BLOCK:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def _hashed(pieces: Iterator[bytes], digest: hashlib._Hash) -> Iterator[bytes]:  # pyright: ignore
    for piece in pieces:
        digest.update(piece)
        yield piece
