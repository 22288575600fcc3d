"""The masks of dropout, client by client, for models that train side by side.

A model in training draws its masks from one stream a client. Side by side, the masks of a step are
drawn before it, from each client's own stream in the order in which its layers use them. The layers
then get these masks. So a client has the masks that it would have alone, to the bit.

Known are `functional.dropout`, `dropout1d`, `dropout2d` and `dropout3d`, which the layers of those
names call. Any other draw cannot be vectorised, and is PyTorch's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, overrides
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Draw(NamedTuple):
    """One mask that a step uses."""

    shape: tuple[int, ...]  # for one client
    keep: float  # the probability that an entry stays


class Recording(TorchFunctionMode):
    """Records the masks that a model draws while it runs on one client's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        wanted = _wanted(func, *args, **(kwargs or {})) if func in _DROPOUTS else None
        if wanted is None:
            return func(*args, **(kwargs or {}))
        self.draws.append(wanted.draw)
        return wanted.inputs


class GivenMasks(TorchFunctionMode):
    """Gives the drawn masks to the layers, in order.

    `last` names the function that the model called last: where it stopped, if it did.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self._masks: Iterator[Tensor] = iter(masks)
        self._last: Any = None

    @property
    def last(self) -> str:
        name: str | None = overrides.resolve_name(self._last)
        return name or getattr(self._last, "__name__", "the start")

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self._last = func
        wanted = _wanted(func, *args, **(kwargs or {})) if func in _DROPOUTS else None
        if wanted is None:
            return func(*args, **(kwargs or {}))
        mask = next(self._masks)
        return wanted.inputs.mul_(mask) if wanted.inplace else wanted.inputs * mask


def drawn(draws: Sequence[Draw], streams: Sequence[torch.Generator]) -> list[Tensor]:
    """The masks of one step for the clients whose `streams` these are: [clients, *shape] each."""
    masks = [torch.empty(len(streams), *draw.shape) for draw in draws]
    for row, stream in enumerate(streams):
        for mask, draw in zip(masks, draws, strict=True):
            mask[row].bernoulli_(draw.keep, generator=stream)
    for mask, draw in zip(masks, draws, strict=True):
        mask.div_(draw.keep)
    return masks


class _Wanted(NamedTuple):
    inputs: Tensor
    draw: Draw
    inplace: bool


def _wanted(
    func: Callable[..., Tensor],
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> _Wanted | None:
    """Returns the mask that a call of a dropout function draws; None if it draws nothing."""
    if not training or not 0.0 < p < 1.0:
        return None
    shape = tuple(input.shape)
    channels = _DROPOUTS[func]
    if channels is not None:  # whole channels are dropped
        if len(shape) != channels:
            return None  # without a batch: left to PyTorch, which refuses it side by side
        shape = shape[:2] + (1,) * (len(shape) - 2)
    return _Wanted(input, Draw(shape, 1.0 - p), inplace)


_DROPOUTS: dict[Any, int | None] = {  # with the axes of their inputs, where they drop channels
    functional.dropout: None,
    functional.dropout1d: 3,
    functional.dropout2d: 4,
    functional.dropout3d: 5,
}
