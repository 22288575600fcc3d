"""Tasks: data sets, partitions, models, losses, metrics, evaluation and local training."""

from potluck.tasks import datasets, own_data, partitions
from potluck.tasks.cohort import CohortRuntime, LocalRun
from potluck.tasks.data import Dataset, Examples, FederatedData, divide
from potluck.tasks.evaluation import (
    Evaluator,
    FederatedMetric,
    evaluate,
    evaluation_batches,
    federated_evaluation,
    means,
)
from potluck.tasks.language import CharLSTM, PeepholeCharLSTM, WordLSTM
from potluck.tasks.local import TorchRuntime
from potluck.tasks.metrics import (
    CharacterAccuracy,
    Loss,
    Metric,
    PerCharacter,
    PerStep,
    RootMeanSquaredError,
    RSquared,
    Statistic,
    accuracy,
    binary_cross_entropy,
    cross_entropy,
    mean_absolute_error,
    mean_squared_error,
)
from potluck.tasks.models import CNN, LogisticRegression, TwoNN
from potluck.tasks.schema import Schema
from potluck.tasks.task import Task, averaged_tensors, bind, spec_of

__all__ = [
    "CNN",
    "CharLSTM",
    "CharacterAccuracy",
    "CohortRuntime",
    "Dataset",
    "Evaluator",
    "Examples",
    "FederatedData",
    "FederatedMetric",
    "LocalRun",
    "LogisticRegression",
    "Loss",
    "Metric",
    "PeepholeCharLSTM",
    "PerCharacter",
    "PerStep",
    "RSquared",
    "RootMeanSquaredError",
    "Schema",
    "Statistic",
    "Task",
    "TorchRuntime",
    "TwoNN",
    "WordLSTM",
    "accuracy",
    "averaged_tensors",
    "binary_cross_entropy",
    "bind",
    "cross_entropy",
    "datasets",
    "divide",
    "evaluate",
    "evaluation_batches",
    "federated_evaluation",
    "mean_absolute_error",
    "mean_squared_error",
    "means",
    "own_data",
    "partitions",
    "spec_of",
]
