"""Layers that are fused with their SGD step: which are, and that all train as in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from potluck import Task
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime, fused_sgd
from potluck.engine.deferred import Deferred
from potluck.engine.module.plain import is_plain
from potluck.engine.native import lstm

LR, WIDTH = 0.1, 16
EVERY = 1  # weights from which on layers are fused here: all


def task_of(make: Callable[[], nn.Module], width: int = WIDTH) -> Task:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((24, width)).astype(np.float32)
    examples = Examples(inputs, random.integers(0, 3, 24))
    data = FederatedData(
        name="random",
        train=examples,
        test=examples,
        offsets=np.array([0, 24]),
        clients=("a",),
        num_classes=3,
    )
    return Task(model=make, data=data)


def runtime_of(task: Task, fused_from: int | None = EVERY) -> TorchRuntime:
    runtime = TorchRuntime(task, one_thread=True, fused_from=fused_from)
    runtime.take(task.data.client(0))
    runtime.begin(task.initial_weights(0), np.arange(24), 0)
    return runtime


def stepped(runtime: TorchRuntime) -> np.ndarray:
    for first in (0, 5, 10, 0):
        runtime.step(slice(first, first + 7), LR)
    return runtime.end()[0].copy()


def in_pytorch(task: Task) -> np.ndarray:
    """The same steps by `torch.optim.SGD`."""
    module = runtime_of(task, None).module  # with the weights to start from
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR)
    inputs, targets = (torch.from_numpy(array.copy()) for array in task.data.client(0))
    for first in (0, 5, 10, 0):
        optimizer.zero_grad()
        part = slice(first, first + 7)
        functional.cross_entropy(module(inputs[part]), targets[part]).backward()
        optimizer.step()
    spec = runtime_of(task, None).spec
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    return spec.flatten({name: own[name].detach().numpy() for name in spec.names})


def check(make: Callable[[], nn.Module]) -> TorchRuntime:
    """Fused and plain steps are those of PyTorch; the fused runtime."""
    task = task_of(make)
    fused = runtime_of(task)
    expected, start = in_pytorch(task), task.initial_weights(0)
    assert np.abs(expected - start).max() > 1e-3
    np.testing.assert_allclose(stepped(fused), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stepped(runtime_of(task, None)), expected, rtol=0, atol=1e-6)
    return fused


class Net(nn.Module):
    """A hidden layer that can be done to, and an output layer."""

    def __init__(self, change: Callable[[nn.Linear], nn.Module | None] = lambda layer: None):
        super().__init__()
        hidden = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.hidden = change(hidden) or hidden
        self.output = nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.hidden(inputs * self.scale).tanh())


def adapted(layer: nn.Linear) -> None:
    down, up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
    layer.down, layer.up, plain = down, up, layer.forward
    layer.forward = lambda inputs: plain(inputs) + up(down(inputs))


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def compiled(layer: nn.Linear) -> None:
    layer.compile(backend="eager")


def tripled(parameter: Tensor) -> None:
    parameter.grad.mul_(3)


def halved(layer: nn.Module, inward: Any, outward: Any) -> tuple[Tensor]:
    return (inward[0] / 2,)


def done(change: Callable[[nn.Linear], object]) -> Callable[[nn.Linear], None]:
    """A change whose result is no layer."""

    def changed(layer: nn.Linear) -> None:
        change(layer)

    return changed


NOT_PLAIN: dict[str, Callable[[nn.Linear], nn.Module | None]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral norm by a hook": lambda layer: torch.nn.utils.spectral_norm(layer),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", amount=0.4),
    "a forward of its own": adapted,
    "a class of its own": lambda layer: Doubled(WIDTH, WIDTH),
    "forward hook": done(lambda x: x.register_forward_hook(lambda m, i, o: o * 2)),
    "pre-hook": done(lambda x: x.register_forward_pre_hook(lambda m, i: (i[0] / 2,))),
    "backward hook": done(lambda x: x.register_full_backward_hook(halved)),
    "hook on a gradient": done(lambda x: x.weight.register_hook(lambda g: g * 3)),
    "hook after a gradient": done(lambda x: x.weight.register_post_accumulate_grad_hook(tripled)),
    "frozen bias": done(lambda x: x.bias.requires_grad_(False)),
    "compiled": compiled,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("what", NOT_PLAIN)
def test_a_layer_that_is_not_plain_is_not_fused_and_trains(what):
    fused = check(lambda: Net(NOT_PLAIN[what]))
    layers = [] if fused._layers is None else fused._layers.layers
    assert fused.module.hidden not in layers
    assert what == "compiled" or fused.module.output in layers


def test_a_plain_layer_is_fused():
    fused = check(Net)
    assert fused._layers.layers == [fused.module.hidden, fused.module.output]
    assert fused._layers.num_calls == 8


class Shared(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.hidden.weight

    def forward(self, inputs):
        return super().forward(self.other(inputs))


def test_weights_that_two_layers_have_are_not_fused():
    fused = check(Shared)
    assert fused._layers.layers == [fused.module.output]


class Twice(Net):
    def forward(self, inputs):
        return super().forward(self.hidden(inputs).relu())


class Sometimes(Net):
    def forward(self, inputs):
        return super().forward(self.hidden(inputs) if inputs.mean() > 0 else inputs)


class Penalised(Net):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        if inputs.mean() > 0:
            outputs = outputs * self.hidden.weight.square().sum()
        return outputs


class WithALayerOfItself(Net):
    """Its weights are read in a plain product too, and in the backward pass."""

    def forward(self, inputs):
        inputs = functional.linear(inputs, self.hidden.weight)
        if inputs.requires_grad:
            inputs.register_hook(lambda g: g * self.hidden.weight.norm())
        return super().forward(inputs)


class Saliency(Net):
    """Weighs inputs by the gradient of an output, which is differentiated once more."""

    def forward(self, inputs):
        given = inputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(super().forward(given)[:, 0].sum(), given, create_graph=True)
        return super().forward(inputs * slope)


class Adversarial(Net):
    def forward(self, inputs):
        if not torch.is_grad_enabled():
            return super().forward(inputs)
        given = inputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(super().forward(given).logsumexp(1).sum(), given)
        return super().forward(inputs + 0.1 * slope.sign())


class FastWeights(Net):
    """One inner step, through which the outer one is differentiated."""

    def forward(self, inputs):
        own = dict(self.hidden.named_parameters())
        inner = self.hidden(inputs).square().mean()
        slopes = torch.autograd.grad(inner, list(own.values()), create_graph=True)
        fast = {name: p - 0.5 * g for (name, p), g in zip(own.items(), slopes, strict=True)}
        return self.output(torch.func.functional_call(self.hidden, fast, (inputs,)).tanh())


class Checkpointed(Net):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs):
        outputs = checkpoint(self.hidden, self.first(inputs), use_reentrant=self.reentrant)
        return self.output(outputs.tanh())


class WithoutGradient(Net):
    def forward(self, inputs):
        with torch.no_grad():
            hidden = self.hidden(inputs)
        return self.output(hidden.tanh())


class Autocast(Net):
    def forward(self, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(inputs).float()


class Teacher(Net):
    """Its teacher is a copy of its layer, made when it is first called."""

    teacher = None

    def forward(self, inputs):
        if self.teacher is None:
            object.__setattr__(self, "teacher", copy.deepcopy(self.hidden))
        return super().forward(inputs + self.teacher(inputs).detach())


class HookedLater(Net):
    def forward(self, inputs):
        if not self.hidden._forward_hooks:
            self.hidden.register_forward_hook(lambda m, i, o: o * m.weight.norm())
        return super().forward(inputs)


class Vectorising(Net):
    def forward(self, inputs):
        return torch.func.vmap(super().forward)(inputs)


class Recomputed(Net):
    """A compiled function reads the layer."""

    def __init__(self):
        super().__init__()
        self.function = torch.compile(super().forward, backend="eager")

    def forward(self, inputs):
        return self.function(inputs)


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        Sometimes,
        Penalised,
        WithALayerOfItself,
        Saliency,
        Adversarial,
        FastWeights,
        lambda: Checkpointed(True),
        lambda: Checkpointed(False),
        WithoutGradient,
        Autocast,
        Teacher,
        HookedLater,
        Vectorising,
        Recomputed,
    ],
)
def test_what_else_a_model_does_with_a_fused_layer_is_as_in_pytorch(make):
    fused = check(make)
    assert fused.module.hidden in fused._layers.layers


class Hyper(Net):
    """The hidden layer's weight is made by another network, a step at a time."""

    def __init__(self):
        super().__init__()
        self.code, self.maker = nn.Parameter(torch.ones(4)), nn.Linear(4, WIDTH * WIDTH)
        del self.hidden.weight

    def forward(self, inputs):
        self.hidden.weight = self.maker(self.code).view(WIDTH, WIDTH) * 0.1
        return super().forward(inputs)


