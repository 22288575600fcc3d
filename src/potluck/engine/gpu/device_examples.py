"""The training examples of all clients on a device: placed there once, or a chunk's at a time.

Where they fit beside the models they are copied when training begins and stay; batches are then
gathered on the device, and a round sends row numbers. Where they do not, the rows that a chunk of
clients needs are copied before it is trained.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.data.federated import Examples
from potluck.engine.devices import sent


class Resident:
    """Packed examples on a device.

    Args:
        bytes_there: how much memory the examples may take for good.
    """

    def __init__(self, examples: Examples, device: torch.device, bytes_there: float) -> None:
        self._examples, self._device = examples, device
        self.is_whole = examples.inputs.nbytes + examples.targets.nbytes <= bytes_there
        if self.is_whole:
            self.inputs = sent(examples.inputs, device)
            self.targets = sent(examples.targets, device)
        else:
            self.inputs, self.targets = self._room(0)

    def place(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
        """Makes sure that these rows are on the device.

        Returns:
            Where they are in `inputs` and `targets`, and whether those are other tensors than
            before, which a captured graph does not read.
        """
        if self.is_whole:
            return rows, False
        needed, places = np.unique(rows, return_inverse=True)
        moved = len(needed) > len(self.inputs)
        if moved:
            self.inputs, self.targets = self._room(len(needed))
        for room, array in zip((self.inputs, self.targets), self._examples, strict=True):
            room[: len(needed)].copy_(sent(array[needed], self._device))
        return places.reshape(rows.shape).astype(np.int64), moved

    def _room(self, count: int) -> tuple[Tensor, Tensor]:
        inputs, targets = (
            torch.zeros(count, *array.shape[1:], dtype=torch.tensor(array[:0]).dtype)
            for array in self._examples
        )
        return inputs.to(self._device), targets.to(self._device)
