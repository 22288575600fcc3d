"""The lease of an assignment, checked between the steps of the work.

The work ends when the device is stopped, when the deadline has passed, or when the server says that
the slot is lost. It ends too when the plan asks for a charging device or a free network, and that
has changed. (Training itself keeps a device from being idle, so only check-ins ask for that.) A
third of the lease after the last request, it reports to the server that the work goes on.
"""

from __future__ import annotations

from typing import Literal

from potluck.config.plan import Need
from potluck.core import PotluckError, RefusedError
from potluck.device.clock import Clock
from potluck.device.connection import Connection
from potluck.device.eligibility import Sensor
from potluck.device.policy import Policy
from potluck.protocol import VERSION, Assignment, Lease, Progress

SENSE_SECONDS = 5.0
"""The seconds between two checks of the device's condition."""


class NotEligibleError(PotluckError):
    """The device is no longer in the condition that the plan asks for."""


class LeaseKeeper:
    """Keeps the lease of one assignment, and checks that the work may go on."""

    def __init__(
        self,
        assignment: Assignment,
        connection: Connection,
        clock: Clock,
        sensor: Sensor,
        policy: Policy,
    ) -> None:
        self._assignment = assignment
        self._connection = connection
        self._clock = clock
        self._sensor = sensor
        self._phase: Literal["download", "train", "evaluate"] = "download"
        if assignment.model is not None:  # there is nothing to download
            self._phase = assignment.kind
        self.needs: tuple[Need, ...] = ()
        self._next_word = clock.monotonic() + assignment.lease_seconds / 3
        self._next_look = clock.monotonic() + SENSE_SECONDS
        self._policy, self._end = policy, clock.monotonic() + policy.max_seconds

    def enter(self, phase: Literal["train", "evaluate"]) -> None:
        """Begins the next phase of the work."""
        if phase != self._phase:
            self._phase = phase
            self._tell()

    def check(self) -> None:
        """Returns if the work may go on.

        Raises:
            Stopped: the device is to stop.
            RefusedError: the slot is lost.
            NotEligibleError: the condition of the device has changed, or its owner's time is over.
        """
        self._clock.wait(0)
        now = self._clock.monotonic()
        if now >= self._end:
            raise NotEligibleError(
                f"the work on an assignment must end after max_seconds = "
                f"{self._policy.max_seconds}, got more to do. Raise it in the policy, or leave it."
            )
        if now >= self._next_look:
            self._next_look = now + SENSE_SECONDS
            self._check_condition()
        if now >= self._next_word:
            self._tell()

    def _check_condition(self) -> None:
        if self._connection.now_ms() >= self._assignment.deadline_ms:
            raise RefusedError("late", "the deadline of the round has passed. Check in again.")
        if self._policy.seconds_to_hours(self._clock.now_ms()):
            raise NotEligibleError(f"hours = {self._policy.hours} are over. Come back in them.")
        state = self._sensor()
        shown = {"charging": state.charging, "unmetered": state.unmetered}
        for need in self.needs:
            if shown.get(need) is False:
                raise NotEligibleError(
                    f"the device must be {need} while it trains, got {need}=False."
                )

    def _tell(self) -> None:
        message = Progress(assignment=self._assignment.assignment, phase=self._phase, fraction=0.0)
        lease = self._connection.ask(
            f"/v{VERSION}/progress", message, Lease, until_ms=self._assignment.deadline_ms
        )
        self._next_word = self._clock.monotonic() + lease.lease_seconds / 3
