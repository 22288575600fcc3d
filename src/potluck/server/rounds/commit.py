"""The step from a closed round to the next model: aggregate, move the server state, commit.

    the blobs of the next version:  write, fsync, rename, fsync of the directory (a small model has
                                    none: it stands in its row)
    then one transaction:           {AGGREGATING → COMMITTED, model version, ledger row, run;
                                    the next round is opened}

A process that is killed before the transaction leaves the round in AGGREGATING: the next leader
makes the same bytes from the same accepted set and goes on. One that is killed after it leaves a
committed round. There is nothing in between. `sweep` removes the updates once they are of no more
use.

A stored object that cannot be read any more (`LostError`) ends no run. Without a lost update the
round is committed, if its minimum holds; otherwise, or without the model that it began with, it is
abandoned. No round is opened with a model that is lost: the run is paused, and says what to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from potluck.algorithms import Algorithm, ServerState
from potluck.core import Spec, Vector
from potluck.core.errors import LostError
from potluck.core.plain_json import to_json
from potluck.server.rounds import bounds
from potluck.server.rounds.aggregate import Stored, aggregate
from potluck.server.rounds.scoring import insert_evaluation, measured
from potluck.server.rounds.state_machine import abandon_round, lock_run, open_round, settle
from potluck.server.rounds.uploads import drop_parts
from potluck.server.storage import audit, fault_points
from potluck.server.storage.blobs import PIECE_BYTES, BlobStore
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import (
    UNSWEPT,
    assignments,
    devices,
    ledger,
    models,
    reports,
    rounds,
)
from potluck.server.storage.stored_run import settings_of
from potluck.server.storage.vectors import (
    ROW_BYTES,
    Updates,
    read_spec,
    read_vector,
    read_whole,
    tries,
)

_OVER = ("COMMITTED", "ABANDONED")
_ALGORITHM = "algorithm."  # before the names of an algorithm's own vectors
_TOLD = 20  # reports that a row of the audit log names
_LOG = logging.getLogger("potluck.server")


class Version(NamedTuple):
    """A model that is on the disk."""

    sha256: str
    key: str
    num_bytes: int
    optimizer_key: str | None
    content: bytes | None = None  # of a small one, which is on the disk with its row


def store_version(blobs: BlobStore, state: ServerState) -> Version:
    """Puts a server state on the disk, under its digests; again is the same.

    Small weights are left to the row.
    """
    weights = state.weights.astype("<f4", copy=False).tobytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    is_small = len(weights) <= ROW_BYTES
    key = "" if is_small else f"models/{sha256}"
    if not is_small:
        blobs.put(key, _pieces(weights))
    optimizer_key = None
    own = {_ALGORITHM + name: vector for name, vector in state.algorithm.items()}
    if state.optimizer or own:
        vectors = save({**state.optimizer, **own})
        optimizer_key = f"optimizers/{hashlib.sha256(vectors).hexdigest()}"
        blobs.put(optimizer_key, _pieces(vectors))
    return Version(sha256, key, len(weights), optimizer_key, weights if is_small else None)


def load_version(blobs: BlobStore, version: Row[Any]) -> ServerState:
    """Reads a server state, and checks that it is the one that was stored.

    Raises:
        LostError: it is not.
    """
    weights, optimizer, own = load_weights(blobs, version), {}, {}
    if version.optimizer_key is not None:
        sha256 = version.optimizer_key.rpartition("/")[2]
        try:
            optimizer = load(read_whole(lambda: blobs.read(version.optimizer_key), sha256))
        except LostError as error:
            told = f"the optimizer state of version {version.version} is lost: {error}"
            raise LostError(told) from error
        for name in [name for name in optimizer if name.startswith(_ALGORITHM)]:
            own[name.removeprefix(_ALGORITHM)] = optimizer.pop(name)
    return ServerState(weights, optimizer, own)


def load_weights(blobs: BlobStore, version: Row[Any]) -> Vector:
    """Returns the weights alone of a model version.

    Raises:
        LostError: they are not those that were stored.
    """
    try:
        weights = read_whole(lambda: read_vector(blobs, version), version.sha256)
    except LostError as error:
        raise LostError(f"the model of version {version.version} is lost: {error}") from error
    return np.frombuffer(weights, "<f4").astype(np.float32)


def insert_version(
    db: Connection, run: str, version: int, round: int, made: Version, now: int
) -> None:
    """Inserts the row of a new model version."""
    place = {"run": run, "version": version, "round": round, "created_ms": now}
    db.execute(insert(models).values(place | made._asdict()))


def commit_round(context: Context, run: Row[Any], round: Row[Any], algorithm: Algorithm) -> None:
    """Moves AGGREGATING → COMMITTED; or ABANDONED, where no finite model comes out."""
    if round.kind == "evaluate":
        _commit_evaluation(context, run, round)
        return
    fault_points.reach("aggregate.begin")
    with context.database.read() as db:
        accepted = _accepted(db, round)
        here = (models.c.run == run.id) & (models.c.version == round.version)
        base = db.execute(select(models).where(here)).one()
        population = db.scalar(select(func.count()).where(devices.c.run == run.id)) or 1
        earlier = bounds.earlier_reports(db, run.id, round.number, bounds.WINDOW - len(accepted))
    spec = read_spec(run.spec)
    try:
        mean, kept, counts = _mean(context, run, round, accepted, earlier, spec)
        fault_points.reach("aggregate.end")
        state = tries(lambda: load_version(context.blobs, base))
        with np.errstate(over="ignore", invalid="ignore"):
            state = algorithm.server_update(
                state, mean, round=round.number, participation=len(kept) / population
            )
    except LostError as error:
        abandon(context, run, round, str(error), is_lost=True)
        return
    if not np.isfinite(state.weights).all():
        abandon(context, run, round, "the new model is not finite")
        return
    fault_points.reach("commit.before-model")
    made = store_version(context.blobs, state)
    fault_points.reach("commit.before-row")
    opened, names, told = None, {row.device for row in kept}, []
    lost = [row for row in accepted if row.device not in names]
    with context.database.write() as db:
        context.check(db)
        lock_run(db, run.id)
        if _settle(db, context, run, round, version=run.version + 1):
            insert_version(db, run.id, run.version + 1, round.number, made, context.now())
            opened = _go_on(db, context, run)
            _leave_out(db, round, lost)
            told = bounds.note(db, round, kept, counts)
            weights = [count.weight for count in counts]
            version = (run.version + 1, made.sha256, made.num_bytes)
            _enter(db, context, run, round, kept, weights, *version, told)
            for row in lost:
                place = {"round": round.number, "attempt": round.attempt, "client": row.client}
                audit.append(
                    db, context.now(), "leader", "lost", run=run.id, update=row.sha256, **place
                )
        fault_points.reach("commit.inside")
    fault_points.reach("commit.after")
    for _ in lost:
        context.on_lost()
    if opened is not None:
        context.on_open(opened)
    for one in told:
        if one["alarm"]:
            why = f"one device asked for {100 * one['share']:.0f} % of round {round.number}"
            _LOG.warning("alarm", extra=one | {"reason": why})


class _Mean(NamedTuple):
    """A mean update, its reports, and their weights in it."""

    mean: Vector
    reports: list[Row[Any]]
    counts: list[bounds.Counted]


def _mean(
    context: Context,
    run: Row[Any],
    round: Row[Any],
    accepted: list[Row[Any]],
    earlier: list[bounds.Weighed],
    spec: Spec,
) -> _Mean:
    """Returns the mean of the updates that are not lost.

    Raises:
        LostError: they are fewer than the round's minimum.
    """

    def mean(rows: list[Row[Any]]) -> _Mean:
        kept = Updates(context.database, context.blobs, rows)
        weighed = [bounds.weighed(row) for row in rows]
        limits = bounds.limits_of(weighed, earlier, settings_of(run.settings))
        counts = bounds.counted(weighed, limits)
        every = [
            Stored(r.client, r.sha256, count.weight, r.codec, partial(kept.read, r))
            for r, count in zip(rows, counts, strict=True)
        ]
        found = bounds.shortened(aggregate(every, spec), spec.num_parameters, limits)
        return _Mean(found, rows, counts)

    try:
        return tries(lambda: mean(accepted))
    except LostError as error:
        kept = Updates(context.database, context.blobs, accepted)
        whole = [row for row in accepted if _is_whole(kept, row)]
        if len(whole) < round.minimum:
            told = f"{len(whole)} of {len(accepted)} updates are left, of at least {round.minimum}"
            raise LostError(f"{error}; {told}") from error
        return mean(whole)


def _is_whole(kept: Updates, row: Row[Any]) -> bool:
    try:
        read_whole(partial(kept.read, row), row.sha256)
    except LostError:
        return False
    return True


def _leave_out(db: Connection, round: Row[Any], lost: list[Row[Any]]) -> None:
    """Takes lost updates out of the accepted set: their devices have not reported."""
    here = (reports.c.round == round.id) & reports.c.device.in_([row.device for row in lost])
    db.execute(delete(reports).where(here))
    theirs = assignments.c.id.in_([row.assignment for row in lost])
    values = {"state": "failed", "reason": "the server lost its update"}
    db.execute(update(assignments).where(theirs).values(values))


def _go_on(db: Connection, context: Context, run: Row[Any]) -> str | None:
    """Opens the next round in the transaction that commits one: devices wait for it."""
    current = lock_run(db, run.id)
    is_next = current.state == "running"
    return open_round(db, current, context.now()) if is_next else None


def sweep(context: Context) -> None:
    """Removes the updates of rounds that are over: nothing may read them any more."""
    over = select(rounds.c.id).where(UNSWEPT, rounds.c.state.in_(_OVER))
    with context.database.read() as db:
        ids = db.scalars(over).all()
    for id in ids:
        fault_points.reach("sweep.before")
        context.blobs.delete(f"reports/{id}")
        drop_parts(context.database, context.blobs, id)
        fault_points.reach("sweep.deleted")
        with context.database.write() as db:
            context.check(db)
            db.execute(update(reports).where(reports.c.round == id).values(content=None))
            db.execute(update(rounds).where(rounds.c.id == id).values(swept=True))
        fault_points.reach("sweep.after")


def accepted_digest(accepted: list[Any]) -> str:
    """Returns a hash of the clients in a model: SHA-256 of JSON [[client, digest, weight]]."""
    rows = sorted([r.client, r.sha256, r.weight] for r in accepted)
    return hashlib.sha256(to_json(rows, separators=(",", ":")).encode()).hexdigest()


def _commit_evaluation(context: Context, run: Row[Any], round: Row[Any]) -> None:
    with context.database.write() as db:
        context.check(db)
        lock_run(db, run.id)
        accepted = _accepted(db, round)
        if not _settle(db, context, run, round, version=run.version):
            return
        opened = _go_on(db, context, run)
        found = measured([json.loads(row.metrics) for row in accepted])
        place = (run.id, round.number, "federated", found.means, context.now())
        insert_evaluation(db, *place, num_devices=len(accepted), medians=found.medians)
        here = (models.c.run == run.id) & (models.c.version == round.version)
        base = db.execute(select(models).where(here)).one()
        version = (run.version, base.sha256, base.num_bytes)
        _enter(db, context, run, round, accepted, [1.0] * len(accepted), *version)
        fault_points.reach("commit.inside")
    fault_points.reach("commit.after")
    if opened is not None:
        context.on_open(opened)


def _accepted(db: Connection, round: Row[Any]) -> list[Row[Any]]:
    told = [column for column in reports.c if column.name != "content"]
    query = select(*told).where(reports.c.round == round.id).order_by(reports.c.client)
    return list(db.execute(query).all())


def _settle(
    db: Connection, context: Context, run: Row[Any], round: Row[Any], *, version: int
) -> bool:
    here = (rounds.c.id == round.id) & (rounds.c.state == "AGGREGATING")
    moved = update(rounds).where(here).values(state="COMMITTED", closed_ms=context.now())
    if db.execute(moved).rowcount != 1:
        return False
    settle(db, run, round, version=version)
    return True


def _enter(
    db: Connection,
    context: Context,
    run: Row[Any],
    round: Row[Any],
    accepted: list[Row[Any]],
    weights: list[float],
    version: int,
    sha256: str,
    model_bytes: int,
    lowered: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Inserts the rows of a commit into the ledger and the audit log."""
    weight = math.fsum(weights)
    loss = math.fsum(w * row.loss for w, row in zip(weights, accepted, strict=True)) / weight
    sent = select(func.count()).where(assignments.c.round == round.id)
    downlink = (db.scalar(sent) or 0) * model_bytes
    place = {"round": round.id, "run": run.id, "kind": round.kind, "number": round.number}
    digest, is_train = accepted_digest(accepted), round.kind == "train"
    values = place | {
        "attempt": round.attempt,
        "version": version,
        "model_sha256": sha256,
        "accepted": len(accepted),
        "accepted_sha256": digest,
        "weight": weight,
        "loss": loss if is_train else None,
        "median_loss": statistics.median(row.loss for row in accepted) if is_train else None,
        "uplink_bytes": sum(row.num_bytes for row in accepted),
        "downlink_bytes": downlink,
        "committed_ms": context.now(),
    }
    db.execute(insert(ledger).values(values))
    told: dict[str, Any] = {"number": round.number, "kind": round.kind, "version": version}
    told["model"] = sha256
    if lowered:
        most = sorted(lowered, key=lambda one: -one["share"])[:_TOLD]
        about = {"number": round.number, "reports": len(lowered), "most": most}
        audit.append(db, context.now(), "leader", "lowered", run=run.id, **about)
    audit.append(db, context.now(), "leader", "commit", run=run.id, accepted=digest, **told)


def abandon(
    context: Context, run: Row[Any], round: Row[Any], reason: str, *, is_lost: bool = False
) -> None:
    """Abandons an attempt that can give no model; `is_lost`: because a stored object is lost."""
    with context.database.write() as db:
        context.check(db)
        abandon_round(db, lock_run(db, run.id), round, reason, context.now())
    if is_lost:
        context.on_lost()


def _pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PIECE_BYTES):
        yield content[start : start + PIECE_BYTES]
