"""The recurrence of an LSTM layer for many clients, each with weights of its own.

`potluck.models.peephole_lstm` has it with each element written out. Without peepholes, PyTorch has
the rest of a step after its product as one kernel for CUDA, `_thnn_fused_lstm_cell`, which its own
cells use. Then a step is two kernels. The kernel is compared once with the recurrence written out,
which is used where the kernel is missing or differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from potluck.models.peephole_lstm import recurrence, weight_gradient

_LOG = logging.getLogger("potluck")


def recur(activations: Tensor, weight: Tensor, peepholes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes `recurrence` of `potluck.models.peephole_lstm`, by PyTorch's kernel where it can."""
    if peepholes is None and activations.is_cuda and has_fused_cell(activations.device):
        return _fused(activations, weight)
    return recurrence(activations, weight, peepholes)


@cache
def has_fused_cell(device: torch.device) -> bool:
    """True if PyTorch's kernel is there and agrees with the plain recurrence: tried once, and not
    while a graph is captured."""
    random = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 4, 20), (2, 20, 5))  # activations and weight of a hidden size of 5
    try:
        found: list[list[Tensor]] = []
        for function in (partial(recurrence, peepholes=None), _fused):
            random.manual_seed(0)
            tensors = [torch.randn(s, generator=random).to(device).requires_grad_() for s in shapes]
            with torch.enable_grad():
                hidden, cell = function(*tensors)
                loss = hidden.square().sum() + cell.sum()
                found.append([hidden, cell, *torch.autograd.grad(loss, tensors)])
        agrees = all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*found, strict=True)
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        _LOG.warning("the fused LSTM cell is not used: %s", str(error).splitlines()[0])
        return False
    if not agrees:
        _LOG.warning("the fused LSTM cell is not used: it differs from the cell written out")
    return agrees


class _FusedRecurrence(torch.autograd.Function):
    """The same without peepholes, a product and a kernel of PyTorch's a step. CUDA only."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        steps, clients, batch, width = activations.shape
        size = width // 4
        rows = activations.contiguous().view(steps, clients * batch, width)
        transposed = weight.to(rows.dtype).transpose(1, 2)
        product = torch.zeros_like(rows[0])  # U h_0
        cells = [rows.new_zeros(clients * batch, size)]
        hidden: list[Tensor] = []
        spaces: list[Tensor] = []
        cell_of = torch.ops.aten._thnn_fused_lstm_cell
        for t in range(steps):
            if t > 0:
                product = torch.bmm(hidden[-1].view(clients, batch, size), transposed)
                product = product.view(clients * batch, width)
            h, c, space = cell_of(rows[t], product, cells[-1])
            hidden.append(h)
            cells.append(c)
            spaces.append(space)
        all_hidden = torch.stack(hidden).view(steps, clients, batch, size)
        ctx.save_for_backward(all_hidden, weight, *cells, *spaces)
        return all_hidden, cells[-1].view(clients, batch, size)

    @staticmethod
    def backward(ctx: Any, into_hidden: Tensor, into_cell: Tensor) -> Any:  # type: ignore[override]
        all_hidden, weight, *rest = ctx.saved_tensors
        steps, clients, batch, size = all_hidden.shape
        cells, spaces = rest[: steps + 1], rest[steps + 1 :]
        weight_there = weight.to(all_hidden.dtype)
        into_hidden, into_cell = into_hidden.contiguous(), into_cell.contiguous()
        into_cell = into_cell.view(clients * batch, size)
        onward = into_hidden[-1]
        back = torch.ops.aten._thnn_fused_lstm_cell_backward_impl
        errors: list[Tensor] = []
        for t in reversed(range(steps)):
            flat = onward.reshape(clients * batch, size)
            error, into_cell, _ = back(flat, into_cell, cells[t], cells[t + 1], spaces[t], False)
            errors.append(error.view(clients, batch, 4 * size))
            if t > 0:
                onward = torch.baddbmm(into_hidden[t - 1], errors[-1], weight_there)
        rows = torch.stack(errors[::-1])
        before = torch.cat([torch.zeros_like(all_hidden[:1]), all_hidden[:-1]])
        return rows, weight_gradient(rows, before, weight)


_fused = cast("Callable[..., tuple[Tensor, Tensor]]", _FusedRecurrence.apply)
