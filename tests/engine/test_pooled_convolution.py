"""Convolutions that are pooled on the tile unit: PyTorch's, with sums in float64, are the oracle,
for factors that are bfloat16 already."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from local_steps import images_of, miscompiled, stepped
from potluck import Task
from potluck.core import Correction
from potluck.engine import TorchRuntime
from potluck.engine.deferred import Deferred
from potluck.engine.native import compiler, conv_pool
from potluck.engine.native.conv_pool import pooled
from potluck.models import CNN

needs_tiles = pytest.mark.skipif(
    conv_pool._library() is None, reason="no C++ compiler, or no tile unit"
)
LR = 0.5


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().float()


def layer_of(channels: int, maps: int, kernel: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, maps, kernel, padding=kernel // 2)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    return layer


def both(layer: nn.Conv2d, images: Tensor, into: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Maps, stepped weights and, if images want it, their gradient: PyTorch's, with sums in
    float64, and ours."""
    ours, deferred = copy.deepcopy(layer), Deferred()
    exact, given = copy.deepcopy(layer).double(), images.double()
    flowing = [(given, images)] if images.requires_grad else []
    maps = functional.relu(functional.max_pool2d(exact(given), 2))
    *onward, in_kernel, in_bias = torch.autograd.grad(
        maps, [*(a for a, _ in flowing), exact.weight, exact.bias], into.double()
    )
    found = conv_pool.in_place(ours, images, deferred)
    with deferred.open(LR):
        *found_onward, none = torch.autograd.grad(
            found.float(), [*(b for _, b in flowing), ours.weight], into, allow_unused=True
        )
    assert none is None  # the layer has its step instead
    stepped = exact.weight - LR * in_kernel, exact.bias - LR * in_bias
    pairs = [(maps, found), *zip(stepped, (ours.weight, ours.bias), strict=True)]
    pairs += zip(onward, found_onward, strict=True)
    return [(theirs.detach(), mine.detach()) for theirs, mine in pairs]


@needs_tiles
@pytest.mark.parametrize(
    ("batch", "channels", "maps", "kernel", "height", "width"),
    [
        (10, 1, 32, 5, 28, 28),  # the paper's
        (10, 32, 64, 5, 14, 14),
        (20, 32, 64, 5, 14, 14),
        (9, 64, 32, 1, 4, 2),  # a group of images and one more
        (11, 32, 64, 3, 6, 34),  # rows of three tiles
        (8, 32, 32, 3, 2, 16),
        (1, 1, 32, 15, 20, 18),
        (17, 1, 64, 3, 4, 4),
        (5, 96, 96, 7, 8, 16),
        (2, 1, 32, 1, 2, 2),
        (3, 32, 32, 3, 8, 14),  # places that fill their tiles
        (9, 32, 32, 15, 20, 18),
    ],
)
def test_a_layer_takes_pytorchs_step_with_rounded_factors(
    batch, channels, maps, kernel, height, width
):
    torch.manual_seed(0)
    layer = layer_of(channels, maps, kernel)
    images = drawn(batch, channels, height, width).requires_grad_(channels > 1)
    into = drawn(batch, maps, height // 2, width // 2)
    pairs = both(layer, images, into)
    for (theirs, ours), rounds in zip(pairs, (True, False, False, True), strict=False):
        largest = float(theirs.abs().max())
        bound = 2**-8 * theirs.abs() if rounds else 0.0  # the nearest of 8 bits
        assert ((ours.double() - theirs).abs() <= bound + 3e-6 * largest).all()


@needs_tiles
@pytest.mark.parametrize("channels", [1, 32])
def test_the_first_of_equal_ones_gets_the_gradient(channels):
    torch.manual_seed(0)
    layer = layer_of(channels, 32, 3)
    with torch.no_grad():  # whole numbers, so that many are equal and all sums are exact
        layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape))
        layer.bias.copy_(torch.randint(-1, 2, layer.bias.shape))
    images = torch.randint(-1, 2, (5, channels, 6, 8)).float().requires_grad_(channels > 1)
    for theirs, ours in both(layer, images, torch.randint(-3, 4, (5, 32, 3, 4)).float()):
        assert torch.equal(ours.double(), theirs)


@needs_tiles
def test_what_is_not_a_number_stays_so():
    layer, images = layer_of(32, 32, 3), drawn(2, 32, 4, 6)
    images[1, 5, 0, 0] = float("nan")
    found = conv_pool.in_place(layer, images, Deferred())
    expected = functional.max_pool2d(layer(images), 2)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[1, :, 0, 0].isnan().all()
    assert not found[0].isnan().any()


