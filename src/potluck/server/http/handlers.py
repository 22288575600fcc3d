"""The handlers of devices' messages to the run that is served.

Everything here is synchronous and without sockets. A refusal is a `RefusedError`, or a
`ProtocolError` where the message cannot be right. Another device's assignment is answered as an
unknown one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from potluck.config.experiment import Experiment
from potluck.config.round_settings import RoundSettings
from potluck.core import CodedError, RefusedError, Spec
from potluck.protocol import (
    INLINE,
    Accepted,
    Assignment,
    CheckIn,
    Claim,
    Codec,
    Enrol,
    Enrolled,
    Evaluation,
    Failed,
    Finished,
    Manifest,
    ManifestSpec,
    Message,
    Preview,
    Previewed,
    Progress,
    Report,
    Wait,
    encode_inline,
    public_key,
    sign_manifest,
)
from potluck.server.rounds import acceptance, check_in, enrolment, inline_reports, leases, uploads
from potluck.server.rounds.check_in import Assigned, CheckInRequest
from potluck.server.service import Service
from potluck.server.storage import audit
from potluck.server.storage.stored_run import run_of, settings_of
from potluck.server.storage.vectors import find_version

_SKEW_MS = 300_000  # a device's clock may be so late: its manifests expire later


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRun:
    """A run that is served, with its key and settings."""

    service: Service
    id: str
    key: bytes
    """The private key that signs manifests."""
    spec: Spec
    plan: dict[str, Any]
    experiment: Experiment
    settings: RoundSettings
    """The values when this process began to serve the run."""
    kept: list[str]
    """The keys whose values in the run differ from its file: each one in words."""

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def codec(self) -> Codec:
        return self.experiment.run.codec or "float32"

    def preview(self, message: Preview) -> Previewed:
        """Returns the run as it stands, for the holder of a token that could be used now."""
        key = bytes.fromhex(message.public_key)
        enrolment.check_token(self.service, message.token, key, into=self.id)
        with self.service.database.read() as db:
            run = run_of(db, self.id)
        model, now = find_version(self.service, self.id, run.version), self.service.now()
        num_rounds = settings_of(run.settings).num_rounds
        place = (run.epoch, num_rounds, run.round, model.version, model.sha256)
        manifest, signature = self._signed(*place, now, now)
        return Previewed(manifest=manifest.decode(), signature=signature.hex(), server_time_ms=now)

    def enrol(self, message: Enrol) -> Enrolled:
        """Takes in the device that owns the message's key."""
        enrolled = enrolment.enrol(
            self.service,
            message.token,
            bytes.fromhex(message.public_key),
            name=message.name or "",
            device_class=message.device_class,
            into=self.id,
        )
        return Enrolled(
            device=enrolled.id,
            run=self.name,
            server_key=public_key(self.key).hex(),
            server_time_ms=self.service.now(),
        )

    def check_ins(
        self, asked: Sequence[tuple[str, int | None, CheckIn]]
    ) -> list[Assignment | Wait | Finished | CodedError]:
        """Answers many check-ins at once: work, a time to come back, the end, or a refusal.

        The sequence number of its request comes with each and is noted here; None: it has been.

        With the sequence number of its request, which is noted here; None where it has been.
        """
        early = [self._early(device, message) for device, _, message in asked]
        shown = [
            CheckInRequest(device, None if told else message.eligibility, sequence)
            for told, (device, sequence, message) in zip(early, asked, strict=True)
        ]
        signed: dict[str, tuple[bytes, bytes]] = {}  # one manifest for all who are in a round
        answers: list[Assignment | Wait | Finished | CodedError] = []
        for n, given in enumerate(check_in.check_ins(self.service, shown)):
            told = given or early[n]
            assert told is not None
            if isinstance(told, Assigned):
                told = self._assignment(told, signed, INLINE in asked[n][2].accepts)
            answers.append(told)
        return answers

    def _early(self, device: str, message: CheckIn) -> Wait | RefusedError | None:
        """Returns an answer that does not depend on the round, if there is one."""
        if message.run != self.name:
            return RefusedError(
                "not_found", f"the run must be {self.name}, got run={message.run}. Enrol in it."
            )
        if self.codec in message.accepts:
            return None
        try:
            return check_in.wait(self.service, device, "unsupported")
        except RefusedError as error:
            return error

    def accept_batch(self, came: Sequence[tuple[Claim, Report]]) -> list[Accepted | CodedError]:
        """Answers many reports with their updates inside, each one with its result or a refusal.

        The sequence numbers of their requests are noted here, and not before.
        """
        return inline_reports.accept_batch(self.service, came, self.codec)

    def answer(self, device: str, message: Message, sha256: str) -> Message:
        """Returns the answer to a message of an enrolled device; `sha256` is that of its bytes."""
        match message:
            case Progress():
                return leases.extend_lease(self.service, device, message.assignment)
            case Report():
                return uploads.begin_report(self.service, device, message, self.codec)
            case Evaluation():
                return acceptance.report_metrics(self.service, device, message, sha256)
            case Failed():
                return leases.fail(self.service, device, message.assignment, message.reason)
            case _:
                raise TypeError(f"no device sends {type(message).__name__}")

    def _assignment(
        self, given: Assigned, signed: dict[str, tuple[bytes, bytes]], inside: bool
    ) -> Assignment:
        now, deadline = self.service.now(), given.deadline_ms
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
            lease_seconds=given.lease_seconds,
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
        with self.service.database.read() as db:
            _, head = audit.head(db)
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
            audit=head,
        )
        return sign_manifest(self.key, manifest)
