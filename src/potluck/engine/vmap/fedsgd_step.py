"""One step that many clients make from the same weights: one large batch.

Where every client makes a single step from w (FedSGD), the weighted mean of their results is a step
down the weighted mean of their gradients. That is the gradient of one weighted loss:

    Σ_k share_k (w − lr ∇ℓ_k(w)) = w − lr ∇ Σ_k share_k ℓ_k(w)        with Σ_k share_k = 1

So the examples of all clients go through the model together. Its weights are read once instead of
once a client, and no client's gradient is ever written. This holds for models that treat each
example by itself, without batch normalization or dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.core import Vector
from potluck.data.trees import called, mapped
from potluck.engine.devices import sent
from potluck.engine.runtime import ModelWithLoss
from potluck.engine.task import Task, bind, spec_of
from potluck.models.losses import by_example

_EXAMPLES = 1000  # that go through the model together, at least one client's


class SharedModel:
    """One module in training mode, whose weights are shared by all clients, and its loss."""

    def __init__(self, task: Task, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        with_loss = ModelWithLoss(task)
        self.module, self.loss = with_loss.module.to(self._device), with_loss.loss
        self._vector = torch.zeros(spec_of(self.module).dim, device=self._device)
        bind(self.module, self._vector)
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]

    def descend(self, start: Vector, losses: Iterable[Tensor], lr: float) -> Vector:
        """Makes one step from `start` down the sum of some losses, each computed when it is
        needed."""
        self._vector.copy_(sent(start, self._device))
        sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        for loss in losses:
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:  # type: ignore[reportUnnecessaryComparison]
                    total += gradient
        with torch.no_grad():
            for parameter, total in zip(self._parameters, sums, strict=True):
                parameter.add_(total, alpha=-lr)
        return self._vector.cpu().numpy().copy()


class PooledStep:
    """The step of one task on a CPU, for any loss."""

    def __init__(self, task: Task) -> None:
        self._data, self._model = task.data.train, SharedModel(task)

    def step(
        self,
        start: Vector,
        batches: Sequence[NDArray[np.int64]],
        shares: NDArray[np.float64],
        lr: float,
    ) -> tuple[Vector, list[float]]:
        """The weighted mean of the clients' weights after their step, and their losses.

        Args:
            batches: the rows of the packed examples, one array a client.
            shares: of the clients in the mean: [clients], their sum is 1.
        """
        losses: list[float] = []

        def pooled() -> Iterator[Tensor]:
            for part in _parts(batches):
                found = self._losses(batches[part])
                losses.extend(cast("list[float]", found.tolist()))
                yield found @ torch.from_numpy(shares[part]).float()

        return self._model.descend(start, pooled(), lr), losses

    def _losses(self, batches: Sequence[NDArray[np.int64]]) -> Tensor:
        """The loss of each client: [clients]."""
        rows = np.concatenate(batches)
        inputs, targets = mapped(
            lambda array: torch.from_numpy(array.take(rows, axis=0)), tuple(self._data)
        )
        outputs: Any = called(self._model.module, inputs)
        sizes = [len(batch) for batch in batches]
        known = by_example(self._model.loss, targets.ndim, targets.dtype)
        if known is None:
            ends = np.cumsum(sizes).tolist()
            slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
            return torch.stack([self._model.loss(outputs[one], targets[one]) for one in slices])
        owners = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        sums = torch.zeros(len(sizes)).index_add(0, owners, known.sums(outputs, targets))
        counts = torch.zeros(len(sizes)).index_add(0, owners, known.counts(targets))
        return sums / counts.clamp(min=1.0)


def _parts(batches: Sequence[NDArray[np.int64]]) -> list[slice]:
    """The clients in order, in parts of about as many examples as go together."""
    sizes = np.array([len(batch) for batch in batches])
    number = (np.cumsum(sizes) - sizes) // _EXAMPLES
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(batches)], strict=True)]
