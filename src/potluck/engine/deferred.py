"""Steps that layers find in a backward pass and that are taken when it is over.

A fused layer does not write its gradient out. Its backward pass finds what the SGD step adds to its
weights and leaves that here. No weight changes until the pass is over, so hooks, penalties and
other layers that read a weight see the one of the loss. A layer that is called several times, or
whose weights are read elsewhere too, gets the sum of all its gradients. Compiled layers step in the
middle of the pass where nothing reads their weights later (`at_once`).

A backward pass that is not the step's own, because a model differentiates something itself, gets
plain gradients, which can be differentiated again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from potluck.engine.gradients import read_in
from potluck.engine.module.plain import has_hooks


class _Product(NamedTuple):
    """W ← W − lr · rowsᵀ inputs, and b ← b − lr · Σ rows."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor  # ∂ℓ/∂y, [batch, out]
    inputs: Tensor  # [batch, in], of the same type


class _Copy(NamedTuple):
    """A weight, and what it is to be after the step."""

    weight: Tensor
    stepped: Tensor


class Deferred:
    """The steps of one backward pass."""

    def __init__(self) -> None:
        self.lr = 0.0
        self.is_open = False
        """True during the backward pass of a step."""
        self._products: list[_Product] = []
        self._copies: list[_Copy] = []
        self._alone: set[int] = set()  # weights that may be stepped at once

    @contextmanager
    def open(self, lr: float, loss: Tensor | None = None) -> Generator[None]:
        """Collects the steps of the backward pass in this block, at this rate, and takes them at
        its end.

        Args:
            loss: what is differentiated, if layers may step at once (`at_once`).
        """
        self.lr, self.is_open = lr, True
        self._alone = set() if loss is None else _read_once(loss)
        try:
            yield
            self.is_open = False
            self._take()
        finally:
            self.is_open = False
            self._products.clear()
            self._copies.clear()

    def product(self, weight: Tensor, bias: Tensor | None, rows: Tensor, inputs: Tensor) -> None:
        """Adds the step of a linear layer, from its inputs and its gradient."""
        self._products.append(_Product(weight, bias, rows, inputs))

    def copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Copies of weights, which are to be stepped instead of them."""
        stepped = [weight.detach().clone() for weight in weights]
        self._copies += map(_Copy, weights, stepped)
        return stepped

    def at_once(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights themselves, if nothing can read them in the rest of the pass; else
        `copies`."""
        if all(id(weight) in self._alone for weight in weights):
            for weight in weights:  # what still refers to one is an error, and not another number
                torch.autograd.graph.increment_version(weight)
            return [weight.detach() for weight in weights]
        return self.copies(weights)

    @torch.no_grad()
    def _take(self) -> None:
        if self._copies:
            self._take_copies()
        for weight, bias, rows, inputs in self._products:
            if rows.dtype == weight.dtype:
                weight.addmm_(rows.t(), inputs, alpha=-self.lr)
            else:
                weight.add_(rows.t() @ inputs, alpha=-self.lr)
            if bias is not None:
                bias.add_(rows.sum(0), alpha=-self.lr)

    def _take_copies(self) -> None:
        times = Counter(id(weight) for weight, _ in self._copies)
        # Differences of all before any of them is added.
        moves = [
            None if times[id(weight)] == 1 else stepped - weight for weight, stepped in self._copies
        ]
        for (weight, stepped), move in zip(self._copies, moves, strict=True):
            weight.copy_(stepped) if move is None else weight.add_(move)


def plain_gradients(
    ctx: Any, plain: Callable[..., Any], tensors: Sequence[Tensor | None], into: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of `plain(*tensors)`, one or several tensors, for a backward pass that is not
    a step's: by running it again.

    Args:
        ctx: of the backward pass; its first inputs are these tensors.
        into: of the outputs.
    """
    create_graph = torch.is_grad_enabled()
    needed = [t for t, need in zip(tensors, ctx.needs_input_grad, strict=False) if need]
    with torch.enable_grad():
        outputs = plain(*tensors)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        found: Any = torch.autograd.grad(
            outputs,
            [tensor for tensor in needed if tensor is not None],
            [one.to(output.dtype) for one, output in zip(into, outputs, strict=True)],
            create_graph=create_graph,
            allow_unused=True,
        )
    gradients = iter(found)
    flags = list(ctx.needs_input_grad)[: len(tensors)]
    return [next(gradients) if need else None for need in flags]


def _read_once(loss: Tensor) -> set[int]:
    """The leaves that exactly one operation of a loss reads, by their identity; none at all where
    Python code runs in the backward pass besides that of Potluck, which may read any of them."""
    reads: Counter[int] = Counter()
    for node in read_in(loss):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if has_hooks(leaf):
                return set()
            reads[id(leaf)] += 1
        elif isinstance(node, BackwardCFunction) and not hasattr(node, "deferred"):
            return set()
    return {leaf for leaf, times in reads.items() if times == 1}
