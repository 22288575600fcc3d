"""`potluck demo serve`: a server and its devices on this machine, some of which are killed.

It shows the processes' reports (`potluck.demo.federation`) and an operator's view of the server.
"""

from __future__ import annotations

import math
import os
import random
import shlex
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import Debug, Overrides, command
from potluck.demo.narration import HEADER, Narration, PlannedCrash, show_narration

if TYPE_CHECKING:
    from potluck.config.experiment import Experiment
    from potluck.demo.federation import LocalFederation

EXPERIMENT = """\
# The federation that `potluck demo serve` shows: each device has two or three of the ten digits.
name = "demo-served"

[task]
data = "digits"
model = "2nn"

[partition]
kind = "shards"

[algorithm]
client_lr = 0.1
local_epochs = 5
batch_size = 10

[run]
rounds = 20
cohort = 1.0
seed = 1
"""
_DOWN_SECONDS = 2.0  # between a device's end and its next start
_LATE_SECONDS = 10.0  # a lease: after so much silence a slot is another device's
_LAST_SECONDS = 30.0  # for the last evaluation, and for devices to learn that the run is over


@command
def demo_serve(
    devices: Annotated[int, typer.Option(min=2, metavar="N", help="How many device processes.")] = (
        10
    ),
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="20, or those of the experiment if left out."),
    ] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of the built-in one, over digits."),
    ] = None,
    overrides: Overrides = None,
    drop_outs: Annotated[
        int,
        typer.Option(
            "--drop-outs", min=0, metavar="N", help="Devices killed in training, and started again."
        ),
    ] = 2,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the folders of server and devices, and their logs."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the model and the table go.")
    ] = Path("demo"),
    debug: Debug = False,
) -> None:
    """See a real server and real devices train together, on this machine.

    Each device is a process with its own key and its own part of the data; it enrols with an
    invitation and speaks TLS with a certificate that it pins. Some are killed while they train,
    and started again: the rounds go on.
    """
    try:
        with _folder(keep) as folder:
            _demonstrate(
                folder, devices, rounds, experiment, overrides or [], drop_outs, port, keep, out
            )
    except KeyboardInterrupt:
        typer.echo("\nstopped; all processes have ended.", err=True)
        raise typer.Exit(130) from None


