"""Reports: an update arrives in chunks, is checked, and counts once.

    begin   what is coming, with its SHA-256 → an upload and the offset to go on from
    append  a chunk, on the disk when it is answered → the new offset
    finish  the part is sealed under a key of this try's own, and what was sealed is checked:
            digest, values, norm; then one row, and the report is accepted

Everything may be repeated. A report is identified by device and round (an attempt has an id of its
own): the same digest again is answered as the first time, also when the round is over; another
digest is a conflict. Until it is accepted a device may begin again with another digest; what it had
sent is dropped. An appended chunk that starts elsewhere than at the upload's end changes nothing:
the answer is the offset to go on from.

Guarantee: what was accepted is not changed or removed before its round is over. Requests that
complete one upload at once, at one server or several, each seal a blob of their own. The first to
write the report's row names its blob there; the others find the row, remove theirs and give the
same answer. An upload begins again in a part of another name. So a blob or part that is removed is
one that no row names.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from potluck.core import RefusedError, update_bytes
from potluck.core.errors import LostError
from potluck.core.plain_json import to_json
from potluck.protocol import CODECS, Codec
from potluck.protocol.routes import CHUNK_BYTES as MAX_CHUNK_BYTES
from potluck.server.rounds.aggregate import Norms, check_claims, check_update
from potluck.server.rounds.check_in import TAKING
from potluck.server.rounds.leases import (
    check_not_over,
    extend_lease,
    find_assignment,
    find_device,
    known_assignment,
)
from potluck.server.rounds.scoring import checked_sums
from potluck.server.rounds.state_machine import ENOUGH, close_round
from potluck.server.storage import audit, fault_points
from potluck.server.storage.blobs import BlobStore
from potluck.server.storage.database import Database, one
from potluck.server.storage.database_tables import assignments, reports, rounds, runs, uploads
from potluck.server.storage.stored_run import settings_of
from potluck.server.storage.vectors import read_spec

CHUNK_BYTES = 1 << 20
"""What devices are asked to send at once. It bounds the memory of uploads, and what a cut costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a device says of the update that it will send."""

    sha256: str
    num_bytes: int
    weight: float
    loss: float
    num_steps: int
    codec: Codec = "float32"


class Upload(NamedTuple):
    """An update on its way: go on sending at `offset`."""

    upload: str
    offset: int
    chunk_bytes: int = CHUNK_BYTES


class Accepted(NamedTuple):
    """A report that counts; `is_goal` when it was the last one that the round waited for."""

    round: str
    sha256: str
    is_goal: bool = False


def begin_report(
    database: Database, blobs: BlobStore, device: str, assignment: str, claims: Claims
) -> Upload | Accepted:
    """Announce an update.

    Raises:
        RefusedError: unknown, late, conflict, bad_update.
    """
    dropped = None
    with database.write() as db:
        found = known_assignment(db, device, assignment, lock=True)
        answer = _earlier(db, found, claims.sha256)
        if answer is not None:
            return answer
        check_claimed(found, claims)
        old = one(db, select(uploads).where(uploads.c.assignment == assignment))
        if old is not None and all(getattr(old, k) == v for k, v in asdict(claims).items()):
            id, part = old.id, _part(old)
        else:
            if old is not None:
                dropped = _part(old)
                db.execute(delete(uploads).where(uploads.c.id == old.id))
            id = secrets.token_hex(16)
            place = {"id": id, "assignment": assignment, "round": found.round, "device": device}
            db.execute(insert(uploads).values(place | asdict(claims)))
            part = id
        fault_points.reach("upload.inside")
    fault_points.reach("upload.after")
    if dropped is not None:
        blobs.drop(dropped)
    return Upload(id, blobs.part_size(part))


def append_chunk(
    database: Database,
    blobs: BlobStore,
    device: str,
    upload: str,
    offset: int,
    data: bytes | bytearray,
    now: int,
) -> Upload:
    """Add a chunk; bytes count from the moment they are on the disk. Extends the lease.

    Raises:
        RefusedError: unknown, late, malformed: a chunk too long.
    """
    with database.read() as db:
        row = find_upload(db, device, upload)
        found = find_assignment(db, device, row.assignment)
    if not 0 <= offset <= offset + len(data) <= row.num_bytes or len(data) > MAX_CHUNK_BYTES:
        raise RefusedError(
            "malformed",
            f"a chunk has at most {MAX_CHUNK_BYTES} bytes and ends by {row.num_bytes}, "
            f"got offset={offset}, length={len(data)}.",
        )
    if found.state == "reported":
        return Upload(upload, row.num_bytes)
    part = _part(row)
    end = blobs.part_size(part)
    if end == offset and data:
        end = blobs.append(part, offset, data)
        with database.read() as db:
            wanted = one(db, _WANTED.where(uploads.c.id == upload, _in_part == part))
        if wanted is None:  # it came after all else of its upload was removed
            blobs.drop(part)
    settings = settings_of(found.settings)
    if found.lease_ms - now < settings.lease_ms // 2:
        extend_lease(database, device, row.assignment, now)
    return Upload(upload, end)


def finish_report(
    database: Database, blobs: BlobStore, device: str, upload: str, now: int
) -> Accepted:
    """Check what was sent, and accept it.

    Raises:
        RefusedError: unknown, late, conflict, incomplete; digest: send it again from 0;
            bad_update, not_finite, malformed: the device's part in this round is over.
    """
    with database.read() as db:
        row = find_upload(db, device, upload)
        found = known_assignment(db, device, row.assignment)
        answer = _earlier(db, found, row.sha256)
    if answer is not None:
        return answer
    fault_points.reach("finish.before-check")
    key = f"reports/{row.round}/{upload}-{secrets.token_hex(8)}"
    try:
        try:
            norms = _seal(blobs, row, found, key)
        except LostError as error:  # another request, or the end of the round, was faster
            raise RefusedError("incomplete", f"some of the upload is gone: {error}") from error
        fault_points.reach("finish.before-row")
        with database.write() as db:
            answer, is_new = _accept(db, device, row, {"key": key} | norms._asdict(), now)
            fault_points.reach("finish.inside")
    except RefusedError as error:
        blobs.delete(key)
        with database.read() as db:  # or was it completed by another request meanwhile?
            answer = _earlier(db, known_assignment(db, device, row.assignment), row.sha256)
        if answer is None:
            _reject(database, blobs, row, found, error, now)
            raise
        return answer
    fault_points.reach("finish.after")
    if answer.is_goal:
        fault_points.reach("close.after")
    if is_new:
        blobs.drop(_part(row))
    else:
        blobs.delete(key)
    return answer


def report_metrics(
    database: Database,
    device: str,
    assignment: str,
    metrics: Mapping[str, tuple[float, float]],
    now: int,
) -> Accepted:
    """Report a federated evaluation: for every metric its sum over examples, and their count.

    Raises:
        RefusedError: unknown, late, conflict, bad_update.
    """
    text = to_json({k: [float(v) for v in metrics[k]] for k in sorted(metrics)})
    digest = hashlib.sha256(text.encode()).hexdigest()
    with database.write() as db:
        found = known_assignment(db, device, assignment, lock=True)
        answer = _earlier(db, found, digest)
        if answer is not None:
            return answer
        if found.kind != "evaluate":
            raise RefusedError("malformed", "this assignment asks for an update.")
        plan = db.execute(select(runs.c.plan).where(runs.c.id == found.run)).scalar_one()
        kept = checked_sums(metrics, plan)
        text = to_json({name: list(kept[name]) for name in sorted(kept)})
        values = {"sha256": digest, "num_bytes": len(text), "codec": "json", "metrics": text}
        return _insert(db, found, values | {"weight": 1.0, "loss": 0.0, "num_steps": 0}, now)


def find_report(
    database: Database, blobs: BlobStore, device: str, upload: str
) -> tuple[Upload | Accepted, int]:
    """Where an upload stands, and how long it will be; also when its round is over.

    Raises:
        RefusedError: unknown, late, conflict.
    """
    with database.read() as db:
        row = find_upload(db, device, upload)
        found = known_assignment(db, device, row.assignment)
        answer = _earlier(db, found, row.sha256)
    if answer is not None:
        return answer, row.num_bytes
    return Upload(upload, blobs.part_size(_part(row))), row.num_bytes


_UPLOAD = select(uploads).where(
    uploads.c.id == bindparam("upload"), uploads.c.device == bindparam("device")
)
_in_part = func.coalesce(uploads.c.part, uploads.c.id)
_WANTED = (
    select(uploads.c.id)
    .join(rounds, rounds.c.id == uploads.c.round)
    .where(rounds.c.state.in_(TAKING))
)


def find_upload(db: Connection, device: str, upload: str) -> Row[Any]:
    """A device's upload; another device's looks like none."""
    row = db.execute(_UPLOAD, {"upload": upload, "device": device}).one_or_none()
    if row is None:
        find_device(db, device)
        raise RefusedError("unknown", f"got upload={upload!r}, which is none of yours.")
    return row


def _part(row: Row[Any]) -> str:
    """The name of the part that an upload grows in."""
    return row.part or row.id


_EARLIER = select(reports.c.sha256).where(
    reports.c.round == bindparam("round"), reports.c.device == bindparam("device")
)


def _earlier(db: Connection, found: Row[Any], sha256: str) -> Accepted | None:
    """The answer of the first time, if this device has reported in this round; also by another
    assignment, after the lease of this one ran out. Without one it must not be over."""
    place = {"round": found.round, "device": found.device}
    row = db.execute(_EARLIER, place).one_or_none()
    if row is None:
        check_not_over(found)
        return None
    if row.sha256 != sha256:
        raise conflict()
    return Accepted(found.round, sha256)


def conflict() -> RefusedError:
    """What is said to a second report with other bytes."""
    return RefusedError("conflict", "another report of this device counts in this round.")


def check_claimed(found: Row[Any], claims: Claims) -> None:
    """Refuse claims that cannot be right of an update for this assignment."""
    if found.kind != "train":
        raise RefusedError("malformed", "this assignment asks for metrics.")
    if claims.codec not in CODECS:
        known = ", ".join(CODECS)
        raise RefusedError("malformed", f"codec must be {known}, got codec={claims.codec!r}.")
    expected = update_bytes(claims.codec, read_spec(found.spec))
    if claims.num_bytes != expected:
        raise RefusedError(
            "bad_update", f"an update has {expected} bytes, got num_bytes={claims.num_bytes}."
        )
    settings = settings_of(found.settings)
    check_claims(settings, weight=claims.weight, loss=claims.loss, num_steps=claims.num_steps)


def check_content(found: Row[Any], claims: Claims | Row[Any], pieces: Iterator[bytes]) -> Norms:
    """Read an update that was claimed for an assignment; `claims` may be the row of an upload.

    Raises:
        RefusedError: as `check_update`.
    """
    return check_update(
        pieces,
        claims.codec,
        read_spec(found.spec),
        claims.sha256,
        weight=claims.weight,
        slots=found.slots,
        settings=settings_of(found.settings),
    )


def _seal(blobs: BlobStore, row: Row[Any], found: Row[Any], key: str) -> Norms:
    """Seal an upload under a new key, and check what is there then."""
    size = blobs.part_size(_part(row))
    if size != row.num_bytes:
        raise RefusedError("incomplete", f"{row.num_bytes} bytes were announced, got {size}.")
    blobs.seal(_part(row), key)
    norms = check_content(found, row, blobs.read(key, 0, row.num_bytes))
    fault_points.reach("finish.after-check")
    return norms


def _reject(
    database: Database,
    blobs: BlobStore,
    row: Row[Any],
    found: Row[Any],
    error: RefusedError,
    now: int,
) -> None:
    """What follows for an upload that was complete and is not accepted."""
    if error.code in ("incomplete", "late", "conflict", "unknown", "revoked"):
        return
    with database.write() as db:
        if error.code == "digest":  # it begins again, where no request for this part reaches it
            again = update(uploads).where(uploads.c.id == row.id, _in_part == _part(row))
            db.execute(again.values(part=secrets.token_hex(16)))
        elif end_part(db, found, str(error)):
            note_bad(db, found, str(error), now)
    blobs.drop(_part(row))


def end_part(db: Connection, found: Row[Any], reason: str) -> bool:
    """Fail an assignment whose update can be part of no model, if it is still active."""
    active = (assignments.c.id == found.id) & (assignments.c.state == "active")
    values = {"state": "failed", "reason": reason[:500]}
    return db.execute(update(assignments).where(active).values(values)).rowcount == 1


def note_bad(db: Connection, found: Row[Any], reason: str, now: int) -> None:
    """The audit log's row of such an update."""
    actor = f"device {found.device}"
    audit.append(db, now, actor, "bad update", round=found.round, reason=reason)


