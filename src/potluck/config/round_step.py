"""Decides the next step of a round of devices, on the server and in a simulation.

selecting    until the slots are taken, or a deadline
training     until the goal is reached; at its deadline the round counts with the minimum
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Step = Literal["train", "close", "abandon", "wait"]


class Phase(NamedTuple):
    """The goal, slots and deadlines of an open round; times are in any unit."""

    goal: int  # reports that close it
    minimum: int  # reports without which it is abandoned
    slots: int  # devices that it selects
    selection_deadline: float | None
    report_deadline: float | None = None  # None: it is selecting
    is_drawn: bool = False  # whether certain devices are invited, and no other may come


class Counts(NamedTuple):
    """The devices of a round by what they do."""

    active: int
    reported: int
    taken: int  # slots that were given, also to devices that failed or were silent
    absent: int  # invited by name, and not expected any more; 0 where any device may come


def due(phase: Phase, counts: Counts, now: float) -> tuple[Step, str]:
    """Returns the next step of an open round, and the reason."""
    if counts.reported >= max(phase.goal, 1):
        return "close", "the goal is reached"
    nobody_left = counts.absent + counts.reported >= phase.slots and counts.active == 0
    is_late = phase.report_deadline is not None and now >= phase.report_deadline
    if is_late or (nobody_left and phase.is_drawn):
        if counts.reported >= phase.minimum:
            return "close", "the deadline passed"
        why = "no device is left" if not is_late else "the report deadline passed"
        return "abandon", f"{why}: {counts.reported} reports of at least {phase.minimum}"
    if phase.report_deadline is None:
        selected = counts.active + counts.reported
        if max(counts.taken, selected + counts.absent) >= phase.slots:
            return "train", "all slots were taken"
        if phase.selection_deadline is not None and now >= phase.selection_deadline:
            if selected >= phase.minimum:
                return "train", "the selection deadline passed"
            told = f"{selected} devices of at least {phase.minimum}"
            return "abandon", f"the selection deadline passed: {told}"
    return "wait", ""
