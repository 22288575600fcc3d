"""The `vmap` executor: a cohort as one program.

The client halves of a chunk run until each asks for local training. All are then trained side by
side (`CohortRuntime`), and each gets its result. Clients of similar size share a chunk, so that
they end together. Where all make one step from the same weights, the cohort is one large batch
(`fedsgd`).

A model is first compared with the plain loop on two clients for a few steps (`parity`). One that
cannot be vectorised, or that differs, is trained by the plain loop, and a line of the log "potluck"
says why. When a chunk fails later, its clients are trained one by one, which names the client at
fault.

On a GPU it is another program (`potluck.engine.gpu.chunk_trainer`) for the same clients, and where
the algorithm allows it the updates are summed there (`gpu_sum`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from potluck.core import FixedPointMean, TaskError, Trained, Vector
from potluck.core.validate import as_count
from potluck.data.trees import is_one
from potluck.engine import Evaluator, Task, TorchRuntime, evaluation_batches
from potluck.engine.devices import device_of, kernel_threads, unpacked_rnns
from potluck.engine.evaluation import EVALUATION_BATCH
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.gpu.fedsgd_on_device import PooledOnDevice
from potluck.engine.local_run import LocalRun
from potluck.engine.module.randomness import kept_randomness
from potluck.engine.precision import Precision, check_precision, products
from potluck.engine.task import Remade
from potluck.engine.vmap.cohort_trainer import CohortRuntime
from potluck.models.losses import may_count_nothing
from potluck.simulation.executors.executor import (
    ClientResult,
    CohortResult,
    Outcome,
    RoundClient,
    RoundWork,
    empty_mean,
    started,
    summarise,
    train_client,
)
from potluck.simulation.executors.fedsgd import Pooling
from potluck.simulation.executors.gpu_sum import is_reducible, reduce
from potluck.simulation.executors.parity import (
    TOLERANCE,
    DisagreesError,
    compare,
    shortened,
    tried,
    undrawn,
)

_LOG = logging.getLogger("potluck")
_CHUNK = 256  # clients, beyond which a larger chunk gains nothing
_CHUNK_BYTES = 4 * 2**20  # of the models of a chunk, which the caches of a processor hold
_COPIES = 8  # of each model: weights, gradient, result, what pulls, temporaries
_EVALUATED = 1000  # examples at a time, on a device
_TOLERANCES = {"tf32": 2e-2, "bf16": 0.5}  # of a trial, where products are not of float32


class Vmap:
    """Trains all clients of a chunk as one program, in this process.

    Args:
        task: as for every executor.
        chunk: clients that are trained side by side; by the size of the model if None.
        num_threads: of PyTorch's kernels.
        compiles: compile a step that takes long, where a C++ compiler is at hand. When that is
            depends on the clock, so the bits of a run do not repeat.
        device: "cuda", "cuda:1" or "auto", a GPU if there is one; "cpu" runs the lines for a GPU on
            a CPU, which is for tests. Without it, what is fast on a CPU.
        precision: of products on a device: "float32", "tf32" or "bf16".
    """

    def __init__(
        self,
        task: Task,
        chunk: int | None = None,
        num_threads: int = 1,
        compiles: bool = False,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
    ) -> None:
        if chunk is not None:
            chunk = as_count("chunk", chunk, 1, "Leave it out to fit the model.")
        self._task = task
        self._num_threads = as_count("num_threads", num_threads)
        self._may_skip = may_count_nothing(task.loss, task.data.train.targets)
        self._asked = chunk, compiles, device
        self._precision: Precision = precision
        self._tolerance = _TOLERANCES.get(precision, TOLERANCE)
        self.refused: str | None = None
        """Why the plain loop trains this task; None if it does not."""
        self._model = Remade(task, self._make)
        size = EVALUATION_BATCH if self._device_cohort is None else _EVALUATED
        self._test = evaluation_batches(task, size=size)

    @property
    def placed(self) -> DeviceCohort | None:
        """The trainer on a device, if one was named."""
        return self._device_cohort

    def train(self, work: RoundWork) -> CohortResult:
        """Local training of one cohort."""
        return summarise(*self.train_part(work))

    def train_part(self, work: RoundWork) -> tuple[FixedPointMean, list[ClientResult]]:
        """Trains clients whose sum is a part of a cohort's. Returns the sum, and the outcome of
        each."""
        self.begin(work.seed)
        cohort = work.cohort
        cohort = cohort[np.argsort(-self._task.data.sizes[cohort], kind="stable")]
        mean = empty_mean(work)
        with kept_randomness(), kernel_threads(self._num_threads):
            return mean, list(self.train_clients(work, cohort, mean))

    def begin(self, seed: int) -> None:
        """Trains and evaluates the model of a run with this seed from now on."""
        self._model.begin(seed)

    def train_clients(
        self, work: RoundWork, clients: NDArray[np.int64], mean: FixedPointMean
    ) -> Iterator[ClientResult]:
        """Runs the client halves of these clients into the mean; neighbours are trained side by
        side."""
        fits = self._fits(clients)
        pooled = self._pooling.train(work, clients, mean) if fits.all() else None
        if pooled is not None:
            yield from ((outcome, None) for outcome in pooled)
            return
        done, rest = self._reduced(work, clients[fits], mean)
        yield from ((outcome, None) for outcome in done)
        for i in range(0, len(rest), self.chunk):
            part = rest[i : i + self.chunk]
            yield from self._train(list(started(self._task, work, part, mean)))
        misfits = list(started(self._task, work, clients[~fits], mean))
        self._train_plain(_asking(misfits))
        yield from (client.result for client in misfits)

    def evaluate(self, weights: Vector) -> dict[str, float]:
        """Central evaluation on the task's test examples."""
        self._model.follow()
        self._evaluator.load(weights)
        precise = nullcontext() if self._device_cohort is None else products(self._precision)
        with kernel_threads(self._num_threads), precise, unpacked_rnns():
            return self._evaluator.evaluate(self._test)

    def close(self) -> None:
        """Does nothing: this executor holds no resources to close."""

    def _make(self) -> None:
        """Makes the trainers and the evaluator."""
        task, precision, (chunk, compiles, device) = self._task, self._precision, self._asked
        self._slow: TorchRuntime | None = None
        self._oracle = TorchRuntime(task, fused_from=None)
        self._device_cohort = _placed(task, device, precision, chunk)
        self._cohort: CohortRuntime | DeviceCohort
        if self._device_cohort is None:
            self._cohort = CohortRuntime(task, compiles=compiles)
            self._pooling = Pooling(task, self._oracle)
            self._evaluator = Evaluator(task)
            self.chunk = chunk or chunk_for(self._oracle.spec.num_bytes)
        else:
            self._cohort = placed = self._device_cohort
            pooled = PooledOnDevice(task, placed.device, precision, placed.resident())
            self._pooling = Pooling(task, self._oracle, pooled, self._tolerance)
            self._evaluator = Evaluator(task, placed.device)
            self.chunk = placed.chunk
        self._tried: set[object] = set()  # kinds of corrections that agreed with the plain loop
        self.refused = None

    def _fits(self, cohort: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns the clients whose data may be placed on the device."""
        placed = self._device_cohort
        if placed is None or not placed.misfits:
            return np.ones(len(cohort), bool)
        return np.array([int(client) not in placed.misfits for client in cohort], bool)

    def _reduced(
        self, work: RoundWork, cohort: NDArray[np.int64], mean: FixedPointMean
    ) -> tuple[list[Outcome], NDArray[np.int64]]:
        """Sums on the device where that is possible. Returns the clients in the sum, and the
        others."""
        placed = self._device_cohort
        if placed is None or self.refused is not None or not is_reducible(work.algorithm, placed):
            return [], cohort
        if self._may_skip:  # whose losses are checked before they are in a sum
            return [], cohort
        clients = list(started(self._task, work, cohort, empty_mean(work)))
        runs = [client.run for client in clients if client.run is not None]
        if len(runs) < len(clients) or not runs:
            return [], cohort
        try:
            self._check_parity(runs)
            done, left = reduce(cohort.tolist(), runs, work.received, placed, mean)
        except Exception:  # as in `_train`, which logs the reason
            return [], cohort
        return done, np.array(left, np.int64)

    def _train(self, clients: Sequence[RoundClient]) -> list[ClientResult]:
        """Answers the clients of a chunk together until each ends."""
        while (asking := _asking(clients)) and self.refused is None:
            try:
                for alike in _alike(asking):
                    self._answer(alike)
            except Exception as error:  # of the model, or of one client's data
                plain = self._train_plain(asking)
                if all(outcome.failure is None for outcome, _ in plain):
                    self._refuse(error)
        self._train_plain(_asking(clients))
        return [client.result for client in clients]

    @property
    def _plain(self) -> TorchRuntime:
        """The runtime for a model, or one client, that cannot be vectorised."""
        if self._slow is None:
            self._slow = TorchRuntime(self._task, one_thread=self._num_threads == 1)
        return self._slow

    def _train_plain(self, asking: Iterable[tuple[RoundClient, LocalRun]]) -> list[ClientResult]:
        return [train_client(client, self._plain) for client, _ in asking]

    def _check_parity(self, runs: Sequence[LocalRun]) -> None:
        """Compares with the plain loop, unless corrections of this kind were compared before.

        Raises:
            Exception: it cannot be vectorised, or differs.
        """
        kind = _kind(runs[0])
        if kind not in self._tried and self._try(runs[:2]):
            self._tried.add(kind)

    def _answer(self, asking: Sequence[tuple[RoundClient, LocalRun]]) -> None:
        """Trains the requests of clients side by side, with corrections of one kind.

        Raises:
            Exception: it cannot be.
        """
        runs = [run for _, run in asking]
        self._check_parity(runs)
        weights, losses = self._cohort.train(runs)
        if self._may_skip and not np.isfinite(losses).all():  # the loop skips the right steps
            raise DisagreesError("its loss is not finite where a batch counts nothing")
        for (client, run), row, loss in zip(asking, weights, losses.tolist(), strict=True):
            client.answer(Trained(row, loss, len(run.steps)))

    def _try(self, runs: Sequence[LocalRun]) -> bool:
        """Compares a few steps with the plain loop's. Returns whether there was a verdict.

        Raises:
            DisagreesError: they differ.
        """
        expected = [tried(self._oracle, run) for run in runs]
        runs = [shortened(run) for run in runs]
        with undrawn():
            weights, losses = self._cohort.train(runs)
        said = [
            compare(self._plain.spec, run.start, Trained(row, loss, 0), other, self._tolerance)
            for run, row, loss, other in zip(runs, weights, losses.tolist(), expected, strict=True)
        ]
        return all(said)

    def _refuse(self, error: Exception) -> None:
        self.refused = str(error).splitlines()[0] if str(error) else type(error).__name__
        _LOG.warning("vmap cannot train this model, so loop does. %s", self.refused)


def _placed(
    task: Task, device: str | torch.device | None, precision: Precision, chunk: int | None
) -> DeviceCohort | None:
    """Places the clients of a task on a device, if one was named."""
    if device is None:
        if precision != "float32":
            raise ValueError(
                f"precision must be 'float32' without a device, got precision={precision!r}. "
                "Name a GPU as the device."
            )
        return None
    device = device_of(device) if isinstance(device, str) else device
    check_precision(precision, device)
    if not is_one(task.data.train.inputs):
        raise TaskError(
            "the inputs of an example must be one array on a GPU, got several together, device="
            f"{str(device)!r}. Leave the device out, or put them into one array."
        )
    return DeviceCohort(task, device, precision, chunk)


def chunk_for(model_bytes: int) -> int:
    """Returns how many clients are trained side by side. It depends on the machine alone, not on
    its present load, since the same chunks give the same bits."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = physical // 8 // (_COPIES * model_bytes)
    return int(max(min(_CHUNK, max(_CHUNK_BYTES // model_bytes, 4), fits), 1))


def _kind(run: LocalRun) -> object:
    """Returns the properties that runs must share to be trained side by side."""
    clip, proximal, drift = run.correction
    return run.optimizer, clip, proximal, drift is None, len(run.start)


def _asking(clients: Iterable[RoundClient]) -> list[tuple[RoundClient, LocalRun]]:
    """Returns the clients that wait for local training, and their requests."""
    return [(client, client.run) for client in clients if client.run is not None]


def _alike(
    asking: Iterable[tuple[RoundClient, LocalRun]],
) -> Iterable[list[tuple[RoundClient, LocalRun]]]:
    """Groups the clients by the kind of their corrections; almost always there is one."""
    kinds: dict[object, list[tuple[RoundClient, LocalRun]]] = {}
    for client, run in asking:
        kinds.setdefault(_kind(run), []).append((client, run))
    return kinds.values()
