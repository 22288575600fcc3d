"""The command line: `potluck demo`, `train`, `report`, `reproduce`, `data`, `init`; and serving.

Heavy imports (PyTorch, matplotlib, Rich) stay inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

import potluck
from potluck.cli.data import app as data_app
from potluck.cli.demo import demo_serve
from potluck.cli.join import app as joining_app
from potluck.cli.operate import app as operate_app
from potluck.cli.options import Debug, ExperimentFile, Overrides, command
from potluck.cli.reproduce import reproduce
from potluck.cli.serve import app as serving_app
from potluck.cli.upkeep import app as upkeep_app

if TYPE_CHECKING:
    from potluck.config.experiment import Experiment
    from potluck.data import FederatedData
    from potluck.simulation import Round
    from potluck.simulation.runs.cost import Cost

app = typer.Typer(
    help="Federated learning: train one model on data that stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
demo_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
demo_app.command("serve")(demo_serve)
app.add_typer(demo_app, name="demo")
app.add_typer(serving_app)
app.add_typer(operate_app)
app.add_typer(joining_app)
app.add_typer(upkeep_app)


def main() -> None:
    """Runs the console script."""
    for stream in (sys.stdout, sys.stderr):  # a name or a sign that its encoding does not have
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="potluck")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"potluck {potluck.__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
@command
def train(
    file: ExperimentFile,
    overrides: Overrides = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="How many runs, with the file's seed and the ones after it."
        ),
    ] = 1,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Runs go to DIR/<name>/seed-<seed>/.")
    ] = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again from round 0 instead of continuing.")
    ] = False,
    per_client: Annotated[
        bool,
        typer.Option(
            "--per-client",
            help="Judge the final model on every client's own test examples too, or on its "
            "training examples where it has no others.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Train as an experiment file says.

    A run that was stopped, in whatever way, continues when the same command is given again.
    """
    with _stoppable(_command_line(file, overrides or [], seeds, out)):
        from potluck.cli.progress import outcome, per_client_rows, per_client_table, summary
        from potluck.cli.table_output import show_pairs, show_table
        from potluck.config.experiment import load_experiment
        from potluck.data.describe import describe
        from potluck.engine import federated_evaluation
        from potluck.simulation import (
            build_data,
            build_task,
            discard_run,
            read_run,
            read_weights,
        )
        from potluck.simulation.runs.cost import measure
        from potluck.simulation.runs.per_client import by_client, write_per_client
        from potluck.simulation.runs.report import header, notes, table

        experiment = load_experiment(file, overrides or [])
        data = build_data(experiment)
        show_pairs([*summary(experiment), *describe(data).rows()])
        costs: list[Cost] = []
        for seed in range(experiment.run.seed, experiment.run.seed + seeds):
            directory = out / experiment.name / f"seed-{seed}"
            if fresh:
                discard_run(directory)
            with _training(experiment, data, seed, directory) as (rounds, show):
                for round in rounds:
                    show(round)
            costs.append(measure(read_run(directory)))
            typer.echo()
            show_pairs(outcome(costs[-1]))
            if per_client:
                task = build_task(experiment, data)
                found = federated_evaluation(task, read_weights(directory), seed=seed)
                rows = by_client(data, found)
                show_table(*per_client_table(rows, list(found)))
                show_pairs(
                    [*per_client_rows(found), ("file", str(write_per_client(directory, rows)))]
                )
        if seeds > 1:
            typer.echo()
            show_table(header(costs), table(costs), keys=2)
            for note in notes(costs):
                typer.echo(f"\n{note}")
        where = shlex.quote(str(out / experiment.name))
        typer.echo(f"\nFor tables and curves: potluck report {where} --out {where}")


