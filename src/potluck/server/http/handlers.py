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

from potluck.config.experiment import Experiment
from potluck.config.round_settings import RoundSettings
from potluck.core import ProtocolError, RefusedError, Spec, update_bytes
from potluck.protocol import (
    INLINE,
    Accepted,
    Assignment,
    CheckIn,
    Claim,
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
    Preview,
    Previewed,
    Progress,
    Report,
    Upload,
    Wait,
    decode_inline,
    encode_inline,
    public_key,
    sign_manifest,
)
from potluck.server.rounds import check_in as look
from potluck.server.rounds import leases, uploads
from potluck.server.rounds.check_in import Asked, Assigned, Attributes
from potluck.server.rounds.inline_reports import Arrival, Outcome
from potluck.server.service import Service
from potluck.server.storage.stored_run import settings_of

_CODES: dict[str, ErrorCode] = {
    "unknown": "not_found",
    "revoked": "unknown",
    "bad_update": "bounds",
    "incomplete": "offset",
}
_REASONS: dict[look.WaitReason, Any] = {
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
    key: bytes
    """Signs manifests."""
    spec: Spec
    plan: dict[str, Any]
    experiment: Experiment
    settings: RoundSettings
    """As they were when this process began to serve the run."""
    kept: list[str]
    """Keys of which the run has other values than its file: each one in words."""

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def codec(self) -> Codec:
        return self.experiment.run.codec or "float32"

    def preview(self, message: Preview) -> Previewed:
        """The run as it stands, for the holder of a token that could be used now."""
        with refusals():
            key = bytes.fromhex(message.public_key)
            self.service.check_token(message.token, key, into=self.run)
            run, model = self.service.newest(self.run)
        now = self.service.time.now()
        num_rounds = settings_of(run.settings).num_rounds
        place = (run.epoch, num_rounds, run.round, model.version, model.sha256)
        manifest, signature = self._signed(*place, now, now)
        return Previewed(manifest=manifest.decode(), signature=signature.hex(), server_time_ms=now)

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
        (given,) = self.check_ins([(device, None, message)])
        if isinstance(given, Exception):
            raise given
        return given

    def check_ins(
        self, asked: Sequence[tuple[str, int | None, CheckIn]]
    ) -> list[Assignment | Wait | Finished | Exception]:
        """Many check-ins at once: for each one its answer, or the ProtocolError it is refused.

        With the sequence number of its request, which is noted here; None where it has been.
        """
        early = [self._early(device, message) for device, _, message in asked]
        shown = [
            Asked(device, None if told else _attributes(message), sequence)
            for told, (device, sequence, message) in zip(early, asked, strict=True)
        ]
        signed: dict[str, tuple[bytes, bytes]] = {}  # one manifest for all who are in a round
        answers: list[Assignment | Wait | Finished | Exception] = []
        for n, given in enumerate(self.service.check_ins(shown)):
            told = early[n]
            if given is None and told is not None:
                answers.append(told)
            elif given is not None:
                answers.append(self._told(given, signed, INLINE in asked[n][2].accepts))
        return answers

    def _early(self, device: str, message: CheckIn) -> Wait | ProtocolError | None:
        """What is answered whatever the server knows of the round."""
        if message.run != self.name:
            return ProtocolError(
                "not_found", f"the run must be {self.name}, got run={message.run}. Enrol in it."
            )
        if self.codec in message.accepts:
            return None
        try:
            return Wait(retry_after_seconds=self.come_back(device), reason="unsupported")
        except RefusedError as error:
            return _in_words(error)

    def _told(
        self, given: look.Given, signed: dict[str, tuple[bytes, bytes]], inside: bool
    ) -> Assignment | Wait | Finished | ProtocolError:
        match given:
            case RefusedError():
                return _in_words(given)
            case look.Finished():
                return Finished(run=self.name, rounds=given.version)
            case look.Wait():
                seconds = min(given.retry_after_seconds, 86_400.0)
                return Wait(retry_after_seconds=seconds, reason=_REASONS[given.reason])
            case Assigned():
                return self._assignment(given, signed, inside)

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
            self._check_form(message)
            claims = _claims(message)
            answer = self.service.begin_report(device, message.assignment, claims)
        return self._settle(device, answer, message.length_bytes)

    def take_in(self, came: Sequence[tuple[Claim, Report]]) -> list[Accepted | Exception]:
        """Many reports with their updates inside: for each one its answer, or the ProtocolError
        it is refused with. Their requests' sequence numbers are noted here, and not before."""
        outcomes = self.service.take_in([self._arrival(*one) for one in came])
        return [self._taken(outcome) for outcome in outcomes]

    def _arrival(self, claim: Claim, message: Report) -> Arrival:
        body, fault = b"", None
        try:
            self._check_form(message)
            body = decode_inline(message.update or "", message.length_bytes)
        except ProtocolError as error:
            fault = error
        return Arrival(
            device=claim.device,
            sequence=claim.sequence,
            assignment=message.assignment,
            round=message.round,
            attempt=message.attempt,
            claims=_claims(message),
            body=body,
            fault=fault,
        )

    def _taken(self, outcome: Outcome) -> Accepted | ProtocolError:
        if isinstance(outcome, RefusedError):
            return _in_words(outcome)
        if isinstance(outcome, ProtocolError):
            return outcome
        return Accepted(
            round=outcome.round,
            attempt=outcome.attempt,
            sha256=outcome.sha256,
            retry_after_seconds=min(outcome.retry_after_seconds, 86_400.0),
        )

    def _check_form(self, message: Report) -> None:
        expected = update_bytes(self.codec, self.spec)
        if message.codec != self.codec:
            raise ProtocolError("malformed", f"codec must be {self.codec}, got {message.codec}")
        if message.length_bytes != expected:
            raise ProtocolError(
                "wrong_length",
                f"an update must have {expected} bytes, got length_bytes="
                f"{message.length_bytes}. Encode the whole vector.",
            )

    def upload(self, device: str, upload: str) -> Upload | Accepted:
        """Where an upload stands."""
        with refusals():
            answer, length = self.service.find_report(device, upload)
        return self._settle(device, answer, length)

    def stands(self, device: str, upload: str) -> tuple[uploads.Upload | uploads.Accepted, int]:
        """Where an upload stands, and how long it will be: before a chunk's body is read."""
        with refusals():
            return self.service.find_report(device, upload)

    def chunk(
        self,
        device: str,
        upload: str,
        offset: int,
        data: bytes | bytearray,
        stood: tuple[uploads.Upload | uploads.Accepted, int],
    ) -> Upload | Accepted:
        """A part of an update that `stood` so; the last part completes it."""
        answer, length = stood
        with refusals():
            if isinstance(answer, uploads.Accepted):
                return self._accepted(device, answer)
            try:
                answer = self.service.append_chunk(device, upload, offset, data)
            except RefusedError:  # or was it accepted while the body came?
                answer, _ = self.service.find_report(device, upload)
                if isinstance(answer, uploads.Accepted):
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
        leases.check_place(found, message.round, message.attempt)

    def _settle(
        self, device: str, answer: uploads.Upload | uploads.Accepted, length: int
    ) -> Upload | Accepted:
        """Complete an upload that has all its bytes."""
        with refusals():
            if isinstance(answer, uploads.Upload) and answer.offset == length:
                answer = self.service.finish_report(device, answer.upload)
            if isinstance(answer, uploads.Accepted):
                return self._accepted(device, answer)
        return Upload(upload=answer.upload, offset=answer.offset, chunk_bytes=answer.chunk_bytes)

    def _accepted(self, device: str, answer: uploads.Accepted) -> Accepted:
        number, attempt, seconds = self.service.after_report(device, answer.round)
        return Accepted(
            round=number,
            attempt=attempt,
            sha256=answer.sha256,
            retry_after_seconds=min(seconds, 86_400.0),
        )

    def _assignment(
        self, given: Assigned, signed: dict[str, tuple[bytes, bytes]], inside: bool
    ) -> Assignment:
        now, deadline = self.service.time.now(), given.deadline_ms
        if given.round not in signed:
            run = (given.epoch, given.num_rounds)
            place = (given.number, given.version, given.model_sha256)
            signed[given.round] = self._signed(*run, *place, now, deadline)
        manifest, signature = signed[given.round]
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
            model=encode_inline(given.model) if inside and given.model is not None else None,
        )

    def _signed(
        self,
        epoch: int,
        num_rounds: int,
        round: int,
        version: int,
        sha256: str,
        now: int,
        deadline: int,
    ) -> tuple[bytes, bytes]:
        manifest = Manifest(
            version=version + 1,  # the initial model is version 0 here, and 1 on the wire
            previous=version,
            run=self.name,
            round=round,
            spec=ManifestSpec.of(self.spec),
            length_bytes=self.spec.num_bytes,
            sha256=sha256,
            plan=self.plan,
            rounds=num_rounds,
            created_ms=now,
            expires_ms=max(deadline, now) + _SKEW_MS,
            epoch=epoch,
            audit=self.service.audit_head()[1],
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


def _attributes(message: CheckIn) -> Attributes:
    told = message.eligibility
    return Attributes(
        charging=told.charging,
        idle=told.idle,
        unmetered=told.unmetered,
        free_memory_bytes=told.free_memory_bytes,
    )


def _claims(message: Report) -> uploads.Claims:
    return uploads.Claims(
        sha256=message.sha256,
        num_bytes=message.length_bytes,
        weight=message.weight,
        loss=message.loss,
        num_steps=message.num_steps,
        codec=message.codec,
    )


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
