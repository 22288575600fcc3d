"""Whether a device may go on with its assignment, looked at between the steps of its work.

It may not when it is stopped, when the deadline has passed, when the server says that the slot is
lost, or when it is no longer charging or on a free network where the plan asks for that. (Its own
training keeps it from being idle, so that is asked for at check-ins only.) A third of the lease
after the last word, the server is told that the work goes on.
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
"""How often the condition of the device is looked at."""


class NotEligibleError(PotluckError):
    """The device is no longer in the condition that the plan asks for."""


class LeaseKeeper:
    """Looks after one assignment."""

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
        """The next phase of the work begins."""
        if phase != self._phase:
            self._phase = phase
            self._tell()

    def check(self) -> None:
        """Go on, or not.

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
            self._look()
        if now >= self._next_word:
            self._tell()

    def _look(self) -> None:
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
