"""What devices say to a server without sockets, in a form that also wrong things can be said in."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from sqlalchemy import select

from potluck.core import RefusedError
from potluck.protocol import Claim, Eligibility, Evaluation, Report, encode_inline
from potluck.server.rounds import acceptance
from potluck.server.rounds.check_in import CheckInRequest, check_ins
from potluck.server.rounds.leases import find_device
from potluck.server.rounds.uploads import begin_report
from potluck.server.storage import audit
from potluck.server.storage.database_tables import assignments, rounds
from potluck.server.storage.vectors import find_version, read_model


def claims(vector: np.ndarray, **changes) -> dict[str, Any]:
    """What a report says of an update."""
    body = np.asarray(vector).astype("<f4").tobytes()
    values = {"sha256": hashlib.sha256(body).hexdigest(), "length_bytes": len(body)}
    values |= {"codec": "float32", "weight": 1.0, "loss": 0.5, "num_steps": 1, "metrics": {}}
    return values | changes


def check_in(service, device: str, eligibility: Eligibility | None = None):
    [given] = check_ins(service, [CheckInRequest(device, eligibility or Eligibility())])
    if isinstance(given, RefusedError):
        raise given
    return given


def device_of(service, device: str):
    """A device that may take part: its key, sequence number, run and client index."""
    with service.database.read() as db:
        return find_device(db, device)[0]


def place_of(service, assignment: str) -> dict[str, Any]:
    """An assignment, and its round's number and attempt."""
    query = select(rounds.c.number, rounds.c.attempt).join(assignments)
    with service.database.read() as db:
        row = db.execute(query.where(assignments.c.id == assignment)).one()
    return {"assignment": assignment, "round": row.number, "attempt": row.attempt}


def begin(service, device: str, assignment: str, said: dict[str, Any], codec="float32"):
    """Announce an update."""
    message = Report.model_construct(**place_of(service, assignment), **said)
    return begin_report(service, device, message, codec)


def report_metrics(service, device: str, assignment: str, metrics):
    message = Evaluation.model_construct(**place_of(service, assignment), metrics=metrics)
    return acceptance.report_metrics(service, device, message, "0" * 64)


def arrival(service, device: str, assignment: str, vector, *, sequence=None, **changes):
    """A report with its update inside, and the claim of its request."""
    if sequence is None:
        sequence = device_of(service, device).sequence + 1
    body = np.asarray(vector).astype("<f4").tobytes()
    said = claims(vector, **changes) | {"update": encode_inline(body)}
    message = Report.model_construct(**place_of(service, assignment), **said)
    return Claim(device, sequence, 0, "", b""), message


def read_version(service, run: str, version: int):
    """The bytes of a version's weights, in pieces."""
    return read_model(service, run, find_version(service, run, version))


def head_of(service) -> tuple[int, str]:
    """How many rows the audit log has, and the hash of the last."""
    with service.database.read() as db:
        return audit.head(db)
