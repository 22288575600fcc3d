"""Federated algorithms, one paper per file, each two pure halves."""

from potluck.algorithms.fedavg import FedAvg, ServerState, fed_sgd
from potluck.algorithms.runtime import Algorithm, Runtime
from potluck.algorithms.server import Average, OptimizerState, ServerOptimizer

__all__ = [
    "Algorithm",
    "Average",
    "FedAvg",
    "OptimizerState",
    "Runtime",
    "ServerOptimizer",
    "ServerState",
    "fed_sgd",
]
