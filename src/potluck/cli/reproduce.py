"""The command `potluck reproduce`: run the grid of a table or figure, then write its page."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import Debug, command

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.reproduction.grid import Grid, Job
    from potluck.reproduction.paper import Cell


@command
def reproduce(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="table1, table2, table4, figure1, figure2, figure3 or figure8 of the paper, or "
            "beyond: the same with better optimizers.",
        ),
    ],
    cells: Annotated[
        list[str] | None,
        typer.Option(
            "--cells", metavar="PATTERN", help="Run only cells of this name (*, ?). Repeatable."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="The reported seeds; 0 is kept for choosing rates. 1,2,3 if not given, and 1,2 "
            "with --quick.",
        ),
    ] = None,
    rates: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Learning rates to try in each cell with seed 0, in steps of 10^(1/3) around its "
            "file's: an odd number. With 1 the file's is taken as it is.",
        ),
    ] = 1,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs are made.")] = Path(
        "runs"
    ),
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The page goes to DIR/WHAT/, copies of the runs to DIR/runs/. results if not "
            "given, and results-quick with --quick.",
        ),
    ] = None,
    experiments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The experiment files. If not given: experiments here, or in the clone that "
            "Potluck was installed from.",
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing: write what there is.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes for each run.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="WORD",
            help="Of local training: float32 if not given; bf16 rounds more and is up to twice as "
            "fast on processors that have it.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train on it, the cohort as one program: cuda, cuda:1, or auto, a GPU if there is "
            "one.",
        ),
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(min=0.0, metavar="H", help="Stop after so many hours.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A miniature on embedded data, in a minute or two.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a table or figure of the paper, and write ours beside it.

    Runs what is missing, cell by cell and seed by seed, then writes the page of the whole table.
    Stopped in whatever way, it goes on when the same command is given again.
    """
    from potluck.reproduction.paper import TITLES

    if what not in TITLES:
        raise ValueError(f"WHAT must be one of {', '.join(TITLES)}, got {what!r}. Take one.")
    given = [f"--cells {shlex.quote(pattern)}" for pattern in cells or []]
    given += [f"--seeds {seeds}"] * (seeds is not None) + [f"--rates {rates}"] * (rates != 1)
    given += [f"--precision {precision}"] * (precision is not None)
    given += [f"--device {device}"] * (device is not None)
    words = " ".join(["potluck reproduce", what, *given, *["--quick"] * quick])
    out = out or Path("results-quick" if quick else "results")
    chosen = _seeds(seeds or ("1,2" if quick else "1,2,3"))
    deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
    if what == "figure1":
        _figure1(chosen, out / what, words, report_only, quick, deadline)
        return
    from potluck.reproduction import paper
    from potluck.reproduction import quick as miniature
    from potluck.reproduction.grid import Grid, select

    every = miniature.cells(what) if quick else paper.cells(what)
    grid = Grid(
        cells=every,
        seeds=chosen,
        num_rates=rates,
        runs=runs,
        copies=out / "runs",
        experiments=experiments,
        workers=workers,
        precision=precision,
        device=device,
    )
    if not report_only:
        try:
            _run(grid, select(every, cells or []), deadline)
        except KeyboardInterrupt:
            typer.echo(
                "\nstopped: the finished rounds are kept. The same command goes on.", err=True
            )
            raise typer.Exit(130) from None
    _write(what, grid, out / what, words)


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"seeds must be whole numbers with commas between, got seeds={text!r}. Write 1,2,3."
        ) from None


def _run(grid: Grid, cells: Sequence[Cell], deadline: float | None) -> None:
    from dataclasses import replace

    from potluck.config.build import build_data
    from potluck.core.formats import format_seconds
    from potluck.reproduction.estimates import left
    from potluck.reproduction.grid import jobs

    grid = replace(grid, cells=cells)
    built: tuple[object, FederatedData] | None = None
    for job in jobs(grid):
        so_far = left(grid)
        rate = job.experiment.algorithm.client_lr
        typer.echo(
            f"\n{job.cell.name}, client_lr {rate:.4g}, seed {job.seed}"
            f"{' (to choose the rate)' * job.is_tuning}: {so_far.done} of {so_far.total} runs "
            f"done, perhaps {format_seconds(so_far.seconds)} left"
        )
        key = (job.experiment.task, job.experiment.partition)
        if built is None or built[0] != key:
            built = (key, build_data(job.experiment))
        if not _do(job, built[1], deadline):
            typer.echo("\nstopped: the time is up. The same command goes on.")
            return


def _do(job: Job, data: FederatedData, deadline: float | None) -> bool:
    """Does a job. Returns whether there is time for another."""
    from contextlib import closing

    from potluck.cli.progress import progress
    from potluck.reproduction.grid import has_diverged, run
    from potluck.simulation import read_run

    history = []
    if (job.directory / "rounds.jsonl").exists():
        history = read_run(job.directory).rounds
    rounds = run(job, data)
    with closing(rounds), progress(job.limit, history) as shown:
        for round in rounds:
            shown.show(round)
            if deadline is not None and time.monotonic() >= deadline:
                return False
    if has_diverged(read_run(job.directory)):
        typer.echo("diverged: this run ends here")
    return True


def _write(what: str, grid: Grid, folder: Path, words: str) -> None:
    from potluck.cli.table_output import show_table
    from potluck.models.task_metrics import AFTER_FIRST
    from potluck.reproduction import comparison
    from potluck.reproduction.curves import draw_accuracy, draw_train_loss

    comparison.keep(grid)
    results = comparison.gather(grid)
    of_loss = what in comparison.LOSS_FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    if any(cost.rounds > 0 for result in results for cost in result.costs):
        suffixes = (".png", ".svg") if what.startswith("figure") else (".png",)
        pictures = [folder / f"{what}{suffix}" for suffix in suffixes]
        (draw_train_loss if of_loss else draw_accuracy)(results, pictures)
    page = folder / "README.md"
    shown = [path.name for path in pictures[:1]]
    others = [] if of_loss else comparison.gather(grid, AFTER_FIRST)
    page.write_text(comparison.page(what, results, words, shown, others), encoding="utf-8")
    typer.echo()
    if of_loss:
        show_table(comparison.LOSS_HEADER, comparison.loss_rows(results))
    else:
        show_table(comparison.HEADER, comparison.rows(results))
    typer.echo(f"\nwritten: {', '.join(map(str, [page, *pictures]))}")


def _figure1(
    seeds: Sequence[int],
    folder: Path,
    words: str,
    report_only: bool,
    quick: bool,
    deadline: float | None,
) -> None:
    from potluck.cli.table_output import show_table
    from potluck.reproduction import interpolation

    setting = interpolation.QUICK if quick else interpolation.PAPER
    path = folder / "lines.json"
    folder.mkdir(parents=True, exist_ok=True)
    found = interpolation.load(path, setting) if path.exists() else []
    if not report_only:
        for line in interpolation.lines(setting, seeds, found):
            found.append(line)
            interpolation.save(setting, found, path)
            typer.echo(f"seed {line.seed}, {line.start}: {line.middle:.4f} in the middle")
            if deadline is not None and time.monotonic() >= deadline:
                break
    if not found:
        raise ValueError(f"{path} must hold lines, got none. Leave out --report-only.")
    pictures = [folder / "figure1.png", folder / "figure1.svg"]
    interpolation.draw(found, pictures)
    page = folder / "README.md"
    page.write_text(interpolation.page(setting, found, words), encoding="utf-8")
    show_table(interpolation.HEADER, interpolation.rows(found))
    typer.echo(f"\nwritten: {', '.join(map(str, [page, path, *pictures]))}")
