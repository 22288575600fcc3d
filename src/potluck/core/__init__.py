"""Vectors, seeds, cohorts, updates and errors: what everything else is made of."""

from potluck.core.averaging import FixedPointMean
from potluck.core.cohorts import Poisson, sample_cohort
from potluck.core.correction import Correction
from potluck.core.errors import (
    ChecksumError,
    ConfigError,
    DataError,
    DivergedError,
    DownloadError,
    PotluckError,
    ProtocolError,
    RefusedError,
    RunError,
    StorageError,
    TrainingError,
    WorkerError,
)
from potluck.core.seeds import derive_seed, stream
from potluck.core.spec import Spec
from potluck.core.update import Update, Vector

__all__ = [
    "ChecksumError",
    "ConfigError",
    "Correction",
    "DataError",
    "DivergedError",
    "DownloadError",
    "FixedPointMean",
    "Poisson",
    "PotluckError",
    "ProtocolError",
    "RefusedError",
    "RunError",
    "Spec",
    "StorageError",
    "TrainingError",
    "Update",
    "Vector",
    "WorkerError",
    "derive_seed",
    "sample_cohort",
    "stream",
]
