"""Networks, losses and metrics."""

from potluck.models.language import CharLSTM, PeepholeCharLSTM, WordLSTM
from potluck.models.losses import (
    Loss,
    PerCharacter,
    PerStep,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
)
from potluck.models.task_metrics import (
    CharacterAccuracy,
    Metric,
    RootMeanSquaredError,
    RSquared,
    Statistic,
    accuracy,
    mean_absolute_error,
)
from potluck.models.vision import CNN, LogisticRegression, TwoNN

__all__ = [
    "CNN",
    "CharLSTM",
    "CharacterAccuracy",
    "LogisticRegression",
    "Loss",
    "Metric",
    "PeepholeCharLSTM",
    "PerCharacter",
    "PerStep",
    "RSquared",
    "RootMeanSquaredError",
    "Statistic",
    "TwoNN",
    "WordLSTM",
    "accuracy",
    "binary_cross_entropy",
    "cross_entropy",
    "mean_absolute_error",
    "mean_squared_error",
]
