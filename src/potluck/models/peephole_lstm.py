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
operations a step for autograd costs more than the steps themselves.
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
        recur = cast("Callable[..., Tensor]", _Recurrence.apply)
        # Under autocast `linear` gives bfloat16, which cells should not be summed in.
        return recur(activations.to(self.peepholes.dtype), self.weight_hidden, self.peepholes)


def start_inputs(weight: Tensor, input_size: float) -> None:
    """Draw [outputs, inputs] in place, uniform, so that the outputs have variance 1."""
    bound = math.sqrt(3.0 / weight.shape[1]) / input_size
    weight.uniform_(-bound, bound)


def start_gates(weight: Tensor) -> None:
    """Draw the recurrent weights [4 · hidden, hidden] in place: an orthogonal matrix for a gate."""
    for gate in weight.chunk(4):
        nn.init.orthogonal_(gate)


class _Recurrence(torch.autograd.Function):
    """From W x + b of all steps [steps, batch, 4 · hidden] to the hidden states."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, weight: Tensor, peepholes: Tensor) -> Tensor:  # type: ignore[override]
        steps, batch, width = activations.shape
        size = width // 4
        gates = activations.clone()  # [steps, batch, 4 · hidden], each activated in place
        hidden = activations.new_zeros(steps + 1, batch, size)  # h_0 … h_T
        cells = activations.new_zeros(steps + 1, batch, size)
        squashed = activations.new_empty(steps, batch, size)  # tanh(c_t)
        i_f = gates[..., : 2 * size].view(steps, batch, 2, size)
        outward = gates[..., 2 * size : 3 * size]
        candidate = gates[..., 3 * size :]
        transposed, p_if, p_o = weight.t(), peepholes[:2], peepholes[2]
        for t in range(steps):
            cell, before = cells[t + 1], cells[t]
            gates[t].addmm_(hidden[t], transposed)
            i_f[t].addcmul_(before.unsqueeze(1), p_if).sigmoid_()
            candidate[t].tanh_()
            torch.mul(i_f[t, :, 1], before, out=cell)
            cell.addcmul_(i_f[t, :, 0], candidate[t])
            outward[t].addcmul_(cell, p_o).sigmoid_()
            torch.tanh(cell, out=squashed[t])
            torch.mul(outward[t], squashed[t], out=hidden[t + 1])
        ctx.save_for_backward(gates, hidden, cells, squashed, weight, peepholes)
        return hidden[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gates, hidden, cells, squashed, weight, peepholes = ctx.saved_tensors
        steps, batch, width = gates.shape
        size = width // 4
        i, f, o, g = gates.split(size, dim=2)
        before = cells[:-1]
        # What each gate's activation passes on, but for ∂ℓ/∂h_t (o) and ∂ℓ/∂c_t (i, f, g).
        passed = torch.cat(
            [g * i * (1 - i), before * f * (1 - f), squashed * o * (1 - o), i * (1 - g * g)], dim=2
        )
        to_cell = o * (1 - squashed * squashed)
        inner = passed.view(steps, batch, 4, size)
        into_hidden = gradient.contiguous().clone()
        into_cell = torch.zeros_like(cells[0])
        p_if, p_o = peepholes[:2], peepholes[2]
        for t in reversed(range(steps)):
            into_outward = inner[t, :, 2].mul_(into_hidden[t])
            into_cell.addcmul_(into_hidden[t], to_cell[t]).addcmul_(into_outward, p_o)
            into_if = inner[t, :, :2].mul_(into_cell.unsqueeze(1))
            inner[t, :, 3].mul_(into_cell)
            into_cell.mul_(f[t]).addcmul_(into_if[:, 0], p_if[0]).addcmul_(into_if[:, 1], p_if[1])
            if t > 0:
                into_hidden[t - 1].addmm_(passed[t], weight)
        rows = passed.view(steps * batch, width)
        into_weight = rows.t() @ hidden[:-1].reshape(steps * batch, size)
        into_peepholes = torch.stack(
            [
                (inner[:, :, 0] * before).sum((0, 1)),
                (inner[:, :, 1] * before).sum((0, 1)),
                (inner[:, :, 2] * cells[1:]).sum((0, 1)),
            ]
        )
        return passed, into_weight, into_peepholes
