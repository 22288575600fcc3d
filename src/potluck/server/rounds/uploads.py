"""Uploads: an update arrives in chunks, is checked, and counts once.

    begin   what is coming, with its SHA-256 → an upload and the offset to go on from
    append  a chunk, on the disk when it is answered → the new offset
    finish  the part is sealed under a key of this try's own, and what was sealed is checked:
            digest, values, norm; then one row, and the report is accepted

Everything may be repeated. Until a report is accepted (`acceptance`), its device may begin again
with another digest. Its earlier bytes are then dropped. A chunk that starts elsewhere than at the
upload's end changes nothing: the answer is the offset to go on from.

Guarantee: what was accepted is not changed or removed before its round is over. Requests that
complete one upload at once, at one server or several, each seal a blob of their own. The first to
write the report's row names its blob there; the others find the row, remove theirs and give the
same answer. An upload begins again in a part of another name. So a blob or part that is removed is
one that no row names.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from potluck.core import RefusedError
from potluck.core.errors import LostError
from potluck.protocol import Accepted, Codec, Report, Upload
from potluck.protocol.routes import CHUNK_BYTES as MAX_CHUNK_BYTES
from potluck.server.rounds.acceptance import (
    CLAIMED,
    Intake,
    check_content,
    columns_of,
    earlier_answer,
)
from potluck.server.rounds.aggregate import Norms
from potluck.server.rounds.leases import (
    extend_lease,
    find_assignment,
    find_device,
    known_assignment,
)
from potluck.server.storage import fault_points
from potluck.server.storage.blobs import BlobStore
from potluck.server.storage.context import Context
from potluck.server.storage.database import Database, one
from potluck.server.storage.database_tables import TAKING, rounds, uploads
from potluck.server.storage.stored_run import settings_of

CHUNK_BYTES = 1 << 20
"""The bytes in a chunk. They bound the memory of uploads, and the cost of an interruption."""
Stood: TypeAlias = tuple[Upload | Accepted, int]
"""The state of an upload, and the number of bytes that it will have."""


def begin_report(context: Context, device: str, message: Report, codec: Codec) -> Upload | Accepted:
    """Announces an update, in the codec of the run. It is completed where all its bytes are here.

    Raises:
        RefusedError: not_found, malformed, wrong_length, late, conflict, bounds; as
            `finish_report`.
    """
    dropped = None
    with context.database.write() as db:
        found = known_assignment(db, device, message.assignment, lock=True)
        intake = Intake(db, [found], context.now())
        if intake.check(found, message, codec):
            return intake.conclude([found])[0]
        claimed = columns_of(message)
        old = one(db, select(uploads).where(uploads.c.assignment == found.id))
        if old is not None and all(getattr(old, k) == v for k, v in claimed.items()):
            id, part = old.id, _part(old)
        else:
            if old is not None:
                dropped = _part(old)
                db.execute(delete(uploads).where(uploads.c.id == old.id))
            id = secrets.token_hex(16)
            place = {"id": id, "assignment": found.id, "round": found.round, "device": device}
            db.execute(insert(uploads).values(place | claimed))
            part = id
        fault_points.reach("upload.inside")
    fault_points.reach("upload.after")
    if dropped is not None:
        context.blobs.drop(dropped)
    answer = _upload(id, context.blobs.part_size(part))
    return _complete(context, device, answer, message.length_bytes)


def upload_state(context: Context, device: str, upload: str) -> Upload | Accepted:
    """Returns the state of an upload, which is completed where all its bytes are here.

    Raises:
        RefusedError: as `find_report` and `finish_report`.
    """
    return _complete(context, device, *find_report(context, device, upload))


def add_chunk(
    context: Context, device: str, upload: str, offset: int, data: bytes | bytearray, stood: Stood
) -> Upload | Accepted:
    """Adds a chunk to an upload that `stood` so before the chunk was read; the last completes it.

    Raises:
        RefusedError: as `append_chunk` and `finish_report`; offset: it starts elsewhere.
    """
    answer, length = stood
    if isinstance(answer, Accepted):
        return answer
    try:
        answer = append_chunk(context, device, upload, offset, data)
    except RefusedError:  # or was it accepted while the body came?
        answer, _ = find_report(context, device, upload)
        if isinstance(answer, Accepted):
            return answer
        raise
    if offset + len(data) > answer.offset:
        raise RefusedError(
            "offset",
            f"the chunk must start at offset={answer.offset}, got offset={offset}. "
            "Go on from there.",
        )
    return _complete(context, device, answer, length)


def _complete(
    context: Context, device: str, answer: Upload | Accepted, length: int
) -> Upload | Accepted:
    if isinstance(answer, Upload) and answer.offset == length:
        return finish_report(context, device, answer.upload)
    return answer


def append_chunk(
    context: Context, device: str, upload: str, offset: int, data: bytes | bytearray
) -> Upload:
    """Adds a chunk; bytes count from the moment they are on the disk. Extends the lease.

    Raises:
        RefusedError: not_found, late, malformed: a chunk too long.
    """
    with context.database.read() as db:
        row = find_upload(db, device, upload)
        found = find_assignment(db, device, row.assignment)
    if not 0 <= offset <= offset + len(data) <= row.num_bytes or len(data) > MAX_CHUNK_BYTES:
        raise RefusedError(
            "malformed",
            f"a chunk has at most {MAX_CHUNK_BYTES} bytes and ends by {row.num_bytes}, "
            f"got offset={offset}, length={len(data)}.",
        )
    if found.state == "reported":
        return _upload(upload, row.num_bytes)
    part, blobs = _part(row), context.blobs
    end = blobs.part_size(part)
    if end == offset and data:
        end = blobs.append(part, offset, data)
        with context.database.read() as db:
            wanted = one(db, _WANTED.where(uploads.c.id == upload, _in_part == part))
        if wanted is None:  # it came after all else of its upload was removed
            blobs.drop(part)
    if found.lease_ms - context.now() < settings_of(found.settings).lease_ms // 2:
        extend_lease(context, device, row.assignment)
    return _upload(upload, end)


def finish_report(context: Context, device: str, upload: str) -> Accepted:
    """Checks what was sent, and accepts it; a request that repeats another waits for it.

    Raises:
        RefusedError: not_found, late, conflict; offset: bytes are missing; digest: send it again
            from 0; bounds, not_finite, malformed: the device's part in this round is over.
    """
    with context.turn(upload):
        answer, is_goal = _finish(context, device, upload)
    if is_goal:
        context.on_goal()
    return answer


def _finish(context: Context, device: str, upload: str) -> tuple[Accepted, bool]:
    """Returns the answer, and whether a round has its goal with it."""
    now, blobs = context.now(), context.blobs
    with context.database.read() as db:
        row = find_upload(db, device, upload)
        found = known_assignment(db, device, row.assignment)
        answer = earlier_answer(db, found, row.sha256, now)
    if answer is not None:
        return answer, False
    fault_points.reach("finish.before-check")
    key = f"reports/{row.round}/{upload}-{secrets.token_hex(8)}"
    try:
        try:
            norms = _seal(blobs, row, found, key)
        except LostError as error:  # another request, or the end of the round, was faster
            raise RefusedError("offset", f"some of the upload is gone: {error}") from error
        fault_points.reach("finish.before-row")
        with context.database.write() as db:
            found = known_assignment(db, device, row.assignment, lock=True)
            intake = Intake(db, [found], now)
            is_new = not intake.has(found, row.sha256)
            if is_new:
                find_upload(db, device, row.id)  # or the device began with another one
                claimed = {name: getattr(row, name) for name in CLAIMED}
                intake.add(found, claimed | {"key": key} | norms._asdict())
            [answer] = intake.conclude([found])
            fault_points.reach("finish.inside")
    except RefusedError as error:
        blobs.delete(key)
        with context.database.read() as db:  # or was it completed by another request meanwhile?
            found = known_assignment(db, device, row.assignment)
            answer = earlier_answer(db, found, row.sha256, now)
        if answer is None:
            _reject(context, row, found, error)
            raise
        return answer, False
    fault_points.reach("finish.after")
    if intake.closed:
        fault_points.reach("close.after")
    if is_new:
        blobs.drop(_part(row))
    else:
        blobs.delete(key)
    return answer, bool(intake.closed)


def find_report(context: Context, device: str, upload: str) -> Stood:
    """Returns the state of an upload, and its full length; also when its round is over.

    Raises:
        RefusedError: not_found, late, conflict.
    """
    with context.database.read() as db:
        row = find_upload(db, device, upload)
        found = known_assignment(db, device, row.assignment)
        answer = earlier_answer(db, found, row.sha256, context.now())
    if answer is not None:
        return answer, row.num_bytes
    return _upload(upload, context.blobs.part_size(_part(row))), row.num_bytes


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
    """Returns a device's upload; another device's is answered as an unknown one."""
    row = db.execute(_UPLOAD, {"upload": upload, "device": device}).one_or_none()
    if row is None:
        find_device(db, device)
        raise RefusedError("not_found", f"got upload={upload!r}, which is none of yours.")
    return row


def _upload(id: str, offset: int) -> Upload:
    return Upload(upload=id, offset=offset, chunk_bytes=CHUNK_BYTES)


def _part(row: Row[Any]) -> str:
    """Returns the name of the part that an upload grows in."""
    return row.part or row.id


def _seal(blobs: BlobStore, row: Row[Any], found: Row[Any], key: str) -> Norms:
    """Seals an upload under a new key, and checks what it then holds."""
    size = blobs.part_size(_part(row))
    if size != row.num_bytes:
        raise RefusedError("offset", f"{row.num_bytes} bytes were announced, got {size}.")
    blobs.seal(_part(row), key)
    norms = check_content(found, row, blobs.read(key, 0, row.num_bytes))
    fault_points.reach("finish.after-check")
    return norms


def _reject(context: Context, row: Row[Any], found: Row[Any], error: RefusedError) -> None:
    """Acts on an upload that was complete and is not accepted."""
    if error.code in ("offset", "late", "conflict", "not_found", "unknown"):
        return
    with context.database.write() as db:
        if error.code == "digest":  # it begins again, where no request for this part reaches it
            again = update(uploads).where(uploads.c.id == row.id, _in_part == _part(row))
            db.execute(again.values(part=secrets.token_hex(16)))
        else:
            intake = Intake(db, [found], context.now())
            intake.reject(found, str(error))
            intake.conclude([])
    context.blobs.drop(_part(row))


def drop_parts(database: Database, blobs: BlobStore, round: str) -> None:
    """Drops the unfinished uploads of a round that is over.

    The rows stay: later requests for an upload are answered as before, or late, and not unknown.
    """
    with database.read() as db:
        parts = db.scalars(select(_in_part).where(uploads.c.round == round)).all()
    for part in parts:
        with contextlib.suppress(FileNotFoundError):
            blobs.drop(part)