def _accept(
    db: Connection, device: str, row: Row[Any], sealed: Mapping[str, Any], now: int
) -> tuple[Accepted, bool]:
    """The answer, and whether it is this try's blob that the report names."""
    found = known_assignment(db, device, row.assignment, lock=True)
    answer = _earlier(db, found, row.sha256)
    if answer is not None:
        return answer, False
    find_upload(db, device, row.id)  # or the device began with another one
    names = ("sha256", "num_bytes", "codec", "weight", "loss", "num_steps")
    values = {name: getattr(row, name) for name in names} | dict(sealed)
    return _insert(db, found, values, now), True


def _insert(db: Connection, found: Row[Any], values: dict[str, Any], now: int) -> Accepted:
    mine = reports.c.round == found.round
    count = db.scalar(select(func.count()).where(mine)) or 0
    if count >= found.goal:
        raise enough()
    place = {"round": found.round, "device": found.device, "assignment": found.id}
    db.execute(
        insert(reports).values(values | place | {"client": found.client, "accepted_ms": now})
    )
    done = update(assignments).where(assignments.c.id == found.id)
    db.execute(done.values(state="reported"))
    if count + 1 == found.goal:
        close_round(db, found.round)
    return Accepted(found.round, values["sha256"], count + 1 == found.goal)


def enough() -> RefusedError:
    """What is said when a round has its goal."""
    return RefusedError("late", f"{ENOUGH}. Check in again.")


def drop_parts(database: Database, blobs: BlobStore, round: str) -> None:
    """Drop what was on its way to a round that is over.

    The rows stay: what still comes for an upload is answered as it was, or late, and not unknown.
    """
    with database.read() as db:
        parts = db.scalars(select(_in_part).where(uploads.c.round == round)).all()
    for part in parts:
        with contextlib.suppress(FileNotFoundError):
            blobs.drop(part)
