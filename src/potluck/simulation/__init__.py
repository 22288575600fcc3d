"""Federated training on one machine: rounds, executors and run directories.

The executors that not every run needs are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from potluck.config.algorithm_section import build_algorithm
from potluck.config.build import build_data, build_task
from potluck.simulation.executors.choose import make_executor
from potluck.simulation.executors.executor import CohortResult, Executor, Failure, RoundWork
from potluck.simulation.executors.loop import Loop
from potluck.simulation.executors.workers import Workers, available_cores
from potluck.simulation.rounds import Round, rounds
from potluck.simulation.runs.directory import RunRecord, discard_run, read_run, read_weights
from potluck.simulation.runs.train import train

if TYPE_CHECKING:
    from potluck.simulation.executors.auto import Auto
    from potluck.simulation.executors.ray_cluster import Cluster
    from potluck.simulation.executors.vmap_executor import Vmap

_LATER = {"Auto": "auto", "Cluster": "ray_cluster", "Vmap": "vmap_executor"}

__all__ = [
    "Auto",
    "Cluster",
    "CohortResult",
    "Executor",
    "Failure",
    "Loop",
    "Round",
    "RoundWork",
    "RunRecord",
    "Vmap",
    "Workers",
    "available_cores",
    "build_algorithm",
    "build_data",
    "build_task",
    "discard_run",
    "make_executor",
    "read_run",
    "read_weights",
    "rounds",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'potluck.simulation' has no attribute {name!r}")
    return getattr(import_module(f"potluck.simulation.executors.{_LATER[name]}"), name)
