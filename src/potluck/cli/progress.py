"""Shows the progress and the outcome of a run.

In a terminal, progress is a live bar; elsewhere, plain lines. Both are shown round by round from
the caller's loop.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from potluck.config.algorithm_section import AlgorithmSection
from potluck.config.experiment import Experiment
from potluck.core import is_result, main_metric
from potluck.core.formats import format_bytes, format_score, format_seconds
from potluck.engine import FederatedMetric
from potluck.simulation import Round
from potluck.simulation.runs.cost import Cost
from potluck.simulation.runs.per_client import worst
from potluck.simulation.runs.report import format_on_grid, format_rounds

_LINE_SECONDS = 1.0  # at most one line in this time
_CLIENTS_SHOWN, _WORST_SHOWN = 200, 20  # of a federated evaluation; a file has all


class Tally(NamedTuple):
    """The counts and scores of a run after some round."""

    number: int = 0
    loss: float | None = None  # the cohort's training loss
    metrics: Mapping[str, float | None] | None = None  # the latest; None: no result
    uplink_bytes: int = 0  # of all rounds
    failures: int = 0
    virtual_seconds: float | None = None  # of simulated devices

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> Tally:
        """The tally of lines of `rounds.jsonl`."""
        if not lines:
            return cls()
        return cls(
            number=lines[-1]["round"],
            loss=lines[-1]["loss"],
            metrics=next((line["metrics"] for line in reversed(lines) if line["metrics"]), None),
            uplink_bytes=sum(line["uplink_bytes"] for line in lines),
            failures=sum(len(line["failures"]) for line in lines),
            virtual_seconds=lines[-1].get("virtual_seconds"),
        )

    def after(self, round: Round) -> Tally:
        """The tally one round later."""
        return Tally(
            number=round.number,
            loss=None if round.number == 0 else round.loss,
            metrics=round.metrics or self.metrics,
            uplink_bytes=self.uplink_bytes + round.uplink_bytes,
            failures=self.failures + len(round.failures),
            virtual_seconds=None if round.virtual is None else round.virtual.seconds,
        )

    def __str__(self) -> str:
        parts: list[str] = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.metrics is not None:
            metric = main_metric(self.metrics)
            score = self.metrics[metric]
            name = "test loss" if metric == "loss" else metric
            parts.append(f"{name} {format_score(score) if is_result(score) else 'no result'}")
        parts.append(f"up {format_bytes(self.uplink_bytes)}")
        if self.virtual_seconds is not None:
            parts.append(f"virtual {format_seconds(self.virtual_seconds)}")
        if self.failures:
            parts.append(f"{self.failures} failed")
        return "  ".join(parts)


class Clients:
    """The progress within a round, reported by an executor and shown by a bar, if any."""

    def __init__(self) -> None:
        self.show: Callable[[str], None] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.show is not None:
            self.show(f"{done}/{total} clients")


class _Tallies:
    """Returns the tally after each round, and its executor where that is new."""

    def __init__(self, history: Sequence[Mapping[str, Any]]) -> None:
        self._history = history
        self._tally: Tally | None = None
        self._executor = ""

    def after(self, round: Round) -> tuple[Tally, str | None]:
        tally = self._tally
        if tally is None:  # a killed run repeats the rounds after its last checkpoint
            tally = Tally.of([line for line in self._history if line["round"] < round.number])
        self._tally = tally.after(round)
        if round.executor in ("", self._executor):
            return self._tally, None
        self._executor = round.executor
        return self._tally, f"executor: {round.executor}"


def progress(
    num_rounds: int, history: Sequence[Mapping[str, Any]], clients: Clients | None = None
) -> Bar | ProgressLines:
    """Makes the display of rounds: a live bar in a terminal, and plain lines elsewhere.

    Args:
        history: the lines of `rounds.jsonl` before this attempt.
        clients: the executor's progress within the round.
    """
    console = Console()
    if console.is_terminal:
        return Bar(num_rounds, history, console, clients)
    return ProgressLines(num_rounds, history, sys.stdout)


class Bar:
    """Shows rounds by a live bar inside its `with` block; see `progress`."""

    def __init__(
        self,
        num_rounds: int,
        history: Sequence[Mapping[str, Any]],
        console: Console,
        clients: Clients | None = None,
    ) -> None:
        columns = (
            TextColumn("round {task.completed:.0f}/{task.total:.0f}", markup=False),
            TextColumn("{task.fields[clients]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        self._tallies, tally = _Tallies(history), Tally.of(history)
        self._bar = Progress(*columns, console=console, expand=True, speed_estimate_period=120)
        self._task = self._bar.add_task(
            str(tally), total=num_rounds, completed=tally.number, clients=""
        )
        if clients is not None:
            clients.show = lambda words: self._bar.update(self._task, clients=words)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, round: Round) -> None:
        """Shows a round that is done."""
        tally, executor = self._tallies.after(round)
        if executor is not None:
            self._bar.console.print(executor, markup=False, highlight=False)
        self._bar.update(self._task, completed=tally.number, description=str(tally))


class ProgressLines:
    """Writes a line after an evaluated round: the first and the last, and between them at most one
    a second; see `progress`."""

    def __init__(
        self,
        num_rounds: int,
        history: Sequence[Mapping[str, Any]],
        out: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_rounds, self._tallies = num_rounds, _Tallies(history)
        self._out, self._clock = out, clock
        self._printed = -math.inf
        self._pending: str | None = None
        self._recent: deque[float] = deque(maxlen=20)  # seconds of a round

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._pending is not None:
            self._write(self._pending)

    def show(self, round: Round) -> None:
        """Shows a round that is done."""
        tally, executor = self._tallies.after(round)
        if executor is not None:
            self._write(executor)
        now = self._clock()
        self._recent += [round.seconds] * (round.number > 1)  # the first of all is no measure
        if round.metrics is None:
            return
        width = len(str(self._num_rounds))
        self._pending = f"round {round.number:>{width}}/{self._num_rounds}  {tally}"
        if now - self._printed >= _LINE_SECONDS:
            left = _time_left(self._recent, self._num_rounds - round.number)
            self._write(self._pending + left)
            self._printed, self._pending = now, None

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def summary(experiment: Experiment) -> list[tuple[str, str]]:
    """Returns the model, algorithm and run as names and values; the data are described
    elsewhere."""
    return [
        ("experiment", experiment.name),
        *_algorithm_rows(experiment.algorithm),
        ("model", experiment.task.model),
        ("partition", experiment.partition.kind),
    ]


def _algorithm_rows(algorithm: AlgorithmSection) -> list[tuple[str, str]]:
    """The algorithm, and what was chosen beyond its defaults."""
    fixed = {"local_epochs", "batch_size"} if algorithm.name == "fedsgd" else set[str]()
    values = algorithm.model_dump(exclude=fixed, exclude_none=True)
    tables = [key for key, value in values.items() if isinstance(value, dict)]
    numbers = {key: value for key, value in values.items() if key not in tables}
    rows = [("algorithm", _named_settings(numbers))]
    for key in tables:
        if getattr(algorithm, key) != type(algorithm).model_fields[key].default:
            rows.append((key, _named_settings(values[key])))
    return rows


def _named_settings(settings: Mapping[str, Any]) -> str:
    """adam, server_lr 0.01, …; a schedule after a warm-up comes last."""

    def told(value: Any) -> str:
        if isinstance(value, dict):
            return _named_settings(cast("dict[str, Any]", value))
        return value if isinstance(value, str) else f"{value:g}"

    parts = [f"{key} {told(value)}" for key, value in settings.items() if key != "name"]
    return ", ".join([str(settings["name"]), *parts])


def outcome(cost: Cost) -> list[tuple[str, str]]:
    """Returns the results of a run, as names and values."""
    uplink, downlink = (format_bytes(number) for number in cost.bytes)
    pairs = [
        ("rounds", str(cost.rounds)),
        (
            cost.metric,
            f"best {format_score(cost.best)} in round {cost.best_round}, "
            f"final {format_score(cost.final)}"
            if cost.curve
            else "no result: no evaluation gave a finite number",
        ),
        ("uplink, downlink", f"{uplink}, {downlink}"),
        ("wall time", format_seconds(cost.seconds)),
        ("run", str(cost.directory)),
    ]
    if cost.target is not None:
        grid = "" if cost.to_target is None else f" (on the paper's grid {format_on_grid(cost)})"
        pairs.insert(2, (f"rounds to {cost.target}", format_rounds(cost) + grid))
    if cost.virtual_seconds is not None:
        pairs.insert(-2, ("virtual time", format_seconds(cost.virtual_seconds)))
        if cost.virtual_to_target is not None:
            named = f"virtual time to {cost.target}"
            pairs.insert(-2, (named, format_seconds(cost.virtual_to_target)))
    if cost.bytes_to_target is not None:
        up, down = (format_bytes(number) for number in cost.bytes_to_target)
        pairs.insert(3, (f"uplink, downlink to {cost.target}", f"{up}, {down}"))
    return pairs


def per_client_table(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A header and a row for each client; of very many, for the worst by the first metric."""
    shown = rows
    if len(rows) > _CLIENTS_SHOWN and metrics:
        shown = worst(rows, metrics[0], _WORST_SHOWN)
    header = ("client", "trains with", "judged on", *metrics)
    return header, [
        (
            row["client"],
            str(row["train_examples"]),
            str(row["judged_examples"]),
            *(format_score(row[metric]) for metric in metrics),
        )
        for row in shown
    ]


def per_client_rows(metrics: Mapping[str, FederatedMetric]) -> list[tuple[str, str]]:
    """A federated evaluation, as names and values."""
    return [
        (
            f"{name} per client",
            f"mean {format_score(metric.mean)}, weighted mean {format_score(metric.weighted_mean)}"
            f", worst decile {format_score(metric.worst_decile)}",
        )
        for name, metric in metrics.items()
    ] or [("per client", "this task has a loss only, which is not judged per client")]


def _time_left(recent: Collection[float], rounds: int) -> str:
    if not recent or rounds == 0:
        return ""
    seconds = sum(recent) / len(recent) * rounds
    return f"  about {format_seconds(seconds) if seconds >= 60 else f'{seconds:.0f} s'} left"
