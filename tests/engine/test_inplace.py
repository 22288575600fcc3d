"""Linear layers that take their step in the backward pass: PyTorch's gradients are the oracle."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from potluck.engine.fused_sgd import InPlaceLayers
from potluck.engine.precision import Precision, autocast

LR = 0.5
CPU = torch.device("cpu")


def loss_of(module: nn.Module, inputs: Tensor, rounds: bool) -> Tensor:
    with autocast("bf16", CPU) if rounds else nullcontext():
        outputs = module(inputs)
    return (outputs.float() * torch.linspace(-1, 1, outputs.shape[-1])).tanh().sum()


def stepped(module: nn.Module, inputs: Tensor, rounds: bool) -> list[Tensor]:
    """∂ℓ/∂x, and the parameters after a plain step."""
    given = inputs.clone().requires_grad_()
    loss = loss_of(module, given, rounds)
    onward, *gradients = torch.autograd.grad(loss, [given, *module.parameters()])
    pairs = zip(module.parameters(), gradients, strict=True)
    return [onward, *(p.detach() - LR * g for p, g in pairs)]


def stepped_in_place(module: nn.Module, inputs: Tensor, precision: Precision) -> list[Tensor]:
    ours = copy.deepcopy(module)
    layers = InPlaceLayers(ours, precision)
    assert layers.layers == list(ours)
    given = inputs.clone().requires_grad_()
    loss = loss_of(ours, given, precision == "bf16")
    with layers.step(LR, loss):
        onward, *gradients = torch.autograd.grad(
            loss, [given, *ours.parameters()], allow_unused=True
        )
    assert layers.num_calls == 1
    assert gradients == [None] * len(gradients)
    return [onward, *(p.detach() for p in ours.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "outputs", "precision", "rounds"),
    [
        ((10, 128), 600, "float32", False),
        ((50, 128), 600, "float32", False),
        ((10, 1024), 1024, "float32", False),  # by oneDNN
        ((10, 128), 600, "bf16", False),  # thin: the weights are read as they are
        ((50, 128), 600, "bf16", True),
        ((5, 11, 128), 600, "bf16", True),
    ],
)
def test_a_layer_takes_pytorchs_step(shape, outputs, precision, rounds, bias):
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(shape[-1], outputs, bias=bias)), torch.randn(shape)
    found = stepped_in_place(module, inputs, precision)
    for ours, theirs in zip(found, stepped(module, inputs, rounds), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_lines_whose_steps_come_first_in_memory_are_rounded_alike():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, 600))
    inputs = torch.randn(11, 5, 128).transpose(0, 1)  # as an LSTM hands them on
    for ours, theirs in zip(
        stepped_in_place(module, inputs, "bf16"), stepped(module, inputs, True), strict=True
    ):
        # Sums in another order, of which some round to the next bfloat16.
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2**-7 * largest)
        assert float((ours - theirs).abs().mean()) < 2**-11 * largest