@needs_tiles
def test_gradients_and_images_of_any_layout_flow_through():
    torch.manual_seed(0)
    layer, images, into = layer_of(32, 32, 3), drawn(2, 32, 4, 6), drawn(2, 32, 2, 3)
    images.requires_grad_()
    last = torch.channels_last
    rearranged = images.detach().contiguous(memory_format=last).requires_grad_()
    for (_, ours), (_, others) in zip(
        both(layer, images, into),
        both(layer, rearranged, into.contiguous(memory_format=last)),
        strict=True,
    ):
        assert torch.equal(ours, others)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 30, 5, padding=2),
        nn.Conv2d(3, 32, 5, padding=2),
        nn.Conv2d(1, 32, 5),
        nn.Conv2d(1, 32, 4, padding=2),
        nn.Conv2d(1, 32, (5, 3), padding=(2, 1)),
        nn.Conv2d(1, 32, 17, padding=8),
        nn.Conv2d(1, 32, 5, padding=2, stride=2),
        nn.Conv2d(32, 32, 5, padding=2, groups=32),
        nn.Conv2d(1, 32, 5, padding=2, padding_mode="reflect"),
        nn.Conv2d(1, 32, 5, padding=2, bias=False),
        nn.Linear(32, 32),
    ],
)
def test_other_layers_are_left_to_pytorch(layer):
    assert not conv_pool.suits(layer)


class Seer(nn.Module):
    """Says of images which of ten kinds they are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv1 = nn.Conv2d(1, 32, 3, padding="same")
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.output = nn.Linear(32 * 4 * 6, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = pooled(self.conv1, images)
        if self.how == "sometimes twice" and 2 < len(images) < 10:
            maps = maps + pooled(self.conv1, images.flip(3))
        if self.how == "frozen":
            maps = maps.detach()
        maps = functional.relu(self.conv2(maps)) if self.how == "not pooled" else maps
        maps = pooled(self.conv2, functional.pad(maps, (0, 0, 0, self.how == "odd")))
        if self.how == "called twice":
            maps = maps + pooled(self.conv2, maps.repeat_interleave(2, 2).repeat_interleave(2, 3))
        outputs = self.output(functional.interpolate(maps, (4, 6)).flatten(1))
        if self.how == "penalty":
            outputs = outputs + self.conv1.weight.square().sum()
        return outputs


WAYS = {  # and how often a compiled layer is called in four steps
    "once": 8,
    "sometimes twice": 9,
    "called twice": 12,
    "frozen": 8,
    "not pooled": 8,
    "odd": 4,
    "penalty": 8,
}


@needs_tiles
@pytest.mark.parametrize("correction", [None, Correction(0.1, 0.0, None)])
@pytest.mark.parametrize(("how", "calls"), WAYS.items())
def test_a_runtime_pools_on_tiles_where_that_is_exact(how, calls, correction):
    runtime, ours, loss = stepped(lambda: Seer(how), "bf16", True, correction)
    assert runtime._layers.num_calls == (0 if correction else calls)
    _, plain, _ = stepped(lambda: Seer(how), "bf16", False, correction)
    _, exact, exact_loss = stepped(lambda: Seer(how), "float32", False, correction)
    assert np.linalg.norm(plain - exact) < 0.25 * np.linalg.norm(exact)
    assert np.linalg.norm(ours - exact) < 1.25 * np.linalg.norm(plain - exact)
    assert loss == pytest.approx(exact_loss, abs=0.02)


@pytest.mark.parametrize(("precision", "one_thread"), [("float32", True), ("bf16", False)])
def test_in_float32_and_on_several_threads_pytorch_does_it(precision, one_thread):
    runtime, *_ = stepped(lambda: Seer("once"), precision, one_thread)
    assert runtime._layers is None


@needs_tiles
def test_the_papers_cnn_uses_it():
    task = Task(model=CNN, data=images_of(4, 28, 28))
    runtime = TorchRuntime(task, "bf16", one_thread=True)
    module = runtime.module
    assert runtime._layers.layers == [module.conv1, module.conv2, module.hidden]


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """An empty cache folder, and a library that nobody has asked for yet."""
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    conv_pool._library.cache_clear()
    yield tmp_path
    conv_pool._library.cache_clear()


def test_it_can_be_switched_off(afresh, monkeypatch):
    monkeypatch.setenv("POTLUCK_NATIVE", "0")
    assert not conv_pool.suits(layer_of(32, 32, 3))


@pytest.mark.skipif(not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler")
def test_processors_without_tiles_leave_it_to_pytorch(afresh, monkeypatch):
    flags = [flag for flag in compiler.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(compiler, "FLAGS", tuple(flags))
    assert not conv_pool.suits(layer_of(32, 32, 3))
    assert list((afresh / "compiled").iterdir())


@needs_tiles
def test_it_may_be_asked_for_first_without_gradients(afresh):
    with torch.inference_mode():
        assert conv_pool.suits(layer_of(32, 32, 3))


@needs_tiles
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(p + 1)", "(p)"),
        ("const int dx = (place + j) / inner", "const int dx = 0 * (place + j) / inner"),
        ("apart % 2 ? odd : pairs", "apart % 2 ? pairs : pairs"),
        ("_mm512_srli_epi32(before, 16) |", "_mm512_slli_epi32(before, 16) |"),
        ("bias[c] += factor * biases[c]", "bias[c] += biases[c]"),
    ],
)
def test_what_is_compiled_wrongly_is_not_used(afresh, monkeypatch, caplog, right, wrong):
    monkeypatch.setattr(
        conv_pool,
        "_SOURCES",
        miscompiled(conv_pool._SOURCES, afresh, right, wrong),
    )
    assert not conv_pool.suits(layer_of(32, 32, 3))
    assert "pooled convolutions are not compiled" in caplog.text
