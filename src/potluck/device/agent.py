"""A device's loop: check in, work, report, and check in again when the server says.

    while the run goes on:
        send the update that is owed, if there is one
        check in → wait, or an assignment:
            verify the manifest, download the model, train (or evaluate), keep the update on disk

`work` is a generator of events, so its caller decides what is shown or logged. A stop (`Clock`)
ends it at once. A finished update is kept and sent at the next start. An unfinished assignment is
given back.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator
from typing import Literal, NamedTuple

from potluck.config.plan import read_plan
from potluck.core import (
    ConfigError,
    DataError,
    DivergedError,
    ProtocolError,
    RefusedError,
    Spec,
    TaskError,
    Update,
    encode_update,
    update_bytes,
)
from potluck.device.clock import Clock, Stopped
from potluck.device.connection import Connection, Unanswered
from potluck.device.consent import Consent
from potluck.device.download import receive_model
from potluck.device.eligibility import Sensor
from potluck.device.folder import Enrolment, Home
from potluck.device.lease import LeaseKeeper, NotEligibleError
from potluck.device.outbox import Outbox, Owed
from potluck.device.policy import DeclinedError, Policy
from potluck.device.sent_log import DailyLimitError, Record
from potluck.device.trainer import Trainer
from potluck.device.trouble import Trouble
from potluck.device.upload import send_update
from potluck.protocol import (
    CODECS,
    FAILURE_REASONS,
    INLINE,
    INLINE_BYTES,
    VERSION,
    Accepted,
    Assignment,
    CheckIn,
    Evaluation,
    Failed,
    FailureReason,
    Finished,
    Manifest,
    Report,
    Wait,
    encode_inline,
    encode_message,
    verify_manifest,
)

OFFERS = (*CODECS, INLINE)
"""The codecs and forms that a device accepts."""
_OF_THE_DEVICE = ("unsigned", "unknown", "bad_signature", "clock", "replayed", "method", "media")
"""Refusals that say nothing about the device's work, which is kept."""
_UNFIT = (ConfigError, DataError, TaskError)
"""Errors with which another assignment would end, too."""
_OVER = ("late", "conflict")
_CHECK_IN = f"/v{VERSION}/check-in"


class Event(NamedTuple):
    """A step of the work that a person may want to see."""

    what: Literal[
        "enrolled",
        "waiting",
        "training",
        "evaluating",
        "trained",
        "accepted",
        "refused",
        "failed",
        "finished",
    ]
    round: int
    detail: str = ""


