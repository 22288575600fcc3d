"""Mistakes in Python: models, losses, metrics, algorithms and rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from watched import Mistakes

import potluck
from potluck.models.task_metrics import accuracy

models = Mistakes("models")
judges = Mistakes("losses and metrics")
algorithms = Mistakes("algorithms and rounds")


@cache
def _digits() -> Any:
    return potluck.partitions.iid(potluck.datasets.digits(), clients=5, seed=1)


@cache
def _regression() -> Any:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    pairs = {str(k): (x[k::4], x[k::4].sum(1)) for k in range(4)}
    return potluck.own_data.from_clients(pairs)


def _flat(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), *more)


def _run(executor: str = "loop", data: Any = None, batch_size: int = 50, **task: Any) -> None:
    task = {"model": _flat, "data": data or _digits(), **task}
    made = potluck.Task(**task)
    algorithm = potluck.FedAvg(client_lr=0.1, batch_size=batch_size)
    for _ in potluck.rounds(algorithm, made, cohort=2, num_rounds=1, executor=executor):
        pass


class Two(nn.Module):
    """Wants two inputs."""

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one + other


class Empty(nn.Module):
    """Has no parameters."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.flatten(1)[:, :10]


class Broken(nn.Module):
    """Fails in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs.flatten(1))


class Text(nn.Module):
    """Answers with text."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> str:
        return "four"