@app.command()
@command
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of them.")
    ],
    target: Annotated[
        float | None,
        typer.Option(metavar="SCORE", help="Count rounds to this instead of the runs' own target."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Judge by this metric of the runs. accuracy if not given, or loss without it.",
        ),
    ] = None,
    x: Annotated[
        Literal["rounds", "hours"],
        typer.Option("--x", help="Draw over rounds, or over the hours of simulated devices."),
    ] = "rounds",
    out: Annotated[
        Path | None,
        typer.Option(metavar="PREFIX", help="Write PREFIX.md, PREFIX.png and PREFIX.svg too."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell what runs cost: rounds and bytes to a target, and wall time.

    Rounds are counted as the paper counts them: the test accuracy is made monotone (best so
    far), and its crossing of the target is interpolated. Seeds of one experiment are averaged.
    """
    from potluck.cli.table_output import show_table
    from potluck.core.formats import markdown
    from potluck.simulation import read_run
    from potluck.simulation.runs.cost import measure
    from potluck.simulation.runs.report import draw, header, notes, table

    if out is not None:
        out = _prefix(out)
    records = [read_run(directory) for directory in _run_directories(paths)]
    for record in records:
        if not record.rounds:
            typer.echo(f"left out, for it has no rounds yet: {record.directory}", err=True)
    costs = [measure(record, target, metric=metric) for record in records if record.rounds]
    rows = table(costs)
    show_table(header(costs), rows, keys=2)
    for note in notes(costs):
        typer.echo(f"\n{note}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures = [out.with_name(f"{out.name}{suffix}") for suffix in (".png", ".svg")]
        text = out.with_name(f"{out.name}.md")
        content = "\n".join([markdown(header(costs), rows), *notes(costs)]).rstrip() + "\n"
        text.write_text(content, encoding="utf-8")
        draw(costs, pictures, x)
        typer.echo(f"written: {', '.join(map(str, [text, *pictures]))}", err=True)


app.command()(reproduce)


@app.command()
@command
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE")] = Path("experiment.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented experiment file, ready to train."""
    from potluck.config.template import TEMPLATE

    if file.exists() and not force:
        raise ValueError(
            f"FILE must not exist yet, got {str(file)!r}. Name another, or add --force."
        )
    file.write_text(TEMPLATE.replace("FILE", shlex.quote(str(file))), encoding="utf-8")
    typer.echo(f"written: {file}\nNext:    potluck train {shlex.quote(str(file))}")


@demo_app.callback()
@command
def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the runs, table and picture go.")
    ] = Path("demo"),
    debug: Debug = False,
) -> None:
    """See federated averaging beat averaged gradients, on embedded data, in a minute.

    FedSGD and FedAvg train the same model over 100 clients that share scikit-learn's digits, IID
    and two-shard, until it reaches 95 % on the test digits, three seeds each.
    """
    if context.invoked_subcommand is not None:
        return
    from potluck.cli.progress import progress
    from potluck.cli.table_output import show_table
    from potluck.core.formats import markdown
    from potluck.demo import fedsgd_vs_fedavg as demonstration
    from potluck.simulation import discard_run, read_run, train
    from potluck.simulation.runs.cost import measure

    typer.echo("FedSGD against FedAvg: digits, 100 clients, 10 a round, to 95 % test accuracy\n")
    results: dict[tuple[str, str], list[Cost]] = {}
    for setting in demonstration.settings():
        key = (setting.partition, setting.algorithm)
        typer.echo(f"{setting.algorithm}, {setting.partition}, seeds {demonstration.SEEDS}")
        results[key] = []
        for seed in demonstration.SEEDS:
            directory = out / setting.experiment.name / f"seed-{seed}"
            discard_run(directory)
            with progress(setting.experiment.run.rounds, []) as shown:
                for round in train(setting.experiment, directory, seed=seed):
                    shown.show(round)
            results[key].append(measure(read_run(directory)))
    rows = demonstration.table(results)
    typer.echo()
    show_table(demonstration.HEADER, rows)
    (out / "demo.md").write_text(markdown(demonstration.HEADER, rows), encoding="utf-8")
    demonstration.draw(results, [out / "demo.png", out / "demo.svg"])
    typer.echo(f"\npicture: {out / 'demo.png'}   runs: potluck report {shlex.quote(str(out))}")


@contextmanager
def _stoppable(again: str) -> Generator[None]:
    """Shows after Ctrl-C which command continues the run."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the finished rounds are kept. Continue with\n  {again}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _training(
    experiment: Experiment, data: FederatedData, seed: int, directory: Path
) -> Generator[tuple[Generator[Round], Callable[[Round], None]]]:
    """Returns the rounds of a run, and the function that shows each."""
    from potluck.cli.progress import Clients, progress
    from potluck.data.describe import draw
    from potluck.simulation import read_run, train

    history: list[dict[str, Any]] = []
    if (directory / "manifest.json").exists():
        history = read_run(directory).rounds
    verb = "continuing" if history else "training"
    typer.echo(f"\n{verb} with seed {seed} in {directory}")
    clients, picture, idle = Clients(), directory / "partition.png", True
    rounds = cast(
        "Generator[Round]", train(experiment, directory, seed=seed, data=data, progress=clients)
    )

    def show(round: Round) -> None:
        nonlocal idle
        idle = False
        shown.show(round)
        if not picture.exists():  # not before round 0: the directory may be another run's
            draw(data, picture)

    with closing(rounds), progress(experiment.run.rounds, history, clients) as shown:
        yield rounds, show
    if idle:
        typer.echo("nothing to do: this run has finished")


def _prefix(out: Path) -> Path:
    """Returns the prefix of the names of a report's files."""
    out = out.with_suffix("") if out.suffix in (".md", ".png", ".svg") else out
    if out.name == "" or (out.is_dir() and str(out).endswith("/")):
        raise ValueError(f"--out must name files, got {str(out)!r}. Add a name: --out curves.")
    return out


def _run_directories(paths: Iterable[Path]) -> list[Path]:
    """Returns the run directories at or below these paths; each once."""
    found: dict[Path, None] = {}
    for path in paths:
        below = sorted(file.parent for file in path.rglob("rounds.jsonl"))
        if not below:
            raise ValueError(
                f"RUN must be a run directory or a folder that holds some, got {str(path)!r}. "
                "Name what `potluck train` printed as its run."
            )
        found.update(dict.fromkeys(below))
    return list(found)


def _command_line(file: Path, overrides: Sequence[str], seeds: int, out: Path) -> str:
    """Returns the command that continues a run: the one that started it, less --fresh."""
    words = ["potluck", "train", str(file)]
    for override in overrides:
        words += ["--set", override]
    if seeds > 1:
        words += ["--seeds", str(seeds)]
    if out != Path("runs"):
        words += ["--out", str(out)]
    return shlex.join(words)
