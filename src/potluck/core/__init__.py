"""Vectors, seeds, cohorts, updates and errors: what everything else is made of."""

from potluck.core.client_optimizer import (
    PLAIN_SGD,
    ClientAdam,
    ClientAdamW,
    ClientMomentum,
    ClientNesterov,
    ClientOptimizer,
    ClientSGD,
)
from potluck.core.codecs import (
    CODECS,
    Codec,
    check_codec,
    decode_vector,
    encode_update,
    encoded_bytes,
    update_bytes,
)
from potluck.core.cohorts import Poisson, sample_cohort
from potluck.core.direction import higher_is_better
from potluck.core.errors import (
    AbandonedError,
    ChecksumError,
    CodedError,
    ConfigError,
    DataError,
    DivergedError,
    DownloadError,
    PotluckError,
    ProtocolError,
    RefusedError,
    RunError,
    StorageError,
    TaskError,
    TrainingError,
    WorkerError,
)
from potluck.core.fixed_point import FixedPointMean
from potluck.core.local_training import ClientContext, Correction, LocalSGD, LocalWork, Trained
from potluck.core.seeds import derive_seed, stream
from potluck.core.spec import Role, Spec
from potluck.core.target import Target, is_result, main_metric
from potluck.core.update import Update, Vector

__all__ = [
    "CODECS",
    "PLAIN_SGD",
    "AbandonedError",
    "ChecksumError",
    "ClientAdam",
    "ClientAdamW",
    "ClientContext",
    "ClientMomentum",
    "ClientNesterov",
    "ClientOptimizer",
    "ClientSGD",
    "Codec",
    "CodedError",
    "ConfigError",
    "Correction",
    "DataError",
    "DivergedError",
    "DownloadError",
    "FixedPointMean",
    "LocalSGD",
    "LocalWork",
    "Poisson",
    "PotluckError",
    "ProtocolError",
    "RefusedError",
    "Role",
    "RunError",
    "Spec",
    "StorageError",
    "Target",
    "TaskError",
    "Trained",
    "TrainingError",
    "Update",
    "Vector",
    "WorkerError",
    "check_codec",
    "decode_vector",
    "derive_seed",
    "encode_update",
    "encoded_bytes",
    "higher_is_better",
    "is_result",
    "main_metric",
    "sample_cohort",
    "stream",
    "update_bytes",
]