class DroppedWeights(Net):
    """An LSTM whose recurrent weights are drawn from raw ones."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.raw = nn.Parameter(self.lstm.weight_hh_l0.detach().clone())
        del self.lstm.weight_hh_l0

    def forward(self, inputs):
        self.lstm.weight_hh_l0 = functional.dropout(self.raw, 0.5)
        return super().forward(self.lstm(inputs[None])[0][0])


class MadeKernel(Net):
    """A convolution, pooled, whose kernel and bias are made by another network."""

    def __init__(self):
        super().__init__()
        self.maker = nn.Linear(1, 32 * 9)
        self.convolution = nn.Conv2d(1, 32, 3, padding=1)
        del self.convolution.weight, self.convolution.bias

    def forward(self, inputs):
        self.convolution.weight = self.maker(torch.ones(1)).view(32, 1, 3, 3)
        self.convolution.bias = torch.zeros(32)
        images = self.convolution(inputs[:, None, None, :]).mean((1, 2))
        return super().forward(images)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("make", [Hyper, DroppedWeights, MadeKernel])
def test_layers_whose_weights_are_made_elsewhere_are_not_fused(make, precision):
    runtime = TorchRuntime(task_of(make), precision, one_thread=True, fused_from=EVERY)
    whole = [type(layer) is nn.Linear and layer._parameters for layer in runtime._layers.layers]
    assert whole
    assert all("weight" in parameters for parameters in whole)
    if precision == "float32":
        check(make)


class Reader(nn.Module):
    """An LSTM, whose compiled step may be taken before the backward pass is over."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 32, batch_first=True)
        self.output = nn.Linear(32, 3)
        if what == "hook on a leaf":
            self.first.bias.register_hook(self.slowed)

    def slowed(self, gradient: Tensor) -> Tensor:
        return gradient * self.lstm.weight_hh_l0.norm()

    def forward(self, inputs: Tensor) -> Tensor:
        steps = self.first(inputs.view(-1, 4, 4))
        if self.what == "hook":
            steps.register_hook(self.slowed)
        if self.what == "function":
            steps = Slowed.apply(steps, self)
        outputs, (last, _) = self.lstm(steps)
        if self.what == "penalty":
            outputs = outputs * self.lstm.weight_hh_l0.square().sum()
        if self.what == "twice":
            outputs = outputs + self.lstm(steps.flip(1))[0]
        if self.what == "differentiated":
            slope = torch.autograd.grad(last.sum(), self.lstm.weight_ih_l0, retain_graph=True)[0]
            outputs = outputs * slope.norm()
        return self.output(outputs[:, -1])


class Slowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps, reader):
        ctx.reader = reader
        return steps.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.reader.slowed(gradient), None


@pytest.mark.parametrize(
    "what",
    ["plain", "hook", "hook on a leaf", "function", "penalty", "twice", "differentiated"],
)
def test_a_compiled_layer_steps_at_once_only_where_nothing_can_tell(what, monkeypatch):
    at_once = []

    class Spy(Deferred):
        def at_once(self, weights):
            found = super().at_once(weights)
            at_once.append(found[0].data_ptr() == weights[0].data_ptr())
            return found

    monkeypatch.setattr(fused_sgd, "Deferred", Spy)
    fused = check(lambda: Reader(what))
    assert fused.module.lstm.weight_hh_l0._version >= 4  # steps, which autograd is told of
    if lstm.suits(fused.module.lstm, "float32", EVERY):  # where there is a C++ compiler
        assert fused.module.lstm in fused._layers.layers
        assert set(at_once) == {what in ("plain", "differentiated")}


def test_a_patched_class_is_not_plain(monkeypatch):
    layer, plain = nn.Linear(2, 2), nn.Linear.forward
    assert is_plain(layer, nn.Linear)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, inputs: 2 * plain(self, inputs))
    assert not is_plain(layer, nn.Linear)


def test_a_hook_on_all_modules_leaves_none_plain():
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        assert not is_plain(nn.Linear(2, 2), nn.Linear)
    finally:
        handle.remove()


def test_a_step_that_fails_changes_no_weight():
    def fail(gradient):
        raise RuntimeError("in the backward pass")

    class Failing(Net):
        def forward(self, inputs):
            middle = self.hidden(inputs)
            middle.register_hook(fail)
            return self.output(middle)

    runtime = runtime_of(task_of(Failing))
    before = runtime._weights.copy()
    with pytest.raises(RuntimeError, match="in the backward pass"):
        runtime.step(slice(0, 7), LR)
    np.testing.assert_array_equal(runtime._weights, before)


def test_a_loss_without_a_gradient_is_told_in_words():
    class Detached(Net):
        def forward(self, inputs):
            return super().forward(inputs).detach()

    with pytest.raises(ValueError, match=r"must depend on the model's trained parameters, got"):
        runtime_of(task_of(Detached)).step(slice(0, 7), LR)
