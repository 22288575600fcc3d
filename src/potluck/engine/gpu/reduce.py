"""The weighted sum of updates on their device, to the bits of `FixedPointMean`.

    sum ← sum + Σ_k rint(weight_k · 2³⁰ · (local_k − received))            in 64-bit integers

A difference is rounded once to float32, scaled and rounded to an integer in float64, as in
`potluck.core.fixed_point`; integers add up exactly in any order. What leaves the device is the
largest entry of each update and, at the end, one sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.core import FixedPointMean, Spec, Vector
from potluck.engine.devices import on_stream, sent, synchronise
from potluck.engine.gpu.chunk import Program

_ENTRIES = 2**24  # that are converted at a time


class DeviceSum:
    """A running sum over chunks of clients that all started from the same weights."""

    def __init__(self, spec: Spec, received: Vector, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._received = spec.unflatten(sent(received, device))
        synchronise(device)  # it is read on other streams than this
        self._sums: dict[Any, Tensor] = {}  # one for each stream

    def largest(self, program: Program, clients: int) -> NDArray[np.float32]:
        """The largest |entry| of each client's update; NaN if one is."""
        found = [
            self._delta(program, name, slice(0, clients)).abs().amax(1) for name in self._spec.names
        ]
        return torch.stack(found).amax(0).cpu().numpy()

    def add(self, program: Program, weights: NDArray[np.float64]) -> None:
        """Adds the updates of the first clients; one of weight 0 is left out."""
        if program.stream not in self._sums:
            empty = torch.zeros(self._spec.dim, dtype=torch.int64, device=self._device)
            self._sums[program.stream] = empty
        total = self._sums[program.stream]
        scales = sent(weights * FixedPointMean.scale, self._device).unsqueeze(1)
        counts = sent(weights > 0.0, self._device).unsqueeze(1)
        for name, start, size in zip(
            self._spec.names, self._spec.offsets, self._spec.sizes, strict=False
        ):
            place = total[start : start + size]
            step = max(_ENTRIES // max(size, 1), 1)
            for first in range(0, len(weights), step):
                part = slice(first, min(first + step, len(weights)))
                scaled = (self._delta(program, name, part).double() * scales[part]).round()
                place += torch.where(counts[part], scaled, 0.0).long().sum(0)

    def take(self) -> NDArray[np.int64]:
        """The sum of all that was added, on the host."""
        total = np.zeros(self._spec.dim, np.int64)
        for stream, partial in self._sums.items():
            with on_stream(stream):
                total += partial.cpu().numpy()
        return total

    def _delta(self, program: Program, name: str, clients: slice) -> Tensor:
        """Local less received, in float32: [clients, size]."""
        received = self._received[name].reshape(1, -1)
        return program.weights[name][clients].flatten(1) - received
