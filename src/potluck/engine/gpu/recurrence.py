"""The recurrence of an LSTM layer for many clients, each with weights of its own.

    a_t = (W x + b)_t + U h_{t-1}                      for all gates; W x + b is given
    i_t = σ(a_i + p_i ∘ c_{t-1})        f_t = σ(a_f + p_f ∘ c_{t-1})        g_t = tanh(a_g)
    c_t = f_t ∘ c_{t-1} + i_t ∘ g_t
    o_t = σ(a_o + p_o ∘ c_t)            h_t = o_t ∘ tanh(c_t)

With weights [clients, 4 · hidden, hidden] the product U h of all clients is one batched matrix
product a step, forward and backward; what follows it is element by element. The gates are in the
order i, f, g, o, as in `nn.LSTM`, or i, f, o, g with peepholes, as in
`potluck.models.peephole_lstm`, of which this is the form for many clients. Without peepholes,
PyTorch has the element-wise part as one kernel for CUDA, `_thnn_fused_lstm_cell`, the one its own
cells use: then a step is two kernels. It is asked for once and compared with the lines below; where
it is missing or differs, they do it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

_LOG = logging.getLogger("potluck")


def recur(activations: Tensor, weight: Tensor, peepholes: Tensor | None) -> tuple[Tensor, Tensor]:
    """All steps from a state of zeros.

    Args:
        activations: W x + b, [steps, clients, batch, 4 · hidden].
        weight: U, [clients, 4 · hidden, hidden].
        peepholes: p_i, p_f, p_o, [clients, 3, hidden]; None if there are none.

    Returns:
        The hidden states [steps, clients, batch, hidden] and last cells [clients, batch, hidden].
    """
    if peepholes is None and activations.is_cuda and has_fused_cell(activations.device):
        fused = cast("Callable[..., tuple[Tensor, Tensor]]", _FusedRecurrence.apply)
        return fused(activations, weight)
    plain = cast("Callable[..., tuple[Tensor, Tensor]]", _Recurrence.apply)
    return plain(activations, weight, peepholes)


@cache
def has_fused_cell(device: torch.device) -> bool:
    """Whether PyTorch's kernel is there and gives what the lines here give: tried once, and not
    while a graph is captured."""
    random = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 4, 20), (2, 20, 5))  # activations and weight of a hidden size of 5
    try:
        found: list[list[Tensor]] = []
        for function in (_Recurrence, _FusedRecurrence):
            random.manual_seed(0)
            tensors = [torch.randn(s, generator=random).to(device).requires_grad_() for s in shapes]
            more = (None,) if function is _Recurrence else ()
            with torch.enable_grad():
                hidden, cell = cast("Any", function.apply)(*tensors, *more)
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


class _Recurrence(torch.autograd.Function):
    """Element by element as in the module's docstring."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, activations: Tensor, weight: Tensor, peepholes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        steps, clients, batch, width = activations.shape
        size = width // 4
        gates = activations.clone(memory_format=torch.contiguous_format)  # each activated in place
        hidden = gates.new_zeros(steps + 1, clients, batch, size)  # h_0 … h_T
        cells = torch.zeros_like(hidden)
        squashed = gates.new_empty(steps, clients, batch, size)  # tanh(c_t)
        inner = gates.view(steps, clients, batch, 4, size)
        i_f = inner[..., :2, :]
        candidate, outward = _order(inner, peepholes)
        transposed = weight.to(gates.dtype).transpose(1, 2)
        p_if, p_o = _split(peepholes)
        for t in range(steps):
            cell, before = cells[t + 1], cells[t]
            if t > 0:
                gates[t].baddbmm_(hidden[t], transposed)
            if p_if is not None:
                i_f[t].addcmul_(before.unsqueeze(2), p_if)
            i_f[t].sigmoid_()
            candidate[t].tanh_()
            torch.mul(i_f[t, :, :, 1], before, out=cell)
            cell.addcmul_(i_f[t, :, :, 0], candidate[t])
            if p_o is not None:
                outward[t].addcmul_(cell, p_o)
            outward[t].sigmoid_()
            torch.tanh(cell, out=squashed[t])
            torch.mul(outward[t], squashed[t], out=hidden[t + 1])
        ctx.save_for_backward(gates, hidden, cells, squashed, weight, peepholes)
        return hidden[1:].clone(), cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, into_hidden: Tensor, into_cell: Tensor) -> Any:  # type: ignore[override]
        gates, hidden, cells, squashed, weight, peepholes = ctx.saved_tensors
        steps, clients, batch, width = gates.shape
        size = width // 4
        inner = gates.view(steps, clients, batch, 4, size)
        i, f = inner.unbind(3)[:2]
        g, o = _order(inner, peepholes)
        before = cells[:-1]
        # What each gate's activation passes on, but for ∂ℓ/∂h_t (o) and ∂ℓ/∂c_t (i, f, g).
        pass_i, pass_f = g * i * (1 - i), before * f * (1 - f)
        pass_g, pass_o = i * (1 - g * g), squashed * o * (1 - o)
        ordered = (pass_g, pass_o) if peepholes is None else (pass_o, pass_g)
        passed = torch.stack([pass_i, pass_f, *ordered], dim=3)
        into_candidate, into_outward = _order(passed, peepholes)
        to_cell = o * (1 - squashed * squashed)
        into_hidden = into_hidden.clone(memory_format=torch.contiguous_format)
        into_cell = into_cell.clone(memory_format=torch.contiguous_format)
        rows = passed.view(steps, clients, batch, width)
        weight_there = weight.to(gates.dtype)
        p_if, p_o = _split(peepholes)
        for t in reversed(range(steps)):
            into_outward[t].mul_(into_hidden[t])
            into_cell.addcmul_(into_hidden[t], to_cell[t])
            if p_o is not None:
                into_cell.addcmul_(into_outward[t], p_o)
            into_if = passed[t, :, :, :2].mul_(into_cell.unsqueeze(2))
            into_candidate[t].mul_(into_cell)
            into_cell.mul_(f[t])
            if p_if is not None:
                into_cell.add_((into_if * p_if).sum(2))
            if t > 0:
                into_hidden[t - 1].baddbmm_(rows[t], weight_there)
        into_weight = _into_weight(rows, hidden[:-1], weight)
        into_peepholes = None
        if peepholes is not None:
            products = [passed[..., 0, :] * before, passed[..., 1, :] * before]
            products.append(into_outward * cells[1:])
            into_peepholes = torch.stack([p.sum((0, 2)) for p in products], dim=1)
        return rows, into_weight, into_peepholes


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
        return rows, _into_weight(rows, before, weight)


def _order(inner: Tensor, peepholes: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and o of the gates [steps, clients, batch, 4, hidden]."""
    g, o = (2, 3) if peepholes is None else (3, 2)
    return inner[..., g, :], inner[..., o, :]


def _split(peepholes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """p_i and p_f [clients, 1, 2, hidden], and p_o [clients, 1, hidden]."""
    if peepholes is None:
        return None, None
    return peepholes[:, None, :2], peepholes[:, None, 2]


def _into_weight(rows: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    """∂ℓ/∂U: one product over all steps and examples of each client."""
    steps, clients, batch, width = rows.shape
    errors = rows.transpose(0, 1).reshape(clients, steps * batch, width)
    hidden = before.transpose(0, 1).reshape(clients, steps * batch, -1)
    return torch.bmm(errors.transpose(1, 2), hidden).to(weight.dtype)
