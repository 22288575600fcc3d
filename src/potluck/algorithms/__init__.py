"""Federated algorithms and server optimizers, one paper per file, in two pure halves."""

from potluck.algorithms import schedules
from potluck.algorithms.contract import Algorithm, ClientHalf, client_update
from potluck.algorithms.fedavg import FedAvg, fed_sgd
from potluck.algorithms.fedavgm import Momentum, Nesterov
from potluck.algorithms.fedopt import Adagrad, Adam, Yogi
from potluck.algorithms.fedprox import FedProx
from potluck.algorithms.local_sgd import LocalTraining
from potluck.algorithms.scaffold import Scaffold
from potluck.algorithms.schedules import Schedule
from potluck.algorithms.server_optimizer import (
    Average,
    OptimizerState,
    ServerOptimizer,
    ServerState,
)
from potluck.algorithms.statistics import (
    num_wide,
    reports_its_model,
    with_statistics,
    without_statistics,
)

__all__ = [
    "Adagrad",
    "Adam",
    "Algorithm",
    "Average",
    "ClientHalf",
    "FedAvg",
    "FedProx",
    "LocalTraining",
    "Momentum",
    "Nesterov",
    "OptimizerState",
    "Scaffold",
    "Schedule",
    "ServerOptimizer",
    "ServerState",
    "Yogi",
    "client_update",
    "fed_sgd",
    "num_wide",
    "reports_its_model",
    "schedules",
    "with_statistics",
    "without_statistics",
]
