"""ReLU of max pooling that is compiled: PyTorch's is the oracle, to the bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from local_steps import images_of, miscompiled
from potluck import Task
from potluck.engine import Evaluator, TorchRuntime
from potluck.engine.native import compiler, max_pool
from potluck.engine.native.max_pool import relu_of_max_pool, use_compiled
from potluck.models import CNN

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with each call of what is compiled."""
    max_pool._library()  # compares two kinds of maps when it is asked for first
    made: list[Tensor] = []
    apply = max_pool._Pool.apply

    def counted(maps, *functions):
        made.append(maps)
        return apply(maps, *functions)

    monkeypatch.setattr(max_pool._Pool, "apply", counted)
    return made


def plain(maps: Tensor) -> Tensor:
    return functional.relu(functional.max_pool2d(maps, 2))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers, so that many are equal, with the channels last."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(-4, 4, shape, generator=generator).to(dtype)
    return maps.contiguous(memory_format=torch.channels_last)


def with_gradient(pool, maps: Tensor) -> tuple[Tensor, Tensor]:
    given = maps.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    pooled = pool(given)
    generator = torch.Generator().manual_seed(2)
    into = torch.randn(pooled.shape, generator=generator).to(maps.dtype)
    return pooled.detach(), torch.autograd.grad(pooled, given, into)[0]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 32, 28, 28), (3, 64, 14, 14), (1, 1, 2, 2), (2, 7, 6, 4)])
def test_it_gives_pytorchs_bits(shape, dtype, calls):
    maps = drawn(*shape, dtype=dtype)
    for ours, theirs in zip(
        with_gradient(relu_of_max_pool, maps), with_gradient(plain, maps), strict=True
    ):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)
    assert len(calls) == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    maps = drawn(2, 8, 4, 4, dtype=dtype)
    maps[0, 3, 1, 0] = maps[1, 2, 0, 1] = maps[1, 2, 0, 0] = float("nan")
    maps[1, 5, 2, 2] = float("inf")
    for ours, theirs in zip(
        with_gradient(relu_of_max_pool, maps), with_gradient(plain, maps), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert relu_of_max_pool(maps).isnan().sum() == 2


@needs_compiler
def test_gradients_of_any_layout_flow_through():
    maps = drawn(2, 8, 4, 4).requires_grad_()
    into = torch.arange(64.0).view(2, 8, 2, 2)  # the channels first
    (ours,) = torch.autograd.grad(relu_of_max_pool(maps), maps, into)
    (theirs,) = torch.autograd.grad(plain(maps), maps, into)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "maps",
    [
        drawn(2, 8, 5, 4),
        drawn(2, 8, 4, 4).contiguous(),
        drawn(2, 8, 4, 4).double(),
        drawn(2, 8, 4, 4)[:0],
        drawn(2, 8, 8, 8)[:, :, ::2],
    ],
)
def test_other_maps_are_left_to_pytorch(maps, calls):
    assert torch.equal(relu_of_max_pool(maps), plain(maps))
    assert not calls


def test_kernels_on_several_threads_are_left_to_pytorch(calls):
    torch.set_num_threads(2)
    relu_of_max_pool(drawn(2, 8, 4, 4))
    assert not calls


def test_transformations_and_exports_see_pytorchs_operations(calls):
    maps = torch.stack([drawn(2, 8, 4, 4), -drawn(2, 8, 4, 4)])
    each = torch.func.vmap(relu_of_max_pool)(maps)
    torch.testing.assert_close(each, torch.stack([plain(m) for m in maps]))
    gradient = torch.func.grad(lambda m: relu_of_max_pool(m).square().sum())(maps[0])
    assert torch.equal(gradient, torch.func.grad(lambda m: plain(m).square().sum())(maps[0]))
    model = CNN()
    use_compiled(model)
    program = torch.export.export(model, (torch.zeros(2, 1, 28, 28),))
    assert "max_pool2d" in str(program.graph)
    with torch.device("cpu"):  # a mode
        relu_of_max_pool(maps[0])
    assert not calls


@needs_compiler
def test_the_papers_cnn_uses_it(calls):
    task = Task(model=CNN, data=images_of(4, 28, 28))
    runtime, start = TorchRuntime(task, one_thread=True), task.initial_weights(0)
    runtime.take(task.data.client(0))
    runtime.begin(start, np.arange(2), 0)
    runtime.step(slice(0, 2), 0.1)
    assert len(calls) == 2
    evaluator = Evaluator(task)
    evaluator.load(start)
    evaluator.sums(task.data.test)
    assert len(calls) > 2


def test_the_model_by_itself_is_plain_pytorch(calls):
    model, images = CNN(), torch.rand(4, 1, 28, 28)
    outputs = model(images)
    assert not calls
    use_compiled(model)
    assert torch.equal(model(images), outputs)
    assert list(model.state_dict()) == list(CNN().state_dict())


def test_a_pooling_with_a_hook_or_a_forward_of_its_own_keeps_it():
    hooked, patched = max_pool.MaxPoolReLU(), max_pool.MaxPoolReLU()
    hooked.register_forward_hook(lambda m, i, o: o * 2)
    patched.forward = lambda maps: maps
    for layer in (hooked, patched):
        before = vars(layer).get("forward")
        use_compiled(layer)
        assert vars(layer).get("forward") is before


@needs_compiler
def test_it_may_be_asked_for_first_without_gradients(cold_kernels):
    with torch.inference_mode():
        relu_of_max_pool(drawn(2, 8, 4, 4))
    assert max_pool._library() is not None


@needs_compiler
def test_what_is_compiled_wrongly_is_not_used(monkeypatch, tmp_path, caplog, calls, cold_kernels):
    wrong = miscompiled(max_pool._SOURCES, tmp_path, "place == T(2)", "place == T(1)")
    monkeypatch.setattr(max_pool, "_SOURCES", wrong)
    maps = drawn(2, 8, 4, 4)
    assert torch.equal(relu_of_max_pool(maps), plain(maps))
    assert max_pool._library() is None
    assert "poolings are not compiled" in caplog.text
