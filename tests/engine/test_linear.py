"""Linear layers on the tile unit: PyTorch's, with sums in float64, are the oracle, for factors that
are bfloat16 already."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from local_steps import images_of, miscompiled, stepped
from potluck import Task
from potluck.core import Correction
from potluck.engine import TorchRuntime
from potluck.engine.deferred import Deferred
from potluck.engine.native import compiler, linear
from potluck.models import CNN

needs_tiles = pytest.mark.skipif(
    linear._library() is None, reason="no C++ compiler, or no tile unit"
)
LR = 0.5


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().float()


def layer_of(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    return layer


def both(
    layer: nn.Linear, inputs: Tensor, into: Tensor, at_once: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Outputs, ∂ℓ/∂x, and stepped weights: PyTorch's, with sums in float64, and ours."""
    ours, deferred = copy.deepcopy(layer), Deferred()
    exact, given = copy.deepcopy(layer).double(), inputs.detach().double().requires_grad_()
    outputs = exact(given)
    parameters = list(exact.parameters())
    onward, *gradients = torch.autograd.grad(outputs, [given, *parameters], into.double())
    found = linear.in_place(ours, inputs, deferred)
    with deferred.open(LR, found if at_once else None):
        (mine,) = torch.autograd.grad(found, [inputs], into.bfloat16())
    stepped = [p - LR * g for p, g in zip(parameters, gradients, strict=True)]
    pairs = [(outputs, found), (onward, mine), *zip(stepped, ours.parameters(), strict=True)]
    return [(theirs.detach(), our.detach()) for theirs, our in pairs]


@needs_tiles
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((10, 3136), 512),  # the paper's
        ((50, 3136), 512),
        ((600, 64), 32),
        ((1, 32), 32),
        ((16, 96), 160),  # more outputs than are rounded at a time
        ((33, 32), 128),
        ((400, 256), 258),  # the character LSTM's
        ((2, 32), 1),
        ((40, 64), 177),
        ((5, 11, 64), 96),
    ],
)
def test_a_layer_takes_pytorchs_step_with_rounded_factors(shape, outputs, bias):
    torch.manual_seed(0)
    layer, inputs = layer_of(shape[-1], outputs, bias), drawn(*shape).requires_grad_()
    pairs = both(layer, inputs, drawn(*shape[:-1], outputs))
    assert pairs[0][1].dtype == torch.bfloat16
    assert pairs[1][1].dtype == torch.float32
    for (theirs, ours), rounds in zip(pairs, (True, True, False, False), strict=False):
        bound = 2**-8 * theirs.abs() if rounds else 0.0  # the nearest of 8 bits
        largest = float(theirs.abs().max())
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() <= bound + 3e-6 * largest).all()


@needs_tiles
def test_a_copy_is_stepped_as_the_weights_themselves():
    torch.manual_seed(0)
    layer, inputs, into = layer_of(64, 32), drawn(7, 64).requires_grad_(), drawn(7, 32)
    for (_, ours), (_, same) in zip(
        both(layer, inputs, into), both(layer, inputs, into, at_once=False), strict=True
    ):
        assert torch.equal(ours, same)


@needs_tiles
def test_weights_are_rounded_for_products_and_not_for_the_step():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 32), drawn(7, 64).requires_grad_()
    rounded, into = layer_of(64, 32), drawn(7, 32)
    with torch.no_grad():
        rounded.weight.copy_(layer.weight.bfloat16())
        rounded.bias.copy_(layer.bias)
    assert not torch.equal(rounded.weight, layer.weight)
    (_, out), (_, onward), (_, weight), _ = both(layer, inputs, into)
    (_, same_out), (_, same_onward), *_ = both(rounded, inputs, into)
    assert torch.equal(out, same_out)
    assert torch.equal(onward, same_onward)
    expected = layer.weight.detach() - LR * into.t() @ inputs.detach()
    torch.testing.assert_close(weight, expected, rtol=0.0, atol=1e-5)


@needs_tiles
def test_what_is_not_a_number_stays_so():
    layer, inputs = layer_of(64, 32), drawn(20, 64)
    inputs[3, 5] = float("nan")
    inputs.requires_grad_()
    found = linear.in_place(layer, inputs, Deferred())
    assert found[3].isnan().all()
    assert not found[:3].isnan().any()
    assert not found[4:].isnan().any()


@needs_tiles
def test_inputs_and_gradients_of_any_layout_flow_through():
    torch.manual_seed(0)
    layer, inputs, into = layer_of(64, 32), drawn(9, 64), drawn(9, 32)
    turned = inputs.t().contiguous().t().requires_grad_()
    pairs = both(layer, inputs.requires_grad_(), into)
    others = both(layer, turned, into.t().contiguous().t())
    for (_, ours), (_, same) in zip(pairs, others, strict=True):
        assert torch.equal(ours, same)


