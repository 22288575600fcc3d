"""Figure 1 of the paper: the loss of the average of two models.

    train w and w' on two disjoint samples of the training examples
    for θ from −0.2 to 1.2:  loss of θ w + (1 − θ) w' on all training examples

From different initial weights the average of two good models is a bad one: the loss has a bump
between them. From the same initial weights the average is better than both, on which federated
averaging depends. The paper trains 2NNs on 600 images each: 240 steps of 50 at rate 0.1.
"""

from __future__ import annotations

import importlib
import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potluck.algorithms import FedAvg, client_update
from potluck.core import ClientContext, Vector, stream
from potluck.core.plain_json import to_json
from potluck.data import Dataset, Examples, datasets, divide
from potluck.engine import Task, TorchRuntime, evaluate, run_of
from potluck.engine.devices import kernel_threads
from potluck.models import TwoNN
from potluck.reproduction.paper import TITLES
from potluck.simulation.runs.figures import save_figure
from potluck.simulation.runs.report import markdown
from potluck.simulation.runs.run_manifest import commit, machine

STARTS = ("different", "shared")  # initial weights of the two models
THETAS = tuple(round(float(theta), 4) for theta in np.linspace(-0.2, 1.2, 50))
_COLOURS = {"different": "#D55E00", "shared": "#0072B2"}
HEADER = ("start", "seeds", "loss of the two", "of their average", "lowest between", "paper")
_PAPERS = {  # as read from its figure
    "different": "0.45, average 1.25 (a bump)",
    "shared": "0.46, lowest 0.40 (below both)",
}
_TITLES = {"different": "different initial weights", "shared": "the same initial weights"}


