"""The server's lines on a terminal: one for each round, and the state of the run."""

from __future__ import annotations

from typing import Any

from potluck.server.dashboard.queries import Overview, Past, RoundRow, read_mark, read_overview
from potluck.server.service import Service


class Lines:
    """Polls one run for new lines; one thread at a time.

    A round is shown when it was evaluated, so that one line has all of it.
    """

    def __init__(self, service: Service, run: str, *, is_evaluated: bool = True) -> None:
        self._service, self._run, self._is_evaluated = service, run, is_evaluated
        self._past = Past()
        self._mark: tuple[Any, ...] | None = None
        self._state = ""
        self._shown: int | None = None  # of the rounds that are over; None before the first poll

    def poll(self) -> list[str]:
        """Returns the lines since the last poll, or how things stand."""
        with self._service.database.read() as db:
            mark = read_mark(db, self._run)
            if mark == self._mark:
                return []
            seen = read_overview(db, self._run, self._service.now(), self._past)
        waiting = {n for n, _ in self._service.pending_evaluations(self._run)}
        is_first, self._mark = self._shown is None, mark
        told = self._rounds(seen, waiting if self._is_evaluated else set())
        if is_first:
            told = [f"going on after round {seen.committed}"] if seen.committed else []
        is_told = seen.state != "finished" or not waiting  # the last line of all
        if seen.state != self._state and (is_told or not self._is_evaluated):
            self._state = seen.state
            told += _run_line(seen, is_first)
        return told

    def _rounds(self, seen: Overview, waiting: set[int]) -> list[str]:
        told: list[str] = []
        self._shown = self._shown or 0
        for row in seen.over[self._shown :]:
            if row.state == "COMMITTED" and row.kind == "train" and row.number in waiting:
                break
            self._shown += 1
            told.append(round_line(row, seen.num_rounds))
        return told


def round_line(row: RoundRow, num_rounds: int) -> str:
    """Returns a round that is over, in one line."""
    width = len(str(num_rounds))
    name = f"round {row.number:>{width}}/{num_rounds}"
    if row.kind == "evaluate":
        name += ", evaluated on the devices"
    if row.state == "ABANDONED":
        return f"{name}  abandoned and tried again: {row.reason}"
    devices = f"{row.tally.reported} of {row.goal} device{'s' * (row.goal != 1)}"
    values = {} if row.loss is None else {"train loss": row.loss}
    values |= row.metrics
    scores = "  ".join(f"{metric} {_said(value)}" for metric, value in values.items())
    seconds = ((row.closed_ms or row.opened_ms) - row.opened_ms) / 1000
    return f"{name}  {devices}  {scores}  {seconds:.1f} s"


def _said(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _run_line(seen: Overview, is_first: bool) -> list[str]:
    match seen.state:
        case "paused":
            return [f"paused: {seen.reason}. Go on with: potluck resume"]
        case "finished":
            told = "finished: potluck export model.safetensors writes the model; Ctrl-C ends the"
            return [f"{told} server, when all devices have heard it"]
        case _:
            return [] if is_first else ["resumed"]
