"""Finds which of a model's tensors are statistics, and which are constants.

The running statistics of PyTorch's normalization layers are known: written in training mode, and
left alone in evaluation mode. Other buffers and frozen parameters are classified by a few steps of
training. What the steps change is a statistic (a counter, a momentum encoder), and the rest is a
constant (a mask, a table of positions). The steps are made of a few examples of the first client,
or of zeros of their shape where there are none.

This decides how many bytes travel. It does not decide what is averaged: a constant that some client
changes after all is averaged like a statistic (`potluck.algorithms.statistics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from potluck.core import Role, Spec
from potluck.data.trees import called, mapped
from potluck.engine.module.randomness import borrowed_randomness
from potluck.engine.module.variables import Variables
from potluck.engine.task import Task, averaged_tensors, in_training, spec_of
from potluck.models.losses import Loss

_EXAMPLES = 4
_STEPS = 3
_LR = 0.01


def roles(task: Task) -> Spec:
    """The spec of a task's model, with all roles. Global randomness is kept.

    Raises:
        ValueError: nothing of it is trained.
    """
    module, loss, _ = task.parts()
    in_training(module)
    spec = spec_of(module)
    if "trained" not in spec.roles:
        raise ValueError(
            "a model must have a parameter that is trained, got none "
            f"({len(spec.names) - spec.num_buffers} frozen). Leave requires_grad on where it is to "
            "learn."
        )
    if spec.is_all_trained:
        return spec
    known = _known(module)
    spec = spec.with_roles(known)
    unknown = [
        name
        for name, role in zip(spec.names, spec.roles, strict=True)
        if role != "trained" and name not in known
    ]
    if not unknown:
        return spec
    try:
        with borrowed_randomness(), Variables.of(module, loss).held():
            moved = _moved(task, module, loss)
    except Exception:  # a failure here is reported by the first client that trains
        return spec
    return spec.with_roles({n: "statistic" if n in moved else "constant" for n in unknown})


def unaveraged(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the buffers that hold numbers and do not travel, by name. Integers are no
    numbers but counts, which stay with each client."""
    return {
        name: buffer.clone()
        for name, buffer in module.named_buffers()
        if buffer.dtype != torch.float32 and (buffer.is_floating_point() or buffer.is_complex())
    }


def check_unaveraged(module: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Refuses a model whose local training changed `unaveraged`.

    Raises:
        TypeError: one was changed; it is named.
    """
    now = dict(module.named_buffers()) if start else {}
    for name, before in start.items():
        if name not in now or not _is_same(before, now[name]):
            raise TypeError(
                f"what a model writes while it trains must be float32 to be averaged, got {name} "
                f"of dtype={before.dtype}. Register it as float32, or as an integer that each "
                "client counts for itself."
            )


def _known(module: nn.Module) -> Mapping[str, Role]:
    """The buffers of normalization layers."""
    found: dict[str, Role] = {}
    layers = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    for path, layer in layers:
        if isinstance(layer, _NormBase) and layer.training:
            for name in ("running_mean", "running_var"):
                if getattr(layer, name, None) is not None:
                    found[f"{path}.{name}" if path else name] = "statistic"
    return found


def _moved(task: Task, module: nn.Module, judge: Loss) -> set[str]:
    """The names of what changes in a few steps."""
    before = {name: tensor.detach().clone() for name, tensor in averaged_tensors(module)}
    inputs, targets = _examples(task)
    trained = [p for p in module.parameters() if p.requires_grad]
    for _ in range(_STEPS):
        loss = judge(called(module, inputs), targets)
        if trained and loss.requires_grad:
            gradients = cast("Any", torch.autograd.grad(loss, trained, allow_unused=True))
            with torch.no_grad():
                for parameter, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None:
                        parameter.add_(gradient, alpha=-_LR)
    return {name for name, now in averaged_tensors(module) if not _is_same(before[name], now)}


def _examples(task: Task) -> tuple[Any, Tensor]:
    train = task.data.train

    def few(array: Any) -> Tensor:
        if train.num_examples == 0:
            kind = torch.from_numpy(array[:0].copy()).dtype
            return torch.zeros((2, *array.shape[1:]), dtype=kind)
        return torch.tensor(array[:_EXAMPLES])

    return mapped(few, train.inputs), few(train.targets)


def _is_same(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    return bool(((before == after) | (before.isnan() & after.isnan())).all())
