"""The gradients of a loss, as `loss.backward()` leaves them for an optimizer, and its graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter; None for one that the loss does not depend on.

    It is `backward` and not `torch.autograd.grad`, so that hooks on parameters and modules that
    compute parts of themselves again on the way back do what they do under any optimizer.

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
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
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
