"""Running a grid of the paper's cells: settings × learning rates × seeds.

Every run is a run directory, `<runs>/<experiment>/lr-<rate>/seed-<seed>`, and no other state is
kept: missing runs, the best rate and the next round are read from the directories each time. So a
grid that was killed continues when the same command is given again, and tables that share a cell
share its runs. A run whose copy lies among the results counts as done.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, cast

from potluck.config.experiment import Experiment, load_experiment
from potluck.core import ConfigError, DivergedError
from potluck.core.plain_json import to_json
from potluck.data import FederatedData
from potluck.reproduction import tuning
from potluck.reproduction.paper import Cell
from potluck.reproduction.tuning import Choice, Trial
from potluck.simulation.rounds import Round
from potluck.simulation.runs.directory import RunRecord, read_run
from potluck.simulation.runs.report import measure
from potluck.simulation.runs.train import train

SEEDS = (1, 2, 3)
DIVERGED = "diverged.json"  # beside a run's files: why it cannot go on


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The cells, seeds and folders of a grid.

    Args:
        cells: of one table or figure.
        seeds: that are reported.
        num_rates: learning rates a cell; with 1 its file's rate is taken as it is.
        runs: the folder of the run directories.
        copies: a folder of the same shape in which runs that were reported are kept.
        experiments: the folder of the experiment files; None looks for it.
        workers: processes for a run; None takes what its file says.
        precision: of local training, likewise. A run continues with the one it began with.
        device: "cuda" or another of `run.device`, on which the cohort is one program.
    """

    cells: Sequence[Cell]
    seeds: Sequence[int] = SEEDS
    num_rates: int = 1
    runs: Path = Path("runs")
    copies: Path = Path("results/runs")
    experiments: Path | None = None
    workers: int | None = None
    precision: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        tuning.rates(1.0, self.num_rates)
        if not self.seeds or tuning.SEED in self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds must be different and leave out {tuning.SEED}, which chooses the learning "
                f"rates, got seeds={','.join(map(str, self.seeds))}. Take 1,2,3."
            )


class Job(NamedTuple):
    """One run that is missing or not finished."""

    cell: Cell
    experiment: Experiment
    seed: int
    directory: Path
    limit: int  # rounds after which it stops, if it has not reached its target

    @property
    def is_tuning(self) -> bool:
        return self.seed == tuning.SEED


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose name matches one of the patterns, as of files (*, ?); all without any.

    Raises:
        ValueError: a pattern that no cell matches.
    """
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            names = ", ".join(cell.name for cell in cells)
            raise ValueError(
                f"cells must match one of {names}, got cells={pattern!r}. "
                "Write * for what may differ."
            )
    return [
        cell
        for cell in cells
        if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)
    ]


def jobs(grid: Grid) -> Iterator[Job]:
    """Yields the missing runs: those of cells that were started first, then in order.

    The caller must run each job before it takes the next: the rate of the reported seeds follows
    from the runs before.
    """
    experiments = {cell.name: load_cell(grid, cell) for cell in grid.cells}
    for cell in _started_first(grid):
        experiment = experiments[cell.name]
        if grid.num_rates > 1:
            yield from tuning_jobs(grid, cell, experiment)
        chosen = choice(grid, cell, experiment.algorithm.client_lr)
        rate = chosen.rate
        for seed in () if chosen.is_hopeless else _by_progress(grid, cell, rate):
            job = _job(grid, cell, _with_rate(experiment, rate), seed, experiment.run.rounds)
            if not is_complete(find(grid, cell, rate, seed), experiment.run.rounds):
                yield job


def tuning_jobs(grid: Grid, cell: Cell, experiment: Experiment) -> Iterator[Job]:
    """The rates of a cell that may still turn out best, from the file's outwards."""
    rates = tuning.rates(experiment.algorithm.client_lr, grid.num_rates)
    num_rounds = experiment.run.rounds
    for i, rate in enumerate(rates):
        before = [_trial(grid, cell, other) for other in rates[:i]]
        if not tuning.is_tried(_trial(grid, cell, rate), before, num_rounds):
            most = tuning.limit(before, num_rounds)
            yield _job(grid, cell, _with_rate(experiment, rate), tuning.SEED, most)


def run(job: Job, data: FederatedData) -> Generator[Round]:
    """Continues a job where it stopped, and yields its new rounds."""
    rounds = cast(
        "Generator[Round]", train(job.experiment, job.directory, seed=job.seed, data=data)
    )
    with closing(rounds):
        try:
            for round in rounds:
                yield round
                if round.number >= job.limit:
                    return
        except DivergedError as error:
            path = job.directory / DIVERGED
            path.write_text(to_json({"reason": str(error)}) + "\n", encoding="utf-8")