def plan_crashes(drop_outs: int, devices: int, rounds: int) -> list[PlannedCrash]:
    """Plans crashes of different devices in different rounds, as far as there are enough; not in
    the first round or the last. Equal numbers give equal plans."""
    chance = random.Random(f"{drop_outs}/{devices}/{rounds}")
    chosen = chance.sample(range(devices), min(drop_outs, devices))
    possible = list(range(2, max(rounds, 3)))
    spread = [possible[i * len(possible) // len(chosen)] for i in range(len(chosen))]
    return [
        PlannedCrash(device, round, chance.randint(1, 20))
        for device, round in zip(chosen, spread, strict=True)
    ]


def defaults(experiment: Experiment, devices: int) -> list[str]:
    """Returns overrides for settings of the server that an experiment lacks: rounds close without a
    quarter of the devices."""
    goal = max(int(devices / 1.3), 1)
    values = {
        "goal": goal,
        "over_selection": 1.3,
        "population": devices,
        "selection_seconds": 30.0,
        "report_seconds": 120.0,
        "lease_seconds": _LATE_SECONDS,
        "pace_seconds": 1.0,
    }
    if experiment.server.selection == "sampled":
        values = {"population": devices, "lease_seconds": _LATE_SECONDS, "pace_seconds": 1.0}
    given = experiment.server.model_fields_set
    return [f"server.{name}={value}" for name, value in values.items() if name not in given]


@contextmanager
def _folder(keep: Path | None) -> Generator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="potluck-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    if keep.exists() and any(keep.iterdir()):
        raise ValueError(f"--keep must be a new or empty folder, got {str(keep)!r}. Name another.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _demonstrate(
    folder: Path,
    devices: int,
    rounds: int | None,
    file: Path | None,
    overrides: Sequence[str],
    drop_outs: int,
    port: int,
    keep: Path | None,
    out: Path,
) -> None:
    from potluck.config.experiment import load_experiment
    from potluck.demo.federation import LocalFederation, check_room

    if drop_outs > devices:
        raise ValueError(f"drop_outs must be at most devices={devices}, got drop_outs={drop_outs}.")
    check_room(devices, len(os.sched_getaffinity(0)))
    overrides = [*overrides, *([] if rounds is None else [f"run.rounds={rounds}"])]
    if file is None:
        file = folder / "experiment.toml"
        file.write_text(EXPERIMENT, encoding="utf-8")
    experiment = load_experiment(file, overrides)
    overrides += defaults(experiment, devices)
    if experiment.partition.kind in ("iid", "shards", "dirichlet", "unbalanced"):
        overrides.append(f"partition.clients={devices}")
    crashes = plan_crashes(drop_outs, devices, experiment.run.rounds)
    started = time.monotonic()
    typer.echo(f"{experiment.name}: {experiment.task.data}, divided among {devices} devices")
    with LocalFederation(
        file, folder, overrides=overrides, port=port, remove=keep is None
    ) as federation:
        typer.echo(f"server: {federation.address}  (TLS, certificate pinned by every device)")
        typer.echo(f"watch it in a browser: {federation.operator.post('dashboard')['link']}")
        narration = _follow(federation, devices, experiment.run.rounds, crashes)
        content = federation.operator.fetch("export")
    _tell(narration, content, experiment, time.monotonic() - started, keep, out)


def _follow(
    federation: LocalFederation, devices: int, rounds: int, crashes: Sequence[PlannedCrash]
) -> Narration:
    """Starts the devices and shows the events, until the run is over and all devices know it."""
    narration = Narration(crashes)
    with closing(show_narration(narration, devices, rounds)) as show:
        next(show)
        for device in range(devices):
            planned = narration.crashes.get(device)
            crash = None if planned is None else (planned.round, planned.steps)
            federation.start(device, invited=True, crash=crash)
            narration.doing[device] = "enrolled"
            show.send([])
        down: dict[int, float] = {}
        deadline = math.inf
        while time.monotonic() < deadline:
            for news in federation.news(0.2):
                if (died := narration.note(news)) is not None and not narration.is_over:
                    down[died] = time.monotonic() + _DOWN_SECONDS
            for device in [device for device, when in down.items() if when <= time.monotonic()]:
                del down[device]
                federation.start(device)
                narration.told.append(f"device {device} is started again")
            show.send(narration.note_status(federation.operator.get("status")))
            if narration.status["state"] == "paused":
                raise ValueError(f"the run must go on, it was paused: {narration.status['reason']}")
            if narration.is_over:
                deadline = min(deadline, time.monotonic() + _LAST_SECONDS)
                if narration.is_judged and not federation.running:
                    break
    return narration


def _tell(
    narration: Narration,
    content: bytes,
    experiment: Experiment,
    seconds: float,
    keep: Path | None,
    out: Path,
) -> None:
    """Shows the table, and what to do with the model."""
    from potluck.cli.table_output import show_table
    from potluck.core.formats import format_seconds, markdown

    rows = narration.rows()
    typer.echo()
    show_table(HEADER, rows)
    out.mkdir(parents=True, exist_ok=True)
    model = out / f"{experiment.name}.safetensors"
    model.write_bytes(content)
    model.with_suffix(".md").write_text(markdown(HEADER, rows), encoding="utf-8")
    typer.echo(f"\n{len(rows)} rounds in {format_seconds(seconds)}, with the start of everything")
    typer.echo(f"model: {model}   In plain PyTorch:")
    typer.echo(f"  model.load_state_dict(safetensors.torch.load_file({str(model)!r}))")
    if keep is not None:
        typer.echo(f"kept: {shlex.quote(str(keep))}, with what each device sent and the logs")