class Agent:
    """The loop of an enrolled device."""

    def __init__(
        self,
        home: Home,
        enrolment: Enrolment,
        connection: Connection,
        record: Record,
        trainer: Trainer,
        sensor: Sensor,
        clock: Clock,
        consent: Consent,
        policy: Policy,
        offers: tuple[str, ...] = OFFERS,
    ) -> None:
        self._home = home
        self._offers = offers
        self._enrolment = enrolment
        self._connection = connection
        self._record = record
        self._trainer = trainer
        self._sensor = sensor
        self._clock = clock
        self._consent, self._policy = consent, policy
        self._outbox = Outbox(home.folder / "outbox")
        self._trouble = Trouble(connection.backoff())

    def work(self) -> Generator[Event]:
        """Takes part until the run is over.

        Raises:
            RefusedError, OSError, …: a passing trouble (`trouble.PASSES`); begin again later.
            ConfigError, DataError: this device cannot train in this run.
            Stopped: the clock was stopped.
        """
        while True:
            try:
                if (yield from self._turn()):
                    return
            except DailyLimitError as error:
                yield Event("waiting", 0, str(error))
                self._clock.wait(error.seconds)

    def _turn(self) -> Generator[Event, None, bool]:
        """Checks in once and does what the answer asks for. Returns whether the run is over."""
        owed = self._outbox.owed()
        if owed is not None:
            yield from self._send(owed)
            return False
        self._check_now()
        message = CheckIn(
            run=self._enrolment.run,
            accepts=self._offers,
            runtime=self._trainer.runtime(),
            eligibility=self._sensor(),
        )
        answer = self._connection.ask(_CHECK_IN, message, Assignment, Wait, Finished)
        match answer:
            case Finished():
                yield Event("finished", answer.rounds)
                return True
            case Wait():
                yield Event("waiting", 0, answer.reason)
                self._clock.wait(answer.retry_after_seconds)
            case _:
                yield from self._work(answer)
        return False

    def _check_now(self) -> None:
        """Refuses if the owner does not let this device take on work now."""
        now = self._clock.now_ms()
        seconds = self._policy.seconds_to_hours(now)
        if seconds:
            raise DailyLimitError(f"outside of hours = {self._policy.hours}", seconds)
        self._record.check_rounds(now)
        self._record.check(now, 1)

    def _work(self, assignment: Assignment) -> Generator[Event]:
        keeper = LeaseKeeper(assignment, self._connection, self._clock, self._sensor, self._policy)
        try:
            yield from self._fulfil(assignment, keeper)
        except (RefusedError, DailyLimitError) as error:
            if isinstance(error, RefusedError):
                _raise_if_of_the_device(error)
            yield Event("refused", assignment.round, str(error))
            if isinstance(error, DailyLimitError):
                yield from self._give_back(assignment, "ineligible")
            elif error.code not in _OVER:
                self._trouble.wait(error)  # or the next check-in brings it again
        except (Stopped, GeneratorExit):  # here, or in the consumer of the events
            self._say_stopped(assignment)
            raise
        except (ProtocolError, *_UNFIT, DivergedError, NotEligibleError) as error:
            yield Event("failed", assignment.round, str(error))
            is_unfit = assignment.kind == "train" and isinstance(error, _UNFIT)
            if is_unfit or isinstance(error, DeclinedError):
                self._leave(assignment, _reason(error))
                raise  # another assignment would end in the same way
            passes = isinstance(error, ProtocolError)
            yield from self._give_back(assignment, _reason(error), error if passes else None)
        except (RuntimeError, OSError, MemoryError, ValueError) as error:  # of PyTorch, of a disk
            yield Event("failed", assignment.round, f"{type(error).__name__}: {error}")
            yield from self._give_back(assignment, _reason(error), error)
        else:
            self._trouble.over()

    def _fulfil(self, assignment: Assignment, keeper: LeaseKeeper) -> Generator[Event]:
        manifest = self._manifest(assignment)
        plan = read_plan(manifest.plan)
        keeper.needs = plan.needs
        self._consent.require(manifest, plan)
        if assignment.kind == "train":
            length = update_bytes(assignment.codec, manifest.spec.spec())
            self._record.check(self._clock.now_ms(), length)
        folder, inside = self._home.folder / "models", assignment.model
        received = receive_model(self._connection, manifest, folder, keeper.check, inside)
        spec = manifest.spec.spec()
        if assignment.kind == "evaluate":
            yield Event("evaluating", assignment.round)
            keeper.enter("evaluate")
            sums = self._trainer.evaluate(plan, spec, received, check=keeper.check)
            yield from self._send_evaluation(assignment, dict(sums))
            return
        yield Event("training", assignment.round)
        keeper.enter("train")
        update = self._trainer.train(
            plan,
            spec,
            received,
            seed=assignment.seed,
            round=assignment.round,
            client=assignment.client,
            check=keeper.check,
        )
        report = self._keep(assignment, self._policy.bound(update), spec)
        yield Event("trained", assignment.round, f"loss {report.loss:.4f}")

    def _manifest(self, assignment: Assignment) -> Manifest:
        epoch, version = self._home.manifest
        manifest = verify_manifest(
            assignment.manifest.encode(),
            bytes.fromhex(assignment.signature),
            bytes.fromhex(self._enrolment.server_key),
            run=self._enrolment.run,
            now_ms=self._connection.now_ms(),
            last_seen_version=version,
            last_seen_epoch=epoch,
        )
        if (manifest.run, manifest.round) != (assignment.run, assignment.round):
            raise ProtocolError(
                "manifest_foreign",
                f"the manifest must be of run={assignment.run} and round={assignment.round}, as "
                f"the assignment says, got run={manifest.run} and round={manifest.round}.",
            )
        self._home.accept_manifest(manifest.version, manifest.epoch)
        signed = (assignment.manifest, assignment.signature)
        self._record.add_manifest(self._clock.now_ms(), *signed, assignment.assignment)
        self._home.keep_audit(manifest.audit)
        return manifest

    def _keep(self, assignment: Assignment, update: Update, spec: Spec) -> Report:
        """Puts an update into the outbox.

        A stop does not lose what was trained, nor does a disk that is full for a while.
        """
        while True:
            try:
                with self._clock.hold():
                    return self._put(assignment, update, spec)
            except OSError as error:
                if self._connection.now_ms() >= assignment.deadline_ms:
                    raise
                self._trouble.wait(error)

    def _put(self, assignment: Assignment, update: Update, spec: Spec) -> Report:
        encoded = encode_update(
            update.delta,
            assignment.codec,
            self._outbox.residual(spec.num_parameters),
            seed=assignment.seed,
            round=assignment.round,
            client=assignment.client,
            num_statistics=spec.dim - spec.num_parameters,
        )
        is_inside = assignment.model is not None and len(encoded.body) <= INLINE_BYTES
        report = Report(
            assignment=assignment.assignment,
            round=assignment.round,
            attempt=assignment.attempt,
            codec=assignment.codec,
            length_bytes=len(encoded.body),
            sha256=hashlib.sha256(encoded.body).hexdigest(),
            weight=update.weight,
            loss=update.loss,
            num_steps=update.num_steps,
            metrics={},
            update=encode_inline(encoded.body) if is_inside else None,
        )
        self._record.keep_update(report.sha256, encoded.body)
        self._outbox.put(report, encoded.body, encoded.residual)
        return report

    def _send(self, owed: Owed) -> Generator[Event]:
        """Sends a finished update. Whatever the answer, it is then removed."""
        round = owed.report.round
        try:
            answer = send_update(self._connection, owed, lambda: self._clock.wait(0))
        except RefusedError as error:
            _raise_if_of_the_device(error)
            self._outbox.drop()
            yield Event("refused", round, str(error))
            return
        self._outbox.accept()
        attempt = f"attempt {answer.attempt}" if answer.attempt > 1 else ""
        yield Event("accepted", round, attempt)
        self._clock.wait(answer.retry_after_seconds)

    def _send_evaluation(
        self, assignment: Assignment, metrics: dict[str, tuple[float, int]]
    ) -> Generator[Event]:
        message = Evaluation(
            assignment=assignment.assignment,
            round=assignment.round,
            attempt=assignment.attempt,
            metrics=metrics,
        )
        path, until = f"/v{VERSION}/evaluation", assignment.deadline_ms
        answer = self._connection.ask(path, message, Accepted, until_ms=until)
        yield Event("accepted", assignment.round)
        self._clock.wait(answer.retry_after_seconds)

    def _give_back(
        self, assignment: Assignment, reason: FailureReason, error: Exception | None = None
    ) -> Generator[Event]:
        """Tells the server why this device cannot do its work, and waits as long as the answer
        says.

        With an error that may come again it waits longer each time.
        """
        message = Failed(assignment=assignment.assignment, reason=reason)
        try:
            until = assignment.deadline_ms
            answer = self._connection.ask(f"/v{VERSION}/failure", message, Wait, until_ms=until)
        except RefusedError as refused:
            _raise_if_of_the_device(refused)
            yield Event("refused", assignment.round, str(refused))
            self._trouble.wait(error or refused)
            return
        seconds = max(answer.retry_after_seconds, 1.0)
        if error is None:
            self._clock.wait(seconds)
        else:
            self._trouble.wait(error, seconds)

    def _leave(self, assignment: Assignment, reason: FailureReason) -> None:
        """Tells the server not to wait for this device."""
        message = Failed(assignment=assignment.assignment, reason=reason)
        until = assignment.deadline_ms
        # A refusal means that the round is over and does not wait.
        with contextlib.suppress(RefusedError, DailyLimitError):
            self._connection.ask(f"/v{VERSION}/failure", message, Wait, until_ms=until)

    def _say_stopped(self, assignment: Assignment) -> None:
        """Tells the server once that the slot is free for another device."""
        if self._outbox.owed() is not None:
            return
        message = Failed(assignment=assignment.assignment, reason="stopped")
        try:
            self._connection.hurry()
            body = encode_message(message)
            self._connection.call_once("POST", f"/v{VERSION}/failure", body, Wait)
        except (Unanswered, RefusedError, DailyLimitError):
            pass  # its lease expires


def _raise_if_of_the_device(error: RefusedError) -> None:
    if error.code in _OF_THE_DEVICE:
        raise error


def _reason(error: BaseException) -> FailureReason:
    match error:
        case ProtocolError() if error.code in FAILURE_REASONS:
            return error.code
        case ProtocolError():
            return "diverged" if error.code == "not_finite" else "error"
        case NotEligibleError():
            return "ineligible"
        case DeclinedError():
            return "declined"
        case ConfigError() | TaskError():
            return "unsupported"
        case DataError():
            return "no_data"
        case DivergedError():
            return "diverged"
        case MemoryError():
            return "out_of_memory"
        case RuntimeError() if "memory" in str(error):
            return "out_of_memory"
        case _:
            return "error"