def choice(grid: Grid, cell: Cell, file_rate: float) -> Choice:
    """The rate of a cell's reported seeds: the best of those that were tried, or the file's."""
    found = rates_with(grid, cell, tuning.SEED)
    return tuning.choose(file_rate, [_trial(grid, cell, rate) for rate in found])


def rates_with(grid: Grid, cell: Cell, *seeds: int) -> list[float]:
    """The rates for which there are rounds of one of these seeds, in ascending order."""
    folders = [root / cell.name for root in (grid.runs, grid.copies)]
    found = {
        float(path.name.removeprefix("lr-")) for folder in folders for path in folder.glob("lr-*")
    }
    return sorted(rate for rate in found if any(find(grid, cell, rate, seed) for seed in seeds))


def place(cell: Cell, rate: float, seed: int) -> Path:
    """Returns the path of a run below `runs`, and of its copy below `copies`."""
    return Path(cell.name) / f"lr-{rate:.4g}" / f"seed-{seed}"


def find(grid: Grid, cell: Cell, rate: float, seed: int) -> RunRecord | None:
    """The run, or its copy if that has more rounds; None where neither has any."""
    found: list[RunRecord] = []
    for root in (grid.runs, grid.copies):
        directory = root / place(cell, rate, seed)
        if (directory / "rounds.jsonl").exists() and (directory / "manifest.json").exists():
            found.append(read_run(directory))
    best = max(found, key=lambda record: len(record.rounds), default=None)
    return best if best is not None and best.rounds else None


def is_complete(record: RunRecord | None, num_rounds: int) -> bool:
    """True if a run needs no more rounds: at its target, at its last round, or diverged."""
    if record is None:
        return False
    if has_diverged(record) or int(record.rounds[-1]["round"]) >= num_rounds:
        return True
    stops = bool(record.manifest["experiment"]["run"]["stop_at_target"])
    return stops and measure(record).to_target is not None


def has_diverged(record: RunRecord) -> bool:
    """True if a client's loss or weights were no longer finite."""
    return (record.directory / DIVERGED).exists()


def load_cell(grid: Grid, cell: Cell) -> Experiment:
    """The experiment of a cell, at the rate of its file.

    Raises:
        ConfigError: there is no such file, or it is wrong.
    """
    places = [Path("experiments"), Path(__file__).parents[3] / "experiments"]  # here, or the clone
    if grid.experiments is not None:
        places = [grid.experiments]
    for folder in places:
        path = folder / f"{cell.file}.toml"
        if path.exists():
            wanted = {
                "executor": None if grid.device is None else "vmap",
                "device": grid.device,
                "workers": grid.workers,
                "precision": grid.precision,
            }
            given = [f"run.{key}={value}" for key, value in wanted.items() if value is not None]
            return load_experiment(path, [*cell.overrides, *given])
    raise ConfigError(
        f"experiments must be the folder that holds {cell.file}.toml, got "
        f"{' and '.join(repr(str(folder)) for folder in places)} without it. "
        "Name the experiments folder of a clone of Potluck: --experiments DIR."
    )


def _trial(grid: Grid, cell: Cell, rate: float) -> Trial:
    record = find(grid, cell, rate, tuning.SEED)
    if record is None:
        return Trial(rate, None, False)
    return Trial(rate, measure(record), has_diverged(record))


def _job(grid: Grid, cell: Cell, experiment: Experiment, seed: int, limit: int) -> Job:
    directory = grid.runs / place(cell, experiment.algorithm.client_lr, seed)
    return Job(cell, experiment, seed, directory, limit)


def _with_rate(experiment: Experiment, rate: float) -> Experiment:
    algorithm = experiment.algorithm.model_copy(update={"client_lr": rate})
    return experiment.model_copy(update={"algorithm": algorithm})


def _started_first(grid: Grid) -> list[Cell]:
    return sorted(grid.cells, key=lambda cell: not _is_started(grid.runs / cell.name))


def _is_started(folder: Path) -> bool:
    """True if a run below is unfinished. Beaten tuning runs stay so, and do not count."""
    begun = [path.parent for path in folder.glob("lr-*/seed-*/checkpoint.safetensors")]
    return any(
        not (path / "final.safetensors").exists()
        and not (path / DIVERGED).exists()
        and path.name != f"seed-{tuning.SEED}"
        for path in begun
    )


def _by_progress(grid: Grid, cell: Cell, rate: float) -> list[int]:
    started = [(grid.runs / place(cell, rate, seed)).exists() for seed in grid.seeds]
    pairs = zip(started, grid.seeds, strict=True)
    return [seed for _, seed in sorted(pairs, key=lambda pair: not pair[0])]
