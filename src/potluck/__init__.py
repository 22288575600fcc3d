"""Federated learning: train one model on data that stays where it is.

    from potluck import FedAvg, Task, TwoNN, datasets, partitions, rounds

    data = partitions.shards(datasets.mnist(), clients=100, seed=0)
    task = Task(model=TwoNN, data=data)
    for round in rounds(FedAvg(client_lr=0.1), task, cohort=0.1, num_rounds=50):
        print(round.number, round.metrics)

Names are imported when they are first used, so that `import potluck` needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from potluck.algorithms import (
        Adagrad,
        Adam,
        Average,
        FedAvg,
        FedProx,
        Momentum,
        Nesterov,
        Scaffold,
        Yogi,
        fed_sgd,
        schedules,
    )
    from potluck.core import (
        ClientAdam,
        ClientAdamW,
        ClientMomentum,
        ClientNesterov,
        ClientSGD,
        Poisson,
        PotluckError,
    )
    from potluck.data import FederatedData, datasets, own_data, partitions
    from potluck.engine import Task, evaluate, federated_evaluation
    from potluck.models import CNN, LogisticRegression, TwoNN
    from potluck.simulation import Auto, Cluster, Loop, Round, Vmap, Workers, rounds

_HOMES = {
    "potluck.algorithms": (
        "Adagrad",
        "Adam",
        "Average",
        "FedAvg",
        "FedProx",
        "Momentum",
        "Nesterov",
        "Scaffold",
        "Yogi",
        "fed_sgd",
        "schedules",
    ),
    "potluck.core": (
        "ClientAdam",
        "ClientAdamW",
        "ClientMomentum",
        "ClientNesterov",
        "ClientSGD",
        "Poisson",
        "PotluckError",
    ),
    "potluck.simulation": ("Auto", "Cluster", "Loop", "Round", "Vmap", "Workers", "rounds"),
    "potluck.data": (
        "FederatedData",
        "datasets",
        "own_data",
        "partitions",
    ),
    "potluck.engine": (
        "Task",
        "evaluate",
        "federated_evaluation",
    ),
    "potluck.models": (
        "CNN",
        "LogisticRegression",
        "TwoNN",
    ),
}

__all__ = [
    "CNN",
    "Adagrad",
    "Adam",
    "Auto",
    "Average",
    "ClientAdam",
    "ClientAdamW",
    "ClientMomentum",
    "ClientNesterov",
    "ClientSGD",
    "Cluster",
    "FedAvg",
    "FedProx",
    "FederatedData",
    "LogisticRegression",
    "Loop",
    "Momentum",
    "Nesterov",
    "Poisson",
    "PotluckError",
    "Round",
    "Scaffold",
    "Task",
    "TwoNN",
    "Vmap",
    "Workers",
    "Yogi",
    "datasets",
    "evaluate",
    "fed_sgd",
    "federated_evaluation",
    "own_data",
    "partitions",
    "rounds",
    "schedules",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    """The installed version; "unknown" of a source tree that runs without being installed."""
    from importlib import metadata

    try:
        return metadata.version("potluck")
    except metadata.PackageNotFoundError:
        return "unknown"
