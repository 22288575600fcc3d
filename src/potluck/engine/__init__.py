"""Local training and evaluation of a task's model in PyTorch."""

from potluck.engine.evaluation import (
    Evaluator,
    FederatedMetric,
    evaluate,
    evaluation_batches,
    federated_evaluation,
    means,
)
from potluck.engine.local_run import LocalRun, run_of
from potluck.engine.runtime import TorchRuntime
from potluck.engine.task import Task, averaged_tensors, bind, spec_of

__all__ = [
    "Evaluator",
    "FederatedMetric",
    "LocalRun",
    "Task",
    "TorchRuntime",
    "averaged_tensors",
    "bind",
    "evaluate",
    "evaluation_batches",
    "federated_evaluation",
    "means",
    "run_of",
    "spec_of",
]
