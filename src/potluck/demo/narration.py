"""Collects and shows the events of `potluck demo serve`: live in a terminal, as lines elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

HEADER = ("round", "attempts", "reports", "drop-outs", "accuracy", "uplink", "seconds")

_SHOWN = 12  # the newest rounds, in a terminal


class PlannedCrash(NamedTuple):
    """A device that is to be killed in this round or the next in which it trains."""

    device: int
    round: int
    steps: int  # after so many local steps


class Narration:
    """The events so far, from news of the processes and answers of the server."""

    def __init__(self, crashes: Sequence[PlannedCrash]) -> None:
        self.crashes = {crash.device: crash for crash in crashes}
        self.doing: dict[int, str] = {}
        self.told: list[str] = []
        self.seconds: dict[int, float] = {}
        self.status: dict[str, Any] = {"rounds": [], "evaluations": [], "state": "running"}
        self._rounds: dict[int, dict[str, Any]] = {}
        self._accuracy: dict[int, float] = {}
        self._dropped: dict[int, int] = {}
        self._begun: dict[int, int] = {}
        self._last: dict[int, tuple[str, int]] = {}  # of a device: what it said, in which round

    def note(self, news: dict[str, Any]) -> int | None:
        """Takes news. Returns a device that was killed, and is to be started again."""
        device = news["device"]
        if news["is"] == "event":
            self.doing[device] = news["what"]
            self._last[device] = (news["what"], news["round"])
            if news["what"] == "training":
                self._begun.setdefault(news["round"], news["ms"])
            if news["what"] == "failed":
                self._drop(device, f"gave up: {news['detail']}")
        elif news["is"] == "ended" and news["code"] != 0:
            self.doing[device] = "killed"
            how = "was killed" if news["code"] < 0 else f"ended with code {news['code']}"
            self._drop(device, how)
            return device
        elif news["is"] == "ended":
            self.doing[device] = "finished"
        return None

    def note_status(self, status: dict[str, Any]) -> list[int]:
        """Takes the server's answer. Returns the rounds that are new."""
        self.status = status
        for told in status["evaluations"]:
            if told["kind"] == "central" and "accuracy" in told["metrics"]:
                self._accuracy[told["round"]] = told["metrics"]["accuracy"]
        rows = [row for row in status["rounds"] if row["kind"] == "train"]
        new = [row["number"] for row in rows if row["number"] not in self._rounds]
        self._rounds |= {row["number"]: row for row in rows}
        for number in new:
            begun = self._begun.get(number, self._rounds[number]["committed_ms"])
            self.seconds[number] = max(self._rounds[number]["committed_ms"] - begun, 0) / 1000
        return new

    @property
    def is_over(self) -> bool:
        return self.status["state"] == "finished"

    @property
    def is_judged(self) -> bool:
        """True if the last model was evaluated."""
        return self.status["round"] in {told["round"] for told in self.status["evaluations"]}

    def row(self, number: int) -> tuple[str, ...]:
        """A round's cells, as in `HEADER`."""
        from potluck.core.formats import format_bytes

        found = self._rounds[number]
        accuracy = self._accuracy.get(number)
        return (
            str(number),
            str(found["attempt"]),
            str(found["accepted"]),
            str(self._dropped.get(number, 0)),
            "–" if accuracy is None else f"{100 * accuracy:.1f} %",
            format_bytes(found["uplink_bytes"]),
            f"{self.seconds[number]:.2f}",
        )

    def rows(self) -> list[tuple[str, ...]]:
        """All committed rounds."""
        return [self.row(number) for number in sorted(self._rounds)]

    def line(self, number: int) -> str:
        """A round as a plain line."""
        cells = dict(zip(HEADER, self.row(number), strict=True))
        parts = [f"round {number:>3}", f"{cells['reports']} reports"]
        if cells["drop-outs"] != "0":
            parts.append(f"{cells['drop-outs']} dropped out")
        if cells["accuracy"] != "–":
            parts.append(f"accuracy {cells['accuracy']}")
        return "  ".join([*parts, f"up {cells['uplink']}", f"{cells['seconds']} s"])

    def _drop(self, device: int, how: str) -> None:
        what, round = self._last.get(device, ("", 0))
        if what in ("training", "trained", "failed", "evaluating"):
            self._dropped[round] = self._dropped.get(round, 0) + 1
        self.told.append(f"device {device} {how} in round {round}")


def show_narration(narration: Narration, devices: int, rounds: int) -> Generator[None, list[int]]:
    """Shows the events after each `send` of the rounds that are new."""
    from rich.console import Console

    console = Console(highlight=False)
    return _live(narration, rounds, console) if console.is_terminal else _lines(narration, devices)


def _lines(narration: Narration, devices: int) -> Generator[None, list[int]]:
    new: list[int] = []
    shown, enrolled, waiting = 0, False, list[int]()
    while True:
        new = yield
        if not enrolled and len(narration.doing) == devices:
            enrolled = True
            typer.echo(f"{devices} devices have enrolled")
        for line in narration.told[shown:]:
            typer.echo(line)
        shown = len(narration.told)
        waiting += new
        judged = {told["round"] for told in narration.status["evaluations"]}
        while waiting and (waiting[0] in judged or len(waiting) > 1):
            typer.echo(narration.line(waiting.pop(0)))


def _live(narration: Narration, rounds: int, console: Any) -> Generator[None, list[int]]:
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            yield
            live.update(_picture(narration, rounds), refresh=True)


_MARKS = {  # of what a device does
    "enrolled": "[dim]●[/]",
    "waiting": "[dim]●[/]",
    "training": "[yellow]●[/]",
    "evaluating": "[yellow]●[/]",
    "trained": "[cyan]●[/]",
    "accepted": "[green]●[/]",
    "finished": "[green]✓[/]",
    "failed": "[red]●[/]",
    "killed": "[red]✗[/]",
}


_KEY = "[dim]● waits[/]  [yellow]● trains[/]  [cyan]● sends[/]  [green]● done[/]  [red]✗ killed[/]"


def _picture(narration: Narration, rounds: int) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEADER, box=box.SIMPLE_HEAD, header_style="bold")
    for row in narration.rows()[-_SHOWN:]:
        table.add_row(*row)
    current: dict[str, Any] = narration.status.get("open") or {}
    now = "devices enrol"
    if narration.is_over:
        now = "the run is over"
    elif current:
        now = f"round {current['number']} of {rounds}"
        now += f", attempt {current['attempt']}" if current["attempt"] > 1 else ""
        now += f": {current['reported']} of {current['goal']} reports"
    marks = [_MARKS.get(narration.doing[device], "[dim]●[/]") for device in sorted(narration.doing)]
    parts = [table, now, Text.from_markup(" ".join(marks)), Text.from_markup(_KEY)]
    return Group(*parts, *narration.told[-3:])