class Setting(NamedTuple):
    """The settings with which the two models are trained."""

    data: str  # "mnist" or "digits"
    num_examples: int  # of each of the two samples
    local_epochs: int
    batch_size: int
    client_lr: float

    @property
    def num_steps(self) -> int:
        """Local steps of each model."""
        return self.local_epochs * -(-self.num_examples // self.batch_size)


PAPER = Setting("mnist", num_examples=600, local_epochs=20, batch_size=50, client_lr=0.1)
QUICK = Setting("digits", num_examples=300, local_epochs=40, batch_size=50, client_lr=0.2)


class Line(NamedTuple):
    """The loss along the line through two models."""

    start: str  # one of STARTS
    seed: int
    thetas: tuple[float, ...]
    losses: tuple[float, ...]  # at each theta
    parents: tuple[float, float]  # at θ = 0 and θ = 1
    middle: float  # at θ = 0.5
    commit: str | None = None  # of the code that made it
    machine: str = ""

    @property
    def lowest(self) -> float:
        """The smallest loss strictly between the two models."""
        pairs = zip(self.thetas, self.losses, strict=True)
        return min([self.middle, *(loss for theta, loss in pairs if 0.0 < theta < 1.0)])


def lines(
    setting: Setting,
    seeds: Sequence[int],
    found: Sequence[Line] = (),
    *,
    thetas: Sequence[float] = THETAS,
) -> Iterator[Line]:
    """Trains the pairs, and yields the line of each seed and start that is not among `found`."""
    done = {(line.start, line.seed) for line in found}
    dataset = datasets.mnist() if setting.data == "mnist" else datasets.digits()
    for seed in seeds:
        task = _task(dataset, setting, seed)
        for start in STARTS:
            if (start, seed) in done:
                continue
            starts = (seed, seed) if start == "shared" else (seed, seed + 1_000_000)
            with kernel_threads(1):
                pair = [_trained(task, setting, s, client) for client, s in enumerate(starts)]
                yield _line(task, dataset.train, start, seed, pair[0], pair[1], thetas)


def save(setting: Setting, found: Sequence[Line], path: Path) -> None:
    """Writes the numbers as JSON."""
    content = {"setting": setting._asdict(), "lines": [line._asdict() for line in found]}
    path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")


def load(path: Path, setting: Setting) -> list[Line]:
    """Reads the numbers that `save` wrote.

    Raises:
        ValueError: they are of another setting.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["setting"] != setting._asdict():
        raise ValueError(
            f"{path} must hold lines of setting={setting._asdict()}, "
            f"got setting={content['setting']}. Name another folder: --out DIR."
        )
    return [
        Line(
            start=line["start"],
            seed=line["seed"],
            thetas=tuple(line["thetas"]),
            losses=tuple(line["losses"]),
            parents=tuple(line["parents"]),
            middle=line["middle"],
            commit=line["commit"],
            machine=line["machine"],
        )
        for line in content["lines"]
    ]


def rows(found: Sequence[Line]) -> list[tuple[str, ...]]:
    """A row of cells, as in `HEADER`, for every start: means over the seeds."""
    result: list[tuple[str, ...]] = []
    for start in STARTS:
        mine = [line for line in found if line.start == start]
        if mine:
            columns = (
                [value for line in mine for value in line.parents],
                [line.middle for line in mine],
                [line.lowest for line in mine],
            )
            numbers = [_mean_std(column) for column in columns]
            result.append((_TITLES[start], str(len(mine)), *numbers, _PAPERS[start]))
    return result


def page(setting: Setting, found: Sequence[Line], command: str) -> str:
    """The README of the figure."""
    made = "; ".join(sorted({f"commit {line.commit} on {line.machine}" for line in found}))
    text = (
        f"Made by `{command}`, at {made}. Two 2NNs are trained on two disjoint samples of "
        f"{setting.num_examples} examples of {setting.data}, {setting.num_steps} steps each (batch "
        f"{setting.batch_size}, rate {setting.client_lr:g}), and θ w + (1 − θ) w' is evaluated on "
        "all training examples. `lines.json` has the numbers. ± is the standard deviation over "
        "seeds, and for the two models over both."
    )
    table = markdown(HEADER, rows(found))
    picture = f"![{TITLES['figure1']}](figure1.png)\n"
    return "\n".join([f"# {TITLES['figure1']}\n", textwrap.fill(text, 100) + "\n", table, picture])


def draw(found: Sequence[Line], paths: Sequence[Path]) -> None:
    """Draws both starts side by side into each of `paths`: a seed thin, their mean thick."""
    figure_module: Any = importlib.import_module("matplotlib.figure")  # slow, and seldom needed
    figure = figure_module.Figure(figsize=(9.0, 3.8), layout="constrained")
    for start, axes in zip(STARTS, figure.subplots(1, 2), strict=True):
        mine = [line for line in found if line.start == start]
        colour = _COLOURS[start]
        for line in mine:
            axes.plot(line.thetas, line.losses, color=colour, linewidth=0.7, alpha=0.4)
        mean = np.mean([line.losses for line in mine], axis=0)
        axes.plot(mine[0].thetas, mean, color=colour, linewidth=2.0)
        parents = float(np.mean([line.parents for line in mine]))
        axes.axhline(parents, color="0.6", linewidth=1.0, zorder=0)
        for theta in (0.0, 1.0):
            axes.axvline(theta, color="0.85", linewidth=1.0, zorder=0)
        axes.set_title(_TITLES[start], fontsize="medium")
        axes.set_xlabel("θ")
        axes.set_ylabel("loss on all training examples")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, paths)


def _mean_std(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _task(dataset: Dataset, setting: Setting, seed: int) -> Task:
    """The two disjoint samples as two clients."""
    size = setting.num_examples
    order = stream(seed, "interpolation").permutation(dataset.train.num_examples)
    data = divide(dataset, [order[:size], order[size : 2 * size]])
    shape = dataset.train.inputs.shape[1:]
    return Task(model=partial(TwoNN, shape, dataset.num_classes), data=data)


def _trained(task: Task, setting: Setting, start: int, client: int) -> Vector:
    """A model from the initial weights of seed `start`, after one client's local training."""
    algorithm = FedAvg(
        client_lr=setting.client_lr,
        local_epochs=setting.local_epochs,
        batch_size=setting.batch_size,
    )
    received = task.initial_weights(start)
    runtime = TorchRuntime(task)
    context = ClientContext(start, 1, client, setting.num_examples)
    update = client_update(
        algorithm, received, context, lambda asked: runtime.train(run_of(task, asked, context))
    )
    return received + update.delta


def _line(
    task: Task,
    train: Examples,
    start: str,
    seed: int,
    first: Vector,
    second: Vector,
    thetas: Sequence[float],
) -> Line:
    def loss(theta: float) -> float:
        return evaluate(task, (theta * first + (1 - theta) * second).astype(np.float32), train)[
            "loss"
        ]

    losses = tuple(loss(theta) for theta in thetas)
    parents = (loss(0.0), loss(1.0))
    return Line(start, seed, tuple(thetas), losses, parents, loss(0.5), commit(), machine())
