"""The gradients of a loss, as `loss.backward()` leaves them for an optimizer, and its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from potluck.core import TaskError

_LOOKS = 2  # losses: a tensor that is made anew for every batch is in one of them


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by name; none of a parameter that the loss does not depend on.

    It is `backward` and not `torch.autograd.grad`, so that hooks on parameters work as under any
    optimizer. So do modules that compute parts of themselves again in the backward pass.

    Raises:
        ValueError: the loss depends on no parameter.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss of a batch must depend on the model's trained parameters, got a loss without "
            f"a gradient: loss={loss.detach()}. Look for torch.no_grad, .detach() or .data between "
            "the parameters and the loss, and for parameters that are all frozen."
        )
    torch.autograd.backward(loss)
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return gradients


def read_in(loss: Tensor) -> Iterator[Any]:
    """The nodes of a loss's graph that another node of it reads, once for each that does. Those of
    the leaves have them as `variable`."""
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        for before, _ in () if node is None else node.next_functions:
            if before is not None:
                yield before
            if before not in seen:
                seen.add(before)
                waiting.append(before)


class Foreign:
    """Searches the first losses of one module for weights that are not trained.

    Some weights would stay as they are, without an error: the parameters of a loss, a layer in a
    Python list, or a module of the loss that is not the one in training. So the graph of the first
    losses is searched for them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = {id(parameter) for parameter in module.parameters()}
        self._looks = _LOOKS
        self._last: list[Tensor] = []

    def look(self, loss: Tensor) -> None:
        """Searches the graph of a loss, if it is one of the first.

        Raises:
            TaskError: it depends on weights that are no parameters of the module.
        """
        if self._looks == 0:
            return
        self._looks -= 1
        leaves = (getattr(node, "variable", None) for node in read_in(loss))
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in self._own]
        for leaf in found:
            if isinstance(leaf, nn.Parameter) or any(leaf is other for other in self._last):
                self._looks = _LOOKS  # so that a later call fails too
                raise TaskError(
                    "a loss must depend on no other weights than the parameters of the model, "
                    f"which are what trains, got a tensor of shape {tuple(leaf.shape)} that needs "
                    "a gradient and is none. If it belongs to the loss, make it a parameter of "
                    "the model, or a constant by requires_grad_(False); if it is a layer's, "
                    "register the layer (nn.ModuleList instead of a list)."
                )
        self._last = found if self._looks else []
