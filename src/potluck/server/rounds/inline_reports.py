"""Reports with their update inside: many at once, in one transaction.

    note the sequence numbers of the requests
    for each, as they came: whose is it, was it here before, what is in it?
    then all rows at once: reports with their updates, assignments; and the round closes at its goal

An update stands in the row of its report, so that one commit, and one fsync, makes everything of a
batch durable; no answer is sent before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from sqlalchemy import Row

from potluck.core import CodedError, RefusedError
from potluck.protocol import Accepted, Claim, Codec, Report, decode_inline
from potluck.server.rounds.acceptance import Intake, check_content, columns_of
from potluck.server.rounds.enrolment import note_sequences
from potluck.server.rounds.leases import known_assignments, unknown_assignment
from potluck.server.storage import fault_points
from potluck.server.storage.context import Context

Arrival: TypeAlias = tuple[Claim, Report]
"""A report with its update inside, and the claim of its request, which was not noted before."""


def accept_batch(
    context: Context, arrivals: Sequence[Arrival], codec: Codec
) -> list[Accepted | CodedError]:
    """Accepts reports with their updates inside, and returns the answer to each.

    It is accepted, or refused: replayed, unknown, not_found, late, conflict, wrong_length; digest:
    send it again; bounds, not_finite, malformed: the device's part in this round is over.
    """
    bodies, now = [_decoded(message) for _, message in arrivals], context.now()
    with context.database.write() as db:
        claims = [(claim.device, claim.sequence) for claim, _ in arrivals]
        turned_away = note_sequences(db, claims, now)
        found = known_assignments(db, sorted({message.assignment for _, message in arrivals}))
        intake = Intake(db, found.values(), now)
        outcomes = [
            error or _taken(intake, found.get(message.assignment), claim, message, body, codec)
            for error, (claim, message), body in zip(turned_away, arrivals, bodies, strict=True)
        ]
        fault_points.reach("arrive.before-row")
        answers = iter(intake.conclude(row for row in outcomes if isinstance(row, Row)))
        told = [next(answers) if isinstance(one, Row) else one for one in outcomes]
        fault_points.reach("arrive.inside")
    fault_points.reach("arrive.after")
    if intake.closed:
        fault_points.reach("close.after")
        context.on_goal()
    return told


def _decoded(message: Report) -> bytes | CodedError:
    try:
        return decode_inline(message.update or "", message.length_bytes)
    except CodedError as error:
        return error


def _taken(
    intake: Intake,
    found: Row[Any] | None,
    claim: Claim,
    message: Report,
    body: bytes | CodedError,
    codec: Codec,
) -> Row[Any] | CodedError:
    """Returns the assignment of a report that counts, or the refusal."""
    try:
        if found is None or found.device != claim.device:
            raise unknown_assignment(message.assignment)
        fault = None if isinstance(body, bytes) else body
        if intake.check(found, message, codec, fault):
            return found
        assert isinstance(body, bytes)
        try:
            norms = check_content(found, message, iter((body,)))
        except RefusedError as error:
            if error.code != "digest":
                intake.reject(found, str(error))
            raise
        intake.add(found, columns_of(message) | norms._asdict() | {"content": body})
    except CodedError as error:
        return error
    return found
