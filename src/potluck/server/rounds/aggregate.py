"""The weighted mean of accepted blobs, as a stream, and the checks that make a blob acceptable.

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

from potluck.config.round_settings import RoundSettings
from potluck.core import DivergedError, FixedPointMean, ProtocolError, RefusedError, Spec, Vector
from potluck.core.errors import LostError
from potluck.core.fixed_point import RANGE, WIDE_RANGE
from potluck.protocol import Codec, decode_blocks
from potluck.server.rounds.scoring import MAX_SCORE
from potluck.server.storage import fault_points

BLOCK = 1 << 18  # entries


class Stored(NamedTuple):
    """One accepted update."""

    client: int
    sha256: str
    weight: float
    codec: Codec
    pieces: Callable[[], Iterator[bytes]]


class Norms(NamedTuple):
    """‖·‖₂ of the parts of an update."""

    norm: float
    statistics_norm: float


def check_claims(settings: RoundSettings, *, weight: float, loss: float, num_steps: int) -> None:
    """Refuses numbers of a report that cannot be right.

    Raises:
        RefusedError: bounds.
    """
    if not 0.0 < weight <= settings.max_weight:
        raise RefusedError(
            "bounds",
            f"weight must be above 0 and at most {settings.max_weight:g}, got weight={weight!r}.",
        )
    if not abs(loss) <= MAX_SCORE or num_steps < 0:
        raise RefusedError(
            "bounds",
            f"loss must be within ±{MAX_SCORE:g} and num_steps not negative, got loss={loss!r}, "
            f"num_steps={num_steps!r}.",
        )


def check_update(
    pieces: Iterator[bytes],
    codec: Codec,
    spec: Spec,
    sha256: str,
    *,
    weight: float,
    slots: int,
    settings: RoundSettings,
) -> Norms:
    """Reads an update once and checks it.

    That is its digest, its length, that its values are finite, the norm of what is trained, and
    that the sum has room.

    Returns the norms of what is trained and of the statistics.

    Args:
        spec: of what travels.

    Raises:
        RefusedError: digest: these are not the bytes that were announced; bounds, not_finite,
            malformed.
    """
    digest = hashlib.sha256()
    squares, seen = [0.0, 0.0], 0
    largest = [0.0, 0.0]  # of what is trained, and of statistics
    hashed = _hashed(pieces, digest)
    fault: ProtocolError | None = None
    try:
        for block in _decoded(hashed, codec, spec):
            wide = block.astype(np.float64)
            is_statistic = seen >= spec.num_parameters
            squares[is_statistic] += float(np.dot(wide, wide))
            entry = float(np.abs(wide).max(initial=0.0))
            largest[is_statistic] = max(largest[is_statistic], entry)
            seen += len(block)
    except ProtocolError as error:
        fault = error
        for _ in hashed:  # other bytes than were announced are refused as such first
            pass
    if digest.hexdigest() != sha256:
        raise RefusedError("digest", "the bytes must have the announced digest. Send them again.")
    if fault is not None:
        raise RefusedError(fault.code, str(fault))
    norm, statistics_norm = map(math.sqrt, squares)
    if not norm <= settings.max_norm:
        raise RefusedError(
            "bounds",
            f"an update must have a norm of at most {settings.max_norm:g}, "
            f"got norm={norm:g}. Lower the client learning rate.",
        )
    for entry, limit in zip(largest, (RANGE, WIDE_RANGE), strict=True):
        if not weight * entry < limit / (slots + 1):
            raise RefusedError(
                "bounds",
                f"weight times the largest entry must be below {limit / (slots + 1):g}, "
                f"got weight={weight:g} and {entry:g}. Lower the client learning rate.",
            )
    return Norms(norm, statistics_norm)


def aggregate(updates: Iterable[Stored], spec: Spec) -> Vector:
    """Returns the weighted mean of accepted updates.

    Args:
        spec: of what travels.

    Raises:
        LostError: one of them is missing, or is not what was accepted.
    """
    trained, statistics = spec.num_parameters, spec.dim - spec.num_parameters
    sums = [FixedPointMean(min(BLOCK, trained - start)) for start in range(0, trained, BLOCK)]
    for start in range(0, statistics, BLOCK):
        size = min(BLOCK, statistics - start)
        sums.append(FixedPointMean(size, wide=size))
    for update in sorted(updates):  # the order matters to the total of the weights alone
        digest = hashlib.sha256()
        blocks = _decoded(_hashed(update.pieces(), digest), update.codec, spec)
        try:
            for total, block in zip(sums, _recut(blocks, [s.dim for s in sums]), strict=True):
                total.add(block, update.weight)
        except (ProtocolError, DivergedError) as error:  # of accepted bytes none is raised
            raise LostError(f"the stored update of client {update.client}: {error}") from error
        if digest.hexdigest() != update.sha256:
            raise LostError(f"the stored update of client {update.client} was damaged")
        fault_points.reach("aggregate.report")
    return np.concatenate([total.mean() for total in sums])


def _decoded(pieces: Iterator[bytes], codec: Codec, spec: Spec) -> Iterator[Vector]:
    trained = spec.num_parameters
    return decode_blocks(pieces, codec, trained, spec.dim - trained)


def _recut(blocks: Iterator[Vector], sizes: Iterable[int]) -> Iterator[Vector]:
    """Yields the same entries in blocks of these sizes; all of `blocks` are taken."""
    held = np.empty(0, np.float32)
    for size in sizes:
        parts, count = [held], len(held)
        while count < size:
            parts.append(next(blocks))
            count += len(parts[-1])
        whole = np.concatenate(parts)
        held = whole[size:]
        yield whole[:size]
    for _ in blocks:  # none is left, but the length is checked at the end
        pass


def _hashed(pieces: Iterator[bytes], digest: hashlib._Hash) -> Iterator[bytes]:  # pyright: ignore
    for piece in pieces:
        digest.update(piece)
        yield piece
