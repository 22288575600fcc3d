"""The desk of one run: a device's messages in, answers out, both as the protocol says.

Everything here is synchronous and without sockets. A refusal is a `ProtocolError` with a code of
the protocol's. What the service calls unknown is `not_found` here: another device's assignment
looks like none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from potluck.core import ProtocolError, RefusedError, Spec
from potluck.protocol import (
    Accepted,
    Assignment,
    CheckIn,
    Codec,
    Enrol,
    Enrolled,
    ErrorCode,
    Evaluation,
    Failed,
    Finished,
    Lease,
    Manifest,
    ManifestSpec,
    Message,
    Progress,
    Report,
    Upload,
    Wait,
    encoded_bytes,
    public_key,
    sign_manifest,
)
from potluck.server import reports, selection
from potluck.server.selection import Assigned, Attributes
from potluck.server.service import Service
from potluck.server.settings import RoundSettings, milliseconds

_CODES: dict[str, ErrorCode] = {
    "unknown": "not_found",
    "revoked": "unknown",
    "bad_update": "bounds",
    "incomplete": "offset",
}
_REASONS: dict[selection.WaitReason, Any] = {
    "no round": "between_rounds",
    "slots taken": "full",
    "not selected": "not_selected",
    "reported": "between_rounds",
    "not eligible": "ineligible",
    "paused": "paused",
    "failed": "between_rounds",
}
_SKEW_MS = 300_000  # a device's clock may be so late: its manifests expire later


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """One run that is served."""

    service: Service
    run: str
    name: str
    key: bytes
    """Signs manifests."""
    spec: Spec
    plan: dict[str, Any]
    settings: RoundSettings
    codec: Codec

    def enrol(self, message: Enrol) -> Enrolled:
        """Take in the device that owns the message's key."""
        with refusals():
            enrolled = self.service.enrol(
                message.token,
                bytes.fromhex(message.public_key),
                name=message.name or "",
                device_class=message.device_class,
                into=self.run,
            )
        return Enrolled(
            device=enrolled.device,
            run=self.name,
            server_key=public_key(self.key).hex(),
            server_time_ms=self.service.time.now(),
        )

    def check_in(self, device: str, message: CheckIn) -> Assignment | Wait | Finished:
        """Work, a time to come back, or the end."""
        (given,) = self.check_ins([(device, message)])
        if isinstance(given, Exception):
            raise given
        return given

    def check_ins(
        self, asked: Sequence[tuple[str, CheckIn]]
    ) -> list[Assignment | Wait | Finished | Exception]:
        """Many check-ins at once: for each one its answer, or the ProtocolError it is refused."""
        answers: dict[int, Assignment | Wait | Finished | Exception] = {}
        good: list[int] = []
        for number, (device, message) in enumerate(asked):
            try:
                early = self._early(device, message)
            except ProtocolError as error:
                early = error
            if early is None:
                good.append(number)
            else:
                answers[number] = early
        shown = [(asked[n][0], Attributes(**asked[n][1].eligibility.model_dump())) for n in good]
        for number, given in zip(good, self.service.check_ins(shown), strict=True):
            answers[number] = self._told(given)
        return [answers[number] for number in range(len(asked))]

    def _early(self, device: str, message: CheckIn) -> Wait | None:
        if message.run != self.name:
            raise ProtocolError(
                "not_found", f"the run must be {self.name}, got run={message.run}. Enrol in it."
            )
        if self.codec in message.accepts:
            return None
        with refusals():
            return Wait(retry_after_seconds=self.come_back(device), reason="unsupported")

    def _told(self, given: selection.Given) -> Assignment | Wait | Finished | ProtocolError:
        match given:
            case RefusedError():
                return _in_words(given)
            case selection.Finished():
                return Finished(run=self.name, rounds=given.version)
            case selection.Wait():
                seconds = min(given.retry_after_seconds, 86_400.0)
                return Wait(retry_after_seconds=seconds, reason=_REASONS[given.reason])
            case Assigned():
                return self._assignment(given)

    def progress(self, device: str, message: Progress) -> Lease:
        """A longer lease."""
        with refusals():
            return _lease(self.service.extend_lease(device, message.assignment))

    def fail(self, device: str, message: Failed) -> Wait:
        """The slot is free again."""
        with refusals():
            self.service.fail(device, message.assignment, message.reason)
            return Wait(retry_after_seconds=self.come_back(device), reason="noted")

    def report(self, device: str, message: Report) -> Upload | Accepted:
        """Announce an update."""
        with refusals():
            self._check_place(device, message)
            expected = encoded_bytes(self.codec, self.spec.dim)
            if message.codec != self.codec:
                raise ProtocolError("malformed", f"codec must be {self.codec}, got {message.codec}")
            if message.length_bytes != expected:
                raise ProtocolError(
                    "wrong_length",
                    f"an update must have {expected} bytes, got length_bytes="
                    f"{message.length_bytes}. Encode the whole vector.",
                )
            claims = reports.Claims(
                sha256=message.sha256,
                num_bytes=message.length_bytes,
                weight=message.weight,
                loss=message.loss,
                num_steps=message.num_steps,
                codec=message.codec,
            )
            answer = self.service.begin_report(device, message.assignment, claims)
        return self._settle(device, answer, message.length_bytes)

    def upload(self, device: str, upload: str) -> Upload | Accepted:
        """Where an upload stands."""
        with refusals():
            answer, length = self.service.find_report(device, upload)
        return self._settle(device, answer, length)

    def stands(self, device: str, upload: str) -> tuple[reports.Upload | reports.Accepted, int]:
        """Where an upload stands, and how long it will be: before a chunk's body is read."""
        with refusals():
            return self.service.find_report(device, upload)

    def chunk(
        self,
        device: str,
        upload: str,
        offset: int,
        data: bytes | bytearray,
        stood: tuple[reports.Upload | reports.Accepted, int],
    ) -> Upload | Accepted:
        """A part of an update that `stood` so; the last part completes it."""
        answer, length = stood
        with refusals():
            if isinstance(answer, reports.Accepted):
                return self._accepted(device, answer)
            try:
                answer = self.service.append_chunk(device, upload, offset, data)
            except RefusedError:  # or was it accepted while the body came?
                answer, _ = self.service.find_report(device, upload)
                if isinstance(answer, reports.Accepted):
                    return self._accepted(device, answer)
                raise
        if offset + len(data) > answer.offset:
            raise ProtocolError(
                "offset",
                f"the chunk must start at offset={answer.offset}, got offset={offset}. "
                "Go on from there.",
            )
        return self._settle(device, answer, length)

    def evaluation(self, device: str, message: Evaluation, sha256: str) -> Accepted:
        """Metrics of a federated evaluation; `sha256` is that of the message's bytes."""
        with refusals():
            self._check_place(device, message)
            metrics = {name: (float(s), float(n)) for name, (s, n) in message.metrics.items()}
            answer = self.service.report_metrics(device, message.assignment, metrics)
            return self._accepted(device, answer).model_copy(update={"sha256": sha256})

    def come_back(self, device: str) -> float:
        """Seconds after which a device that is done should check in."""
        return min(self.service.come_back(device), 86_400.0)

    def _check_place(self, device: str, message: Report | Evaluation) -> None:
        found = self.service.assignment(device, message.assignment)
        if (message.round, message.attempt) != (found.number, found.attempt):
            raise ProtocolError(
                "malformed",
                f"round and attempt must be those of the assignment ({found.number}, "
                f"{found.attempt}), got round={message.round}, attempt={message.attempt}.",
            )

    def _settle(
        self, device: str, answer: reports.Upload | reports.Accepted, length: int
    ) -> Upload | Accepted:
        """Complete an upload that has all its bytes."""
        with refusals():
            if isinstance(answer, reports.Upload) and answer.offset == length:
                answer = self.service.finish_report(device, answer.upload)
            if isinstance(answer, reports.Accepted):
                return self._accepted(device, answer)
        return Upload(upload=answer.upload, offset=answer.offset, chunk_bytes=answer.chunk_bytes)

    def _accepted(self, device: str, answer: reports.Accepted) -> Accepted:
        number, attempt, seconds = self.service.after_report(device, answer.round)
        return Accepted(
            round=number,
            attempt=attempt,
            sha256=answer.sha256,
            retry_after_seconds=min(seconds, 86_400.0),
        )

    def _assignment(self, given: Assigned) -> Assignment:
        now = self.service.time.now()
        latest = self.settings.selection_seconds + self.settings.report_seconds
        deadline = given.deadline_ms or now + milliseconds(latest)
        manifest, signature = self._manifest(given, now, deadline)
        return Assignment(
            run=self.name,
            round=given.number,
            attempt=given.attempt,
            assignment=given.assignment,
            kind=given.kind,
            manifest=manifest.decode(),
            signature=signature.hex(),
            codec=self.codec,
            lease_seconds=_lease(given.lease_seconds).lease_seconds,
            deadline_ms=deadline,
            client=given.client,
            seed=given.seed,
        )

    def _manifest(self, given: Assigned, now: int, deadline: int) -> tuple[bytes, bytes]:
        manifest = Manifest(
            version=given.version + 1,  # the initial model is version 0 here, and 1 on the wire
            previous=given.version,
            run=self.name,
            round=given.number,
            spec=ManifestSpec.of(self.spec),
            length_bytes=self.spec.num_bytes,
            sha256=given.model_sha256,
            plan=self.plan,
            created_ms=now,
            expires_ms=max(deadline, now) + _SKEW_MS,
        )
        return sign_manifest(self.key, manifest)


@contextlib.contextmanager
def refusals() -> Generator[None]:
    """The service's refusals in the words of the protocol."""
    try:
        yield
    except RefusedError as error:
        raise _in_words(error) from None


def _in_words(error: RefusedError) -> ProtocolError:
    return ProtocolError(_CODES.get(error.code, error.code), str(error))


def _lease(seconds: float) -> Lease:
    return Lease(lease_seconds=min(max(math.floor(seconds), 1), 604_800))


def answer(desk: Desk, device: str, message: Message, sha256: str) -> Message:
    """The answer to a message of an enrolled device."""
    match message:
        case CheckIn():
            return desk.check_in(device, message)
        case Progress():
            return desk.progress(device, message)
        case Report():
            return desk.report(device, message)
        case Evaluation():
            return desk.evaluation(device, message, sha256)
        case Failed():
            return desk.fail(device, message)
        case _:
            raise TypeError(f"no device sends {type(message).__name__}")
