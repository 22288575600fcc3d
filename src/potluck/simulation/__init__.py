"""Federated training on one machine: rounds, executors and run directories."""

from potluck.simulation.auto import Auto
from potluck.simulation.build import build_algorithm, build_data, build_task
from potluck.simulation.by_name import make_executor
from potluck.simulation.cluster import Cluster
from potluck.simulation.directory import RunRecord, discard_run, read_run, read_weights
from potluck.simulation.executors import CohortResult, Executor, Failure, Loop
from potluck.simulation.rounds import Round, rounds
from potluck.simulation.runs import train
from potluck.simulation.vmap import Vmap
from potluck.simulation.workers import Workers, available_cores

__all__ = [
    "Auto",
    "Cluster",
    "CohortResult",
    "Executor",
    "Failure",
    "Loop",
    "Round",
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
