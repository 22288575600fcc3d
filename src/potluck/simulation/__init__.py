"""Federated training on one machine: rounds, executors and run directories."""

from potluck.config.algorithm_section import build_algorithm
from potluck.config.build import build_data, build_task
from potluck.simulation.executors.auto import Auto
from potluck.simulation.executors.choose import make_executor
from potluck.simulation.executors.executor import CohortResult, Executor, Failure, Loop
from potluck.simulation.executors.ray_cluster import Cluster
from potluck.simulation.executors.vmap_executor import Vmap
from potluck.simulation.executors.workers import Workers, available_cores
from potluck.simulation.rounds import Round, rounds
from potluck.simulation.runs.directory import RunRecord, discard_run, read_run, read_weights
from potluck.simulation.runs.train import train

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
