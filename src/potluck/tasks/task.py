"""A task: model, loss, metrics and data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from potluck.core import Role, Spec, Vector, derive_seed
from potluck.tasks.data import FederatedData
from potluck.tasks.metrics import Loss, Metric, accuracy, cross_entropy
from potluck.tasks.randomness import borrowed_randomness


def _accuracy() -> dict[str, Metric]:
    return {"accuracy": accuracy}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be learned, from which data, and how it is judged.

    Args:
        model: a callable without arguments that makes the module (a class, a lambda), so that
            initial weights follow from the seed of a run; or a module, whose present weights are
            then the initial ones.
        data: the examples of all clients.
        loss: (outputs, targets) to the batch's mean loss.
        metrics: name to (outputs, targets) to values; see `potluck.tasks.metrics`.
        batches: for sequences (data that have a padding symbol), "by length" puts sequences of
            similar length into one batch, so that little is padded; "random" draws batches as for
            other data.
    """

    model: nn.Module | Callable[[], nn.Module]
    data: FederatedData
    loss: Loss = cross_entropy
    metrics: Mapping[str, Metric] = field(default_factory=_accuracy)
    batches: Literal["by length", "random"] = "by length"

    def module(self) -> nn.Module:
        """A new module, of which the caller may do what it likes. Global randomness is kept."""
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        with borrowed_randomness():
            return self.model()

    def initial_weights(self, seed: int) -> Vector:
        """The model of round 0, which depends on the seed alone. Global randomness is kept.

        Whatever threads of Potluck make or try modules meanwhile wait for it.
        """
        with borrowed_randomness():
            torch.manual_seed(derive_seed(seed, "weights"))
            module = self.module()
        return spec_of(module).flatten(
            {name: tensor.detach().numpy() for name, tensor in averaged_tensors(module)}
        )


def in_training(module: nn.Module) -> nn.Module:
    """The module, ready for local training. Parts that were handed over in evaluation mode within a
    module in training mode (a pretrained body) stay as they are."""
    return module if module.training else module.train()


def averaged_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What a model's vector holds: its parameters, then its float32 buffers."""
    tensors: list[tuple[str, torch.Tensor]] = list(module.named_parameters())
    return tensors + _buffers(module)


def spec_of(module: nn.Module) -> Spec:
    """The names and shapes inside the vector of a module, and their roles as far as the module
    alone shows them: frozen parameters are constants, and buffers statistics. `roles` of
    `potluck.tasks.statistics` finds out more.

    Raises:
        TypeError: a parameter that is not float32.
    """
    parameters, buffers = list(module.named_parameters()), _buffers(module)
    for name, tensor in parameters:
        if tensor.dtype != torch.float32:
            raise TypeError(
                f"every parameter must be float32, got {name} of dtype={tensor.dtype}. "
                "Call .float() on the model."
            )
    roles: list[Role] = ["trained" if p.requires_grad else "constant" for _, p in parameters]
    roles += ["statistic"] * len(buffers)
    return Spec.of([*parameters, *buffers], roles, len(buffers))


def _buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, b) for name, b in module.named_buffers() if b.dtype == torch.float32]


def bind(module: nn.Module, vector: torch.Tensor) -> None:
    """Make the module's tensors views of `vector` [dim], which from then on is the model."""
    views = spec_of(module).unflatten(vector)
    for name, tensor in averaged_tensors(module):
        tensor.data = views[name]
