"""One local step of many clients at once, for any model that `torch.func.vmap` can vectorise.

The gradient is that of the pure loss (`ModelWithLoss.at`), mapped over the clients. Averaged
buffers and counters are inputs and results of it, so that a client's running statistics are its
own. What dropout draws comes from each client's stream (`potluck.engine.vmap.dropout`).

Batches are stacked if they have one shape. Where the model has counters, their clients must have
counted alike, since a model may compute with one number what it cannot with many.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from potluck.core import Spec
from potluck.data.federated import lengths, trimmed
from potluck.data.trees import leaves, mapped
from potluck.engine.corrected_step import Descent
from potluck.engine.module.plain import has_hooks
from potluck.engine.runtime import ModelWithLoss
from potluck.engine.task import Task, averaged_tensors
from potluck.engine.vmap.compile_later import CompiledLater
from potluck.engine.vmap.dropout import Draw, GivenMasks, Recording, drawn

_Tensors = Mapping[str, Tensor]


class Vectorised:
    """The step of one task's model."""

    def __init__(
        self,
        task: Task,
        spec: Spec,
        *,
        compiles: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._data, self._padding = task.data.train, task.data.padding
        self.by_size = self._padding is None
        self._with_loss = ModelWithLoss(task)
        module = self._with_loss.module.to(self._device)
        self._trained = [n for n, p in module.named_parameters() if p.requires_grad]
        self._frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
        self._buffers = [n for n in spec.names if n not in {*self._trained, *self._frozen}]
        averaged = {name for name, _ in averaged_tensors(module)}
        self._start = {n: b.clone() for n, b in module.named_buffers() if n not in averaged}
        self._counters: list[_Tensors] = []
        self._streams: list[torch.Generator] = []
        self._draws: dict[Hashable, list[Draw]] = {}
        self._reached: dict[Hashable, list[str]] = {}
        self._has_draws: bool | None = None  # unknown before the first step
        self._given = GivenMasks(())
        self._is_known = False  # that the model can be vectorised
        self._gradient = self._mapped(self._loss)
        plain = self._mapped(self._plain_loss)
        self._plain_gradient = CompiledLater(plain) if compiles else plain

    def begin(self, seeds: Sequence[int]) -> None:
        """Starts clients with these seeds, none of which has made a step."""
        self._counters = [self._start] * len(seeds)
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def key(self, client: int, rows: NDArray[np.int64]) -> Hashable:
        """The shape of the batch and what has been counted."""
        counted = tuple(c.cpu().numpy().tobytes() for c in self._counters[client].values())
        # Masks are drawn for the steps that are not padding in the batch of one client.
        return len(rows), counted, self._width(rows) if self._has_draws is not False else 0

    def step(
        self,
        weights: _Tensors,
        clients: Sequence[int],
        batches: Sequence[NDArray[np.int64]],
        lr: float,
        descent: Descent,
    ) -> Tensor:
        """One local step of every client, in place; returns their losses [clients]."""
        if not self._is_known:
            refuse_hooks(self._with_loss)
        inputs, targets = self._stacked(batches)
        counters = self._counters[clients[0]]
        trained, frozen, buffers = (
            {name: weights[name] for name in names}
            for names in (self._trained, self._frozen, self._buffers)
        )
        one = mapped(lambda part: part[0], inputs)
        draws = self._draws_for(weights, counters, one, targets[0])
        masks = drawn(draws, [self._streams[client] for client in clients])
        masks = [mask.to(self._device) for mask in masks]
        try:
            if self._is_known and not masks:
                gradients, (losses, state) = self._plain_gradient(
                    trained, frozen, buffers, counters, inputs, targets
                )
            else:
                with nullcontext() if self._is_known else slow_operators_refused():
                    gradients, (losses, state) = self._gradient(
                        trained, frozen, buffers, counters, inputs, targets, masks
                    )
                self._is_known = True
        except Exception as error:
            first, *_ = (str(error) or "failed").splitlines()
            raise RuntimeError(f"at {self._given.last}: {type(error).__name__}: {first}") from error
        if not descent.is_plain:  # for which a gradient of 0 is not none
            reached = self._reached_by(weights, counters, one, targets[0])
            gradients = {name: gradients[name] for name in reached}
        with torch.no_grad():
            descent.take(trained, gradients, lr)
            for name in self._buffers:
                weights[name].copy_(state[name])
        if self._start:
            counted = {name: state[name][0] for name in self._start}
            for client in clients:
                self._counters[client] = counted
        return losses

    def _loss(
        self,
        trained: _Tensors,
        frozen: _Tensors,
        buffers: _Tensors,
        counters: _Tensors,
        inputs: Any,
        targets: Tensor,
        masks: Sequence[Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one client's batch with these masks, and its buffers and counters
        afterwards."""
        self._given = GivenMasks(masks)
        with self._given:
            return self._plain_loss(trained, frozen, buffers, counters, inputs, targets)

    def _plain_loss(
        self,
        trained: _Tensors,
        frozen: _Tensors,
        buffers: _Tensors,
        counters: _Tensors,
        inputs: Any,
        targets: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of a model that draws nothing."""
        state = {name: buffer.clone() for name, buffer in {**buffers, **counters}.items()}
        return self._with_loss.at({**trained, **frozen, **state}, inputs, targets), state

    @staticmethod
    def _mapped(loss: Callable[..., Any]) -> Callable[..., Any]:
        """Maps the loss of one client to (gradients, (losses, state)) of many."""

        def gradient(*arguments: Any) -> Any:
            over = (0, 0, 0, None, *[0] * (len(arguments) - 4))
            of_one = grad_and_value(loss, has_aux=True)
            return vmap(of_one, in_dims=over, randomness="error")(*arguments)

        return gradient

    def _stacked(self, batches: Sequence[NDArray[np.int64]]) -> tuple[Any, Tensor]:
        """Inputs and targets, [clients, batch, …]."""
        rows = batches[0] if len(batches) == 1 else np.concatenate(batches)
        inputs, targets = self._data.rows(rows)
        if self._padding is not None:
            width = self._width(rows.ravel())
            flat = trimmed(inputs.reshape(-1, *inputs.shape[2:]), _flat(targets), width)
            inputs, targets = (part.reshape(*rows.shape, *part.shape[1:]) for part in flat)
        there = self._device
        return mapped(lambda part: torch.from_numpy(part).to(there), (inputs, targets))

    def _width(self, rows: NDArray[np.int64]) -> int:
        """Returns the length of the longest sequence of a batch; 0 where there are none."""
        if self._padding is None:
            return 0
        return max(int(lengths(self._data.inputs[rows], self._padding).max()), 1)

    def _draws_for(
        self, weights: _Tensors, counters: _Tensors, inputs: Any, targets: Tensor
    ) -> list[Draw]:
        """Returns the masks that the model draws for a batch of this shape, found by one run."""
        shape = tuple(tuple(part.shape) for part in leaves(inputs))
        if shape not in self._draws:
            first = {name: tensor[0].clone() for name, tensor in weights.items()}
            first |= {name: counter.clone() for name, counter in counters.items()}
            with torch.no_grad(), Recording() as recording:
                self._with_loss.at(first, inputs, targets)
            self._draws[shape] = recording.draws
            self._has_draws = bool(self._has_draws or recording.draws)
        return self._draws[shape]

    def _reached_by(
        self, weights: _Tensors, counters: _Tensors, inputs: Any, targets: Tensor
    ) -> list[str]:
        """Returns the parameters on which the loss of a batch of this shape depends, found by one
        run."""
        shape = tuple(tuple(part.shape) for part in leaves(inputs))
        if shape not in self._reached:
            first = {name: tensor[0].clone() for name, tensor in weights.items()}
            trained = [first[name].requires_grad_() for name in self._trained]
            first |= {name: counter.clone() for name, counter in counters.items()}
            with torch.enable_grad(), Recording():
                loss = self._with_loss.at(first, inputs, targets)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            pairs = zip(self._trained, found, strict=True)
            self._reached[shape] = [name for name, gradient in pairs if gradient is not None]  # type: ignore[reportUnnecessaryComparison]
        return self._reached[shape]


@contextmanager
def slow_operators_refused() -> Generator[None]:
    """Raises errors instead of warnings in this block for operators that PyTorch would loop
    over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


def refuse_hooks(module: nn.Module) -> None:
    """Refuses parameters with hooks, which other tensors in their place do not have.

    Raises:
        RuntimeError: there are some.
    """
    hooked = [name for name, p in module.named_parameters() if has_hooks(p)]
    if hooked:
        raise RuntimeError(f"hooks on the gradients of {', '.join(hooked)} are not called")


def _flat(targets: NDArray[Any]) -> NDArray[Any]:
    return targets.reshape(-1, *targets.shape[2:])