@needs_tiles
def test_other_inputs_are_left_to_pytorch():
    layer = layer_of(64, 32)
    assert linear.takes(layer, torch.zeros(3, 64))
    assert not linear.takes(layer, torch.zeros(64))
    assert not linear.takes(layer, torch.zeros(0, 64))
    assert not linear.takes(layer, torch.zeros(3, 32))
    assert not linear.takes(layer, torch.zeros(3, 64, device="meta"))


def test_other_layers_are_left_to_pytorch():
    assert not linear.suits(nn.Linear(50, 32))


class Wide(nn.Module):
    """A hidden layer that is large enough to step in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.hidden = nn.Linear(384, 192)
        self.output = nn.Linear(192, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images.flatten(1))
        if self.how == "sometimes twice" and 2 < len(images) < 10:
            hidden = hidden + self.hidden(images.flip(3).flatten(1))
        outputs = self.output(hidden.float().tanh())
        if self.how == "penalty":
            outputs = outputs + self.hidden.weight.square().sum()
        return outputs


@pytest.fixture
def called(monkeypatch):
    """How often a layer's step was compiled."""
    calls: list[nn.Linear] = []
    compiled = linear.in_place

    def counted(layer: nn.Linear, *rest) -> Tensor:
        calls.append(layer)
        return compiled(layer, *rest)

    monkeypatch.setattr(linear, "in_place", counted)
    return calls


@needs_tiles
@pytest.mark.parametrize("correction", [None, Correction(0.1, 0.0, None)])
@pytest.mark.parametrize("how", ["once", "sometimes twice", "penalty"])
def test_a_runtime_steps_on_tiles_where_that_is_exact(called, how, correction):
    runtime, ours, loss = stepped(lambda: Wide(how), "bf16", True, correction)
    steps = {"once": 4, "sometimes twice": 5, "penalty": 4}[how]
    assert len(called) == (0 if correction else steps)
    assert runtime._layers.layers == [runtime.module.hidden]
    _, exact, exact_loss = stepped(lambda: Wide(how), "float32", False, correction)
    bound = 2**-4 if how == "penalty" else 2**-6  # PyTorch's own with a penalty, which weighs more
    assert np.linalg.norm(ours - exact) < bound * np.linalg.norm(exact)
    assert loss == pytest.approx(exact_loss, abs=0.02)


@pytest.mark.parametrize(("precision", "one_thread"), [("float32", True), ("bf16", False)])
def test_in_float32_and_on_several_threads_pytorch_does_it(called, precision, one_thread):
    stepped(lambda: Wide("once"), precision, one_thread)
    assert not called


@needs_tiles
def test_the_papers_cnn_uses_it(called):
    task = Task(model=CNN, data=images_of(4, 28, 28))
    runtime = TorchRuntime(task, "bf16", one_thread=True)
    runtime.take(task.data.client(0))
    runtime.begin(task.initial_weights(0), np.arange(2), 0)
    runtime.step(slice(0, 2), 0.1)
    assert called == [runtime.module.hidden]


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """An empty cache folder, and a library that nobody has asked for yet."""
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    linear._library.cache_clear()
    yield tmp_path
    linear._library.cache_clear()


def test_it_can_be_switched_off(afresh, monkeypatch):
    monkeypatch.setenv("POTLUCK_NATIVE", "0")
    assert not linear.suits(layer_of(32, 32))


@pytest.mark.skipif(not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler")
def test_processors_without_tiles_leave_it_to_pytorch(afresh, monkeypatch):
    flags = [flag for flag in compiler.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(compiler, "FLAGS", tuple(flags))
    assert not linear.suits(layer_of(32, 32))
    assert list((afresh / "compiled").iterdir())


@needs_tiles
def test_it_may_be_asked_for_first_without_gradients(afresh):
    with torch.inference_mode():
        assert linear.suits(layer_of(32, 32))


@needs_tiles
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("m % COLUMNS;", "0;"),
        ("2 * k + 1 < rows ? row + stride", "2 * k + 1 < rows ? row"),
        ("factor * load(sums + j)", "load(sums + j)"),
        ("bias[j] += factor", "bias[j] -= factor"),
        ("bias ? there >> EDGE : 0", "0"),
        ("m + i < rows; i++", "m + i < rows; i += 2"),
    ],
)
def test_what_is_compiled_wrongly_is_not_used(afresh, monkeypatch, caplog, right, wrong):
    monkeypatch.setattr(linear, "_SOURCES", miscompiled(linear._SOURCES, afresh, right, wrong))
    assert not linear.suits(layer_of(32, 32))
    assert "linear layers are not compiled" in caplog.text