class Arguments(nn.Module):
    """Needs an argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 10)


def _frozen() -> nn.Module:
    module = _flat()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _meta() -> nn.Module:
    with torch.device("meta"):
        return _flat()


for _name, _model in {
    "a model of other inputs": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    "a convolution over two dimensions of a vector": lambda: nn.Conv2d(3, 8, 3),
    "too few classes": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    "outputs of one logit": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1)),
    "an embedding of pixels": lambda: nn.Sequential(nn.Flatten(), nn.Embedding(20, 4)),
    "two inputs": Two,
    "no parameters": Empty,
    "a model that fails": Broken,
    "a model that answers with text": Text,
    "a class that needs arguments": Arguments,
    "a model that is all frozen": _frozen,
    "float64": lambda: _flat().double(),
    "float16": lambda: _flat().half(),
    "complex weights": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10, dtype=torch.complex64)
    ),
    "a model on meta": _meta,
    "a lazy model": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)),
    "a factory of nothing": lambda: None,
    "a factory of a list": lambda: [nn.Linear(64, 10)],
    "a text as a model": "resnet18",
    "a function as a model": functional.relu,
    "weights that are not finite": lambda: _flat(nn.Linear(10, 10)).apply(
        lambda m: m.weight.data.fill_(float("nan")) if isinstance(m, nn.Linear) else None
    ),
}.items():
    models.add(_name, lambda _, model=_model: _run(model=model))
    if _name in ("a model of other inputs", "too few classes", "a model that fails"):
        for _executor in ("workers", "vmap"):
            models.add(
                f"{_name}, on {_executor}",
                lambda _, model=_model, executor=_executor: _run(executor, model=model),
            )

models.add(
    "batch norm over batches of one",
    lambda _: _run(model=lambda: _flat(nn.BatchNorm1d(10)), batch_size=1),
)
models.add("a task without data", lambda _: potluck.Task(model=_flat, data=None))
models.add("a data set that is not divided", lambda _: _run(data=potluck.datasets.digits()))


def _loss(name: str, loss: Any) -> None:
    judges.add(name, lambda _: _run(loss=loss))


_loss("a loss per example", nn.CrossEntropyLoss(reduction="none"))
_loss("a loss that is a number", lambda outputs, targets: 0.5)
_loss("a loss that is a tuple", lambda outputs, targets: (outputs.mean(), 1))
_loss("a loss that is nothing", lambda outputs, targets: None)
_loss("a loss that is no number", lambda outputs, targets: outputs.mean() * float("nan"))
_loss("a loss of one argument", lambda outputs: outputs.mean())
_loss("a loss that is cut off the model", lambda outputs, targets: outputs.detach().mean())
_loss("a loss of whole numbers", lambda outputs, targets: outputs.argmax(1).sum())
_loss("squares of classes", nn.MSELoss())
_loss("a loss that is text", "cross-entropy")
judges.add(
    "cross-entropy of a regression",
    lambda _: _run(data=_regression(), model=lambda: nn.Linear(3, 1), loss=nn.CrossEntropyLoss()),
)
judges.add(
    "squares that broadcast",
    lambda _: _run(data=_regression(), model=lambda: nn.Linear(3, 1), loss=nn.MSELoss()),
)


def _metric(name: str, metric: Any, **task: Any) -> None:
    judges.add(name, lambda _: _run(metrics={"mine": metric}, **task))


_metric("a metric that is nothing", lambda o, t: None)
_metric("a metric of half the examples", lambda o, t: (o.argmax(1) == t).float()[::2])
_metric("a metric that fails", lambda o, t: o[:, 99])
_metric("a metric of one argument", lambda o: o.argmax(1))
_metric(
    "accuracy of a regression",
    accuracy,
    data=_regression(),
    model=lambda: nn.Linear(3, 1),
)
judges.add("metrics that are a list", lambda _: _run(metrics=[lambda o, t: o]))


def _rounds(**named: Any) -> Callable[[Path], None]:
    def run(_: Path) -> None:
        task = potluck.Task(model=_flat, data=_digits())
        arguments = {"cohort": 2, "num_rounds": 1, **named}
        for _ in potluck.rounds(potluck.FedAvg(client_lr=0.1), task, **arguments):
            pass

    return run


for _name, _named in {
    "a cohort of nobody": {"cohort": 0},
    "a negative cohort": {"cohort": -1},
    "a cohort above everyone": {"cohort": 6},
    "a cohort that is true": {"cohort": True},
    "a cohort that is text": {"cohort": "all"},
    "a cohort that is no number": {"cohort": float("nan")},
    "a negative number of rounds": {"num_rounds": -1},
    "rounds that are text": {"num_rounds": "3"},
    "a seed that is text": {"seed": "one"},
    "a codec that there is not": {"codec": "int3"},
    "an executor that there is not": {"executor": "threads"},
    "evaluation never": {"evaluate_every": 0},
    "to go on from nowhere": {"resume": (3,)},
}.items():
    algorithms.add(_name, _rounds(**_named))

for _name, _make in {
    "a rate of 0": lambda: potluck.FedAvg(client_lr=0),
    "a negative rate": lambda: potluck.FedAvg(client_lr=-0.1),
    "a rate that is text": lambda: potluck.FedAvg(client_lr="0.1"),
    "a rate that is no number": lambda: potluck.FedAvg(client_lr=float("nan")),
    "no rate": lambda: potluck.FedAvg(),
    "an argument that there is not": lambda: potluck.FedAvg(client_lr=0.1, epochs=5),
    "half an epoch": lambda: potluck.FedAvg(client_lr=0.1, local_epochs=0.5),
    "an epoch that is true": lambda: potluck.FedAvg(client_lr=0.1, local_epochs=True),
    "a batch of 0": lambda: potluck.FedAvg(client_lr=0.1, batch_size=0),
    "a batch that is infinite": lambda: potluck.FedAvg(client_lr=0.1, batch_size=float("inf")),
    "a negative μ": lambda: potluck.FedProx(client_lr=0.1, mu=-1.0),
    "no μ": lambda: potluck.FedProx(client_lr=0.1),
    "a momentum of 1": lambda: potluck.Momentum(momentum=1.0),
    "a τ of 0": lambda: potluck.Adam(server_lr=0.1, tau=0.0),
    "a rate above 1 for Poisson": lambda: potluck.Poisson(1.5),
}.items():
    algorithms.add(_name, lambda _, make=_make: make())


@algorithms("a rate at which training diverges")
def _(_: Path) -> None:
    task = potluck.Task(model=lambda: nn.Linear(3, 1), data=_regression())
    algorithm = potluck.FedAvg(client_lr=1e6, local_epochs=50)
    list(potluck.rounds(algorithm, task, cohort=2, num_rounds=5))


@algorithms("weights of another model")
def _(_: Path) -> None:
    task = potluck.Task(model=_flat, data=_digits())
    potluck.evaluate(task, np.zeros(7, np.float32))


@algorithms("to go on with another model's weights")
def _(folder: Path) -> None:
    task = potluck.Task(model=_flat, data=_digits())
    algorithm = potluck.FedAvg(client_lr=0.1)
    state = algorithm.server_init(np.zeros(7, np.float32))
    list(potluck.rounds(algorithm, task, num_rounds=2, resume=(1, state)))
