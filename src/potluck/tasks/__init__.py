"""Tasks: data sets, partitions, models, losses, metrics, evaluation and local training."""

from potluck.tasks import datasets, own_data, partitions
from potluck.tasks.data import Dataset, Examples, FederatedData, divide
from potluck.tasks.evaluation import (
    Evaluator,
    FederatedMetric,
    batches_of,
    evaluate,
    federated_evaluation,
    means,
)
from potluck.tasks.local import TorchRuntime
from potluck.tasks.metrics import Loss, Metric, accuracy, cross_entropy, mean_squared_error
from potluck.tasks.models import CNN, LogisticRegression, TwoNN
from potluck.tasks.task import Task, averaged_tensors, bind, spec_of

__all__ = [
    "CNN",
    "Dataset",
    "Evaluator",
    "Examples",
    "FederatedData",
    "FederatedMetric",
    "LogisticRegression",
    "Loss",
    "Metric",
    "Task",
    "TorchRuntime",
    "TwoNN",
    "accuracy",
    "averaged_tensors",
    "batches_of",
    "bind",
    "cross_entropy",
    "datasets",
    "divide",
    "evaluate",
    "federated_evaluation",
    "mean_squared_error",
    "means",
    "own_data",
    "partitions",
    "spec_of",
]
