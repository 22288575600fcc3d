"""Every error that Potluck raises on purpose.

    PotluckError
    ├── DataError          a data file, client or label that cannot be used
    │   ├── ChecksumError  a file that is not the one that was published
    │   └── DownloadError  no host gave the file
    ├── ConfigError        an experiment file that cannot be used
    ├── TaskError          a model, loss or metric that does not fit its contract or data
    ├── RunError           a run directory that cannot be opened, written or continued
    ├── TrainingError      local training failed at a named client and round
    │   └── DivergedError  its loss or weights are no longer finite
    ├── WorkerError        a worker process died or failed
    ├── AbandonedError     too few devices came or reported, attempt after attempt
    ├── StorageError       a server's database or blobs cannot be read or written now
    │   └── LostError      what was stored is missing, short or damaged
    └── CodedError         something is refused, with a code for programs
        ├── ProtocolError  bytes from the network
        └── RefusedError   what a device or an operator asked of a server

A mistake in an argument of a function is a plain `ValueError` or `TypeError`; `DataError`,
`ConfigError` and `TaskError` are `ValueError`s too. Each message says what was expected, what was
got (name = value) and what to do.
"""

from __future__ import annotations


class PotluckError(Exception):
    """The root: catch it to catch everything that Potluck raises on purpose."""


class DataError(PotluckError, ValueError):
    """A data file, client or label that cannot be used."""


class ChecksumError(DataError):
    """A file that is not the one that was published."""


class DownloadError(DataError):
    """No host gave the file."""


class ConfigError(PotluckError, ValueError):
    """An experiment file that cannot be used."""


class TaskError(PotluckError, ValueError):
    """A model, loss or metric that breaks its contract, or does not fit the data."""


class RunError(PotluckError):
    """A run directory that cannot be opened, written or continued."""


class TrainingError(PotluckError):
    """Local training failed; the message names the client and the round."""


class DivergedError(TrainingError):
    """The loss or the weights of a client are no longer finite."""


class WorkerError(PotluckError):
    """A worker process died or failed."""


class AbandonedError(PotluckError):
    """Too few devices came or reported, attempt after attempt."""


class StorageError(PotluckError):
    """A server's database or blobs cannot be read or written now; what was acknowledged is safe."""


class CodedError(PotluckError):
    """A refusal: `code` is one word for programs, the message is for people.

    A server's codes are those of the protocol (`protocol.ErrorCode`), in its functions and in its
    answers.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both in `args`, so that it survives pickling
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class ProtocolError(CodedError):
    """Bytes from the network that are refused."""


class RefusedError(CodedError):
    """A server does not do what was asked."""


class LostError(StorageError):
    """What was stored is missing, short or damaged, in a store that can be read."""
