"""R6: rounds with too few reports, and what their devices may still do when they are over.

Of six devices two report, one has sent half of its update, one has announced it, one has only been
given the work, and one has failed at it. Afterwards all that they hold is late, but that a report
had arrived may be heard again. Nobody sends the body of a late chunk that is long: it is answered
all the same.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import func, select

from fleet import fingerprint
from potluck.protocol import (
    MAX_REQUEST_BYTES,
    MESSAGES,
    STATUS,
    Accepted,
    Assignment,
    Error,
    Evaluation,
    Failed,
    Message,
    Progress,
    Report,
    Upload,
    encode_message,
    parse_message,
)
from potluck.server.storage.blobs import open_blobs
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import ledger, models, rounds
from potluck.server.storage.vectors import read_vector
from remote import Caller
from serve_process import ServerProcess, experiment
from swarm import until

DEVICES, REPORTED, SENDING = 6, 2, 2
DIM = 650  # of the model "logistic" on digits
LATE = 2 * REPORTED + 6 * SENDING + 4 * (DEVICES - REPORTED - SENDING)
AGAIN = 3 * REPORTED
"""Answers of both kinds to the old work of one round, see `_old_work`."""


class Held(NamedTuple):
    """What a device has of a round: its work, and how far that came."""

    work: Assignment
    body: bytes
    report: Report
    upload: str | None = None
    accepted: Accepted | None = None


def abandon_rounds(folder: Path, *, times: int) -> dict[str, Any]:
    """Have so many attempts at round 1 abandoned, then one that is not."""
    text = experiment(clients=DEVICES, minimum=0.5, report_seconds=4.0, long_poll_seconds=5.0)
    server = ServerProcess(folder, text)
    assert server.serves()
    callers = [Caller(server.address, server.certificate) for _ in range(DEVICES)]
    answers: Counter[str] = Counter()
    attempts, changed, unread = [], 0, 0
    try:
        for caller in callers:
            caller.enrol(server.invite())
        before = _stored(server)
        for number in range(1, times + 1):
            works = [caller.assigned() for caller in callers]
            held = [_take_part(k, callers[k], work) for k, work in enumerate(works)]
            until(lambda number=number: _abandoned(server) == number)
            changed += _stored(server) != before
            for caller, one in zip(callers, held, strict=True):
                answers.update(_old_work(caller, one))
                if one.upload and not one.accepted:
                    unread += _is_late_without_a_body(server, caller, one)
            attempts += sorted({(work.round, work.attempt) for work in works})
        for caller in callers:
            caller.take_part(DIM)
        until(lambda: server.status()["version"] == 1)
        committed, audit = server.status()["rounds"], server.operator.get("audit")
    finally:
        for caller in callers:
            caller.close()
        code = server.end()
    faults = server.faults()
    return {
        "abandoned": _abandoned(server),
        "rounds_that_changed_model_version_or_ledger": changed,
        "answers_to_old_work": dict(sorted(answers.items())),
        "late_chunks_answered_before_their_body_was_sent": unread,
        "reports_in_the_round_afterwards": [row["accepted"] for row in committed],
        "faults_logged": faults[:3],
        "holds": attempts == [(1, attempt) for attempt in range(1, times + 1)]
        and changed == 0
        and answers == {"409 late": LATE * times, "200 as before": AGAIN * times}
        and unread == SENDING * times
        and [(row["attempt"], row["accepted"]) for row in committed] == [(times + 1, DEVICES)]
        and audit["broken"] is None
        and not (faults or code),
    }


def _take_part(k: int, caller: Caller, work: Assignment) -> Held:
    """What the k-th device does before the round is over."""
    body = fingerprint(work.client, DIM).astype("<f4").tobytes()
    held = Held(work, body, caller.report_of(work, body))
    if k < REPORTED + SENDING:
        upload = caller.ask("report", held.report)
        assert isinstance(upload, Upload), upload
        held = held._replace(upload=upload.upload)
        if k < REPORTED:
            accepted = caller.put(upload.upload, 0, body)
            assert isinstance(accepted, Accepted), accepted
            return held._replace(accepted=accepted)
        if k == REPORTED:
            caller.put(upload.upload, 0, body[: len(body) // 2])
    elif k == DEVICES - 1:
        caller.ask("failure", Failed(assignment=work.assignment, reason="error"))
    return held


def _old_work(caller: Caller, held: Held) -> list[str]:
    """What the device is answered when it goes on as if the round were open."""
    id = held.work.assignment
    asked: list[tuple[str, Message]] = [
        ("progress", Progress(assignment=id, phase="train", fraction=0.5)),
        ("failure", Failed(assignment=id, reason="error")),
        ("report", held.report),
    ]
    if held.accepted is None:
        place = {"assignment": id, "round": held.work.round, "attempt": held.work.attempt}
        asked.append(("evaluation", Evaluation(**place, metrics={"correct": (1.0, 1)})))
    answers = [caller.send("POST", f"/v1/{name}", encode_message(m)) for name, m in asked]
    if held.upload is not None:
        path = f"/v1/uploads/{held.upload}"
        answers.append(caller.send("GET", path))
        answers.append(caller.send("PUT", f"{path}?offset=0", held.body))
    return [_told(answer.status_code, answer.content, held) for answer in answers]


def _told(status: int, content: bytes, held: Held) -> str:
    """A status and its message in words."""
    message = parse_message(content, *MESSAGES, limit=2**20)
    if isinstance(message, Error):
        return f"{status} {message.code}"
    first = held.accepted
    if isinstance(message, Accepted) and first is not None:
        same = message == first.model_copy(
            update={"retry_after_seconds": message.retry_after_seconds}
        )
        return f"{status} {'as before' if same else 'with another report'}"
    return f"{status} {type(message).__name__}"


def _is_late_without_a_body(server: ServerProcess, caller: Caller, held: Held) -> bool:
    """Whether a chunk too long to be read beforehand is refused while none of it was sent."""
    body = bytes(MAX_REQUEST_BYTES + 1)
    context = ssl.create_default_context(cadata=server.certificate)
    context.check_hostname = False
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=context)
    path = f"/v1/uploads/{held.upload}?offset=0"
    headers = caller.signed("PUT", path, body) | {"Content-Length": str(len(body))}
    try:
        connection.putrequest("PUT", path)
        for name, value in (headers | {"Content-Type": "application/octet-stream"}).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return _told(answer.status, answer.read(), held) == f"{STATUS['late']} late"
    finally:
        connection.close()


def _stored(server: ServerProcess) -> tuple[int, list[tuple[Any, ...]], int]:
    """The run's version, its models with the digests of their bytes, the rows of its ledger."""
    database = Database(server.home.database)
    with database.read() as db:
        rows = db.execute(select(models)).all()
        charged = db.scalar(select(func.count()).select_from(ledger)) or 0
    database.close()
    store = open_blobs(server.home.blobs)
    contents = [b"".join(read_vector(store, row)) for row in rows]
    kept = [
        (row.version, row.sha256, hashlib.sha256(content).hexdigest())
        for row, content in zip(rows, contents, strict=True)
    ]
    return server.status()["version"], kept, charged


def _abandoned(server: ServerProcess) -> int:
    database = Database(server.home.database)
    with database.read() as db:
        count = db.scalar(select(func.count()).where(rounds.c.state == "ABANDONED")) or 0
    database.close()
    return count
