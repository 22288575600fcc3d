"""One local step of many clients as a pure function of tensors on a device.

What changes from step to step is in tensors: the batches, which examples of them are present, and
the rate of each client. So the function can be captured once and replayed. `ModelStep` is any pure
model's, `StackStep` that of plain stacks of linear layers, written out (`potluck.engine.vmap.mlp`).

A model that draws or has buffers is not pure. It is stepped by `potluck.engine.vmap.functional`, on
the device as on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from potluck.engine.corrected_step import Descent
from potluck.engine.gpu.layers import Rewritten, replace
from potluck.engine.module.randomness import borrowed_randomness
from potluck.engine.precision import Precision, autocast
from potluck.engine.runtime import ModelWithLoss
from potluck.engine.task import Task
from potluck.engine.vmap.dropout import GivenMasks, Recording
from potluck.engine.vmap.functional import refuse_hooks, slow_operators_refused
from potluck.engine.vmap.mlp import Layer, Stack
from potluck.models.losses import by_example

_Tensors = Mapping[str, Tensor]


class DeviceStep(Protocol):
    """One local step of many clients, in place."""

    fills: bool
    """True if batches may be filled up with examples that are not present."""

    def step(
        self,
        weights: _Tensors,
        inputs: Tensor,
        targets: Tensor,
        present: Tensor,
        rates: Tensor,
        descent: Descent,
    ) -> Tensor:
        """One local step of every client, in place; returns their losses [clients].

        Args:
            weights: by name, each [clients, …].
            inputs: [clients, batch, …], and `targets` likewise.
            present: 1 for the examples that count and 0 for others, [clients, batch].
            rates: [clients].
        """
        ...


class StackStep:
    """The step of a plain stack."""

    fills = True

    def __init__(self, task: Task, layers: list[Layer]) -> None:
        self._stack = Stack(task, layers)

    def step(
        self,
        weights: _Tensors,
        inputs: Tensor,
        targets: Tensor,
        present: Tensor,
        rates: Tensor,
        descent: Descent,
    ) -> Tensor:
        """See `DeviceStep`."""
        shares = present / present.sum(1, keepdim=True).clamp(min=1.0)
        flat, classes = inputs.flatten(2), targets.reshape(1, -1)
        return self._stack.take(weights, flat, classes, shares, rates, descent)


class ModelStep:
    """The step of a model that is pure, in its layers' forms for many clients.

    Args:
        plain: with PyTorch's own rules for all layers, which is for comparison.
    """

    def __init__(
        self, task: Task, device: torch.device, precision: Precision, *, plain: bool = False
    ) -> None:
        self._device = device
        self._precision: Precision = precision
        self._with_loss = ModelWithLoss(task)
        module = self._with_loss.module
        self._trained = [n for n, p in module.named_parameters() if p.requires_grad]
        targets = torch.tensor(task.data.train.targets[:1])
        self._by_example = by_example(task.loss, targets.ndim, targets.dtype)
        self.fills = self._by_example is not None and _are_separate(module, task)
        module.to(device)  # its weights come as arguments, but not what it may hold besides
        if not plain:
            replace(module)
        self._is_known = False  # that the model can be vectorised
        self._given = GivenMasks(())

    def step(
        self,
        weights: _Tensors,
        inputs: Tensor,
        targets: Tensor,
        present: Tensor,
        rates: Tensor,
        descent: Descent,
    ) -> Tensor:
        """See `DeviceStep`.

        Raises:
            RuntimeError: the model cannot be vectorised; where it stopped is named.
        """
        if not self._is_known:
            refuse_hooks(self._with_loss)
        leaves = {n: w.detach().requires_grad_(n in self._trained) for n, w in weights.items()}
        trained = {name: leaves[name] for name in self._trained}
        try:
            with nullcontext() if self._is_known else slow_operators_refused(), torch.enable_grad():
                losses = vmap(self._loss)(leaves, inputs, targets, present)
                found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first, *_ = (str(error) or "failed").splitlines()
            raise RuntimeError(f"at {self._given.last}: {type(error).__name__}: {first}") from error
        self._is_known = True
        gradients = {
            n: g for n, g in zip(trained, cast("Any", found), strict=True) if g is not None
        }
        descent.take({n: weights[n] for n in trained}, gradients, rates)
        return losses.detach()

    def _loss(self, tensors: _Tensors, inputs: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        """The loss of one client's batch."""
        self._given = GivenMasks(())
        with self._given, Rewritten(), autocast(self._precision, self._device):
            if self._by_example is None:
                return self._with_loss.at(tensors, inputs, targets).float()
            outputs = functional_call(self._with_loss.module, dict(tensors), (inputs,))
            return self._by_example.mean(outputs, targets, present)


def is_pure(module: nn.Module, task: Task) -> bool:
    """True if a model's step is a function of weights and batch alone, as far as can be checked."""
    if next(module.buffers(), None) is not None:
        return False
    examples = task.data.train
    with borrowed_randomness(), torch.no_grad(), Recording() as recording:
        try:
            module(torch.tensor(examples.inputs[:2]))
        except Exception:  # reported where clients train
            return False
    return not recording.draws


def _are_separate(module: nn.Module, task: Task) -> bool:
    """True if a model's output for an example does not depend on the others in its batch."""
    inputs = torch.tensor(task.data.train.inputs[:4])
    if len(inputs) < 2:
        return False
    with torch.no_grad():
        try:
            together, alone = module(inputs), module(inputs[:1])
        except Exception:  # as in `is_pure`
            return False
    fits = isinstance(together, Tensor) and together.shape[1:] == alone.shape[1:]
    return fits and torch.allclose(together[:1], alone, rtol=1e-3, atol=1e-5)
