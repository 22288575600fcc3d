"""An LSTM layer with diagonal peepholes, which PyTorch does not have.

    a_t = W x_t + U h_{t-1} + b                        for each of i, f, o, g
    i_t = σ(a_i + p_i ∘ c_{t-1})        f_t = σ(a_f + p_f ∘ c_{t-1})        g_t = tanh(a_g)
    c_t = f_t ∘ c_{t-1} + i_t ∘ g_t
    o_t = σ(a_o + p_o ∘ c_t)
    h_t = o_t ∘ tanh(c_t)

F. A. Gers, N. N. Schraudolph, J. Schmidhuber: Learning Precise Timing with LSTM Recurrent
Networks. JMLR 3 (2002), with peepholes that are diagonal, as in H. Sak, A. Senior, F. Beaufays:
Long Short-Term Memory Recurrent Neural Network Architectures. Interspeech 2014 (without its
projection).

Differences from the papers: none. The backward pass is written out, because recording some ten
operations a step for autograd costs more than the steps themselves. It is written for many clients,
each with weights of its own, whose products U h are one batched product a step; a layer is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class PeepholeLSTM(nn.Module):
    """One layer; its 4 · hidden gates are in the order i, f, o, g."""

    def __init__(self, inputs: int, hidden: int, *, input_size: float = 1.0) -> None:
        """`input_size` is the standard deviation that inputs have about."""
        super().__init__()
        self.weight_input = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hidden = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.peepholes = nn.Parameter(torch.zeros(3, hidden))  # p_i, p_f, p_o
        with torch.no_grad():
            start_inputs(self.weight_input, input_size)
            start_gates(self.weight_hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [steps, batch, inputs] to hidden states [steps, batch, hidden], from zeros."""
        activations = functional.linear(inputs, self.weight_input, self.bias)
        # Under autocast `linear` gives bfloat16, which cells should not be summed in.
        activations = activations.to(self.peepholes.dtype).unsqueeze(1)  # of one client
        hidden, _ = recurrence(activations, self.weight_hidden[None], self.peepholes[None])
        return hidden.squeeze(1)


def start_inputs(weight: Tensor, input_size: float) -> None:
    """Draws [outputs, inputs] in place, uniform, so that the outputs have variance 1."""
    bound = math.sqrt(3.0 / weight.shape[1]) / input_size
    weight.uniform_(-bound, bound)


def start_gates(weight: Tensor) -> None:
    """Draws the recurrent weights [4 · hidden, hidden] in place: an orthogonal matrix for a
    gate."""
    for gate in weight.chunk(4):
        nn.init.orthogonal_(gate)


def recurrence(
    activations: Tensor, weight: Tensor, peepholes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The steps of LSTM layers of many clients, from zeros, each element written out.

    Args:
        activations: W x + b of all steps, [steps, clients, batch, 4 · hidden], with the gates in
            the order i, f, o, g, or i, f, g, o without peepholes, as in `nn.LSTM`.
        weight: U, [clients, 4 · hidden, hidden].
        peepholes: p_i, p_f, p_o, [clients, 3, hidden]; None if there are none.

    Returns:
        The hidden states [steps, clients, batch, hidden] and last cells [clients, batch, hidden].
    """
    apply = cast("Callable[..., tuple[Tensor, Tensor]]", _Recurrence.apply)
    return apply(activations, weight, peepholes)


class _Recurrence(torch.autograd.Function):
    """Element by element as in the module's docstring, g and o in the order of `recurrence`."""

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
        return hidden[1:], cells[-1].clone()

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
                into_cell.addcmul_(into_if[:, :, 0], p_if[:, :, 0])
                into_cell.addcmul_(into_if[:, :, 1], p_if[:, :, 1])
            if t > 0:
                into_hidden[t - 1].baddbmm_(rows[t], weight_there)
        into_weight = weight_gradient(rows, hidden[:-1], weight)
        into_peepholes = None
        if peepholes is not None:
            products = [passed[..., 0, :] * before, passed[..., 1, :] * before]
            products.append(into_outward * cells[1:])
            into_peepholes = torch.stack([p.sum((0, 2)) for p in products], dim=1)
        return rows, into_weight, into_peepholes


def _order(inner: Tensor, peepholes: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and o of the gates [steps, clients, batch, 4, hidden]."""
    g, o = (2, 3) if peepholes is None else (3, 2)
    return inner[..., g, :], inner[..., o, :]


def _split(peepholes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """p_i and p_f [clients, 1, 2, hidden], and p_o [clients, 1, hidden]."""
    if peepholes is None:
        return None, None
    return peepholes[:, None, :2], peepholes[:, None, 2]


def weight_gradient(rows: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    """∂ℓ/∂U: one product over all steps and examples of each client."""
    steps, clients, batch, width = rows.shape
    errors = rows.transpose(0, 1).reshape(clients, steps * batch, width)
    hidden = before.transpose(0, 1).reshape(clients, steps * batch, -1)
    return torch.bmm(errors.transpose(1, 2), hidden).to(weight.dtype)
