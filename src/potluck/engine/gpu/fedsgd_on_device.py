"""One step that many clients make from the same weights, as one batch on a device.

    Σ_k share_k ℓ_k(w) = Σ_i u_i sum_i      u_i = share_k / count_k for the examples i of client k

As `potluck.engine.vmap.fedsgd_step`, with the loss taken apart (`by_example`): every example has a
weight of its own, so that the examples of all clients share a batch however they are ordered.
Sequences are ordered by length, so that little is padded. The module is PyTorch's, with its own
kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.core import Vector
from potluck.data.federated import lengths, trimmed
from potluck.engine.devices import free_bytes, sent, unpacked_rnns
from potluck.engine.gpu.device_examples import Resident
from potluck.engine.precision import Precision, autocast, products
from potluck.engine.task import Task
from potluck.engine.vmap.fedsgd_step import SharedModel
from potluck.models.losses import by_example

_OUTPUTS = 2**27  # logits that are made at a time, or so
_BYTES = 640  # of free memory that there must be for each of them
_EXAMPLES = 8192  # at most, at a time


class PooledOnDevice:
    """The step of one task on a device, for losses that are known."""

    def __init__(
        self, task: Task, device: torch.device, precision: Precision, resident: Resident
    ) -> None:
        train = task.data.train
        targets = torch.tensor(train.targets[:1])
        self._loss = by_example(task.loss, targets.ndim, targets.dtype)
        self._device = device
        self._precision: Precision = precision
        self._resident = resident
        self._padding = task.data.padding
        self._lengths = None if self._padding is None else lengths(train.inputs, self._padding)
        width = train.inputs.shape[1] if self._padding is not None else 1
        outputs = min(_OUTPUTS, free_bytes(device) // _BYTES)
        self._examples = max(min(outputs // (width * max(task.data.num_classes, 1)), _EXAMPLES), 1)
        self._model = SharedModel(task, device)

    def step(
        self,
        start: Vector,
        batches: Sequence[NDArray[np.int64]],
        shares: NDArray[np.float64],
        lr: float,
    ) -> tuple[Vector, list[float]]:
        """As `PooledStep.step`.

        Raises:
            ValueError: the loss is not known.
        """
        if self._loss is None:
            raise ValueError("a loss must be known to be taken apart")
        rows = np.concatenate(batches)
        owners = np.repeat(np.arange(len(batches)), [*map(len, batches)])
        if self._lengths is not None:
            order = np.argsort(self._lengths[rows], kind="stable")
            rows, owners = rows[order], owners[order]
        owner, share = sent(owners, self._device), sent(shares, self._device).float()
        here, _ = self._resident.place(rows)
        place = sent(here, self._device)
        count = self._counts(place, owner, len(batches))
        totals = torch.zeros(len(batches), device=self._device)

        def pooled() -> Iterator[Tensor]:
            for part in self._parts(len(rows)):
                mine = owner[part]
                width = 0 if self._lengths is None else int(self._lengths[rows[part]].max())
                found = self._sums(place[part], max(width, 1))
                totals.index_add_(0, mine, found.detach())
                yield (found * (share / count)[mine]).sum()

        with products(self._precision), unpacked_rnns():
            local = self._model.descend(start, pooled(), lr)
        return local, cast("list[float]", (totals / count).tolist())

    def _parts(self, count: int) -> list[slice]:
        return [slice(i, min(i + self._examples, count)) for i in range(0, count, self._examples)]

    def _sums(self, rows: Tensor, width: int) -> Tensor:
        """Returns what each example adds to its client's loss."""
        inputs, targets = self._batch(rows)
        if self._padding is not None:
            inputs, targets = trimmed(inputs, targets, width)
        assert self._loss is not None
        with autocast(self._precision, self._device):
            return self._loss.sums(self._model.module(inputs), targets)

    def _counts(self, rows: Tensor, owners: Tensor, clients: int) -> Tensor:
        """Returns the number of predictions that each client's loss is the mean over."""
        assert self._loss is not None
        counts = torch.zeros(clients, device=self._device)
        for part in self._parts(len(rows)):
            _, targets = self._batch(rows[part])
            counts.index_add_(0, owners[part], self._loss.counts(targets))
        return counts.clamp(min=1.0)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._resident.inputs.index_select(0, rows), self._resident.targets.index_select(
            0, rows
        )
