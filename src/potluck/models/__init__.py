"""Networks, losses and metrics."""

from potluck.models.language import CharLSTM, PeepholeCharLSTM, WordLSTM
from potluck.models.losses import (
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
