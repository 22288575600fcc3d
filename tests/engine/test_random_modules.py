"""Random modules: a fused step, a plain one and `torch.optim.SGD` lead to the same weights."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from potluck import Task
from potluck.core import derive_seed
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime, spec_of

WIDTH, EXAMPLES, LR = 8, 20, 0.1
BATCHES = [slice(0, 7), slice(7, 14), slice(14, 20), slice(0, 20)]
KINDS = ["linear", "no bias", "narrow", "conv", "lstm", "gru", "norm", "attention", "dropout"]
WRAPPED = [
    "nothing",
    "nothing",
    "weight norm",
    "spectral norm",
    "orthogonal",
    "weight norm by a hook",
    "pruned",
    "patched",
    "forward hook",
    "pre-hook",
    "backward hook",
    "hook on a gradient",
    "frozen",
    "frozen bias",
    "a class of its own",
]
TWISTS = [
    "nothing",
    "nothing",
    "nothing",
    "twice",
    "sometimes",
    "penalty",
    "read",
    "shared",
    "slope",
    "checkpoint",
    "no gradient",
    "buffer",
    "residual",
]


class Block(NamedTuple):
    """What is drawn of one block of a module."""

    kind: str
    wrapped: str
    twist: str


class Scaled(nn.Linear):
    """A class of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class Recurrent(nn.Module):
    """[batch, WIDTH] as two steps of half of it each; the last output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        cell = nn.LSTM if kind == "lstm" else nn.GRU
        self.cell = cell(WIDTH // 2, 32, batch_first=True)
        self.output = nn.Linear(32, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.cell(inputs.view(-1, 2, WIDTH // 2))[0][:, -1])


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.output = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.conv(inputs[:, None]).flatten(1))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH // 2, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = inputs.view(-1, 2, WIDTH // 2)
        return self.attention(steps, steps, steps)[0].flatten(1)


def core_of(block: Block) -> nn.Module:
    if block.kind in ("lstm", "gru"):
        return Recurrent(block.kind)
    if block.kind == "conv":
        return Convolved()
    if block.kind == "attention":
        return Attentive()
    if block.kind == "norm":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    if block.kind == "dropout":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))
    if block.kind == "narrow":
        return nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH))
    if block.wrapped == "a class of its own":
        return Scaled(WIDTH, WIDTH)
    return nn.Linear(WIDTH, WIDTH, bias=block.kind != "no bias")


def done_to(layer: nn.Module, wrapped: str) -> None:
    """Wrap the first linear or recurrent layer of a block."""
    name = "weight_hh_l0" if isinstance(layer, nn.RNNBase) else "weight"
    if wrapped == "weight norm":
        parametrizations.weight_norm(layer, name)
    elif wrapped == "spectral norm":
        parametrizations.spectral_norm(layer, name)
    elif wrapped == "orthogonal":
        parametrizations.orthogonal(layer, name)
    elif wrapped == "weight norm by a hook":
        torch.nn.utils.weight_norm(layer, name)
    elif wrapped == "pruned":
        prune.l1_unstructured(layer, name, amount=0.3)
    elif wrapped == "patched" and isinstance(layer, nn.Linear):
        layer.gain = nn.Parameter(torch.ones(()))
        plain = layer.forward
        layer.forward = lambda inputs: layer.gain * plain(inputs)
    elif wrapped == "forward hook" and isinstance(layer, nn.Linear):
        layer.register_forward_hook(lambda m, i, o: o * 1.5)
    elif wrapped == "pre-hook":
        layer.register_forward_pre_hook(lambda m, i: (i[0] * 0.5,))
    elif wrapped == "backward hook":
        layer.register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,))
    elif wrapped == "hook on a gradient":
        getattr(layer, name).register_hook(lambda g: g * 0.5)
    elif wrapped == "frozen":
        layer.requires_grad_(False)
    elif wrapped == "frozen bias" and getattr(layer, "bias", None) is not None:
        next(p for n, p in layer.named_parameters() if "bias" in n).requires_grad_(False)


class Twisted(nn.Module):
    """A block and what its module does with it."""

    def __init__(self, block: Block, earlier: list[nn.Module]) -> None:
        super().__init__()
        self.twist = block.twist
        self.core = core_of(block)
        layers = [m for m in self.core.modules() if isinstance(m, nn.Linear | nn.RNNBase)]
        self.first = next((m for m in layers if not isinstance(m, nn.RNNBase)), None)
        others = [m for m in earlier if _is_wide(m)]
        if self.twist == "shared" and others and _is_wide(self.first):
            self.first.weight = others[0].weight
            layers = []  # two parameters would have one memory
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            if layers:
                done_to(layers[0], block.wrapped)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        twist, first = self.twist, self.first
        if twist == "checkpoint":
            return checkpoint(self.core, inputs, use_reentrant=False, preserve_rng_state=True)
        if twist == "no gradient":
            with torch.no_grad():
                return inputs + self.core(inputs)
        if twist == "slope":  # differentiates itself, and is differentiated again
            given = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
            outputs = self.core(given)
            (slope,) = torch.autograd.grad(
                outputs.sin().sum(), given, create_graph=True, allow_unused=True
            )
            return outputs + 0.1 * slope
        outputs = self.core(inputs)
        if twist == "twice" or (twist == "sometimes" and inputs.sum() > 0):
            outputs = outputs + self.core(outputs.tanh())
        if twist == "penalty" and first is not None:
            outputs = outputs * (1 + 0.1 * first.weight.square().mean())
        if twist == "read" and _is_wide(first):
            outputs = outputs + functional.linear(inputs, first.weight.t())
        if twist == "buffer" and torch.is_grad_enabled():
            with torch.no_grad():
                self.seen.mul_(0.9).add_(inputs.mean(0), alpha=0.1)
            outputs = outputs + self.seen
        return outputs + inputs if twist == "residual" else outputs


def _is_wide(layer: object) -> bool:
    return isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (
        WIDTH,
        WIDTH,
    )


class Random(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList()
        for block in blocks:
            plain = [m for m in self.modules() if type(m) is nn.Linear and not m._forward_pre_hooks]
            self.blocks.append(Twisted(block, [m for m in plain if "weight" in m._parameters]))
        self.output = nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs * self.scale
        for block in self.blocks:
            hidden = block(hidden).tanh()
        return self.output(hidden)


def task_of(blocks: list[Block]) -> Task:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((EXAMPLES, WIDTH)).astype(np.float32)
    examples = Examples(inputs, random.integers(0, 3, EXAMPLES))
    data = FederatedData(
        name="random",
        train=examples,
        test=examples,
        offsets=np.array([0, EXAMPLES]),
        clients=("a",),
        num_classes=3,
    )
    return Task(model=lambda: Random(blocks), data=data)


def in_pytorch(task: Task, blocks: list[Block]) -> np.ndarray:
    """The steps of `torch.optim.SGD`, on a module of its own that is drawn from the same seed."""
    torch.manual_seed(derive_seed(0, "weights"))
    module = Random(blocks)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR)
    inputs, targets = (torch.from_numpy(array.copy()) for array in task.data.client(0))
    torch.manual_seed(1)
    for batch in BATCHES:
        optimizer.zero_grad()
        functional.cross_entropy(module(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    spec = spec_of(module)
    return spec.flatten({name: own[name].detach().numpy() for name in spec.names})


def stepped(task: Task, fused_from: int | None) -> tuple[TorchRuntime, np.ndarray]:
    runtime = TorchRuntime(task, one_thread=True, fused_from=fused_from)
    runtime.take(task.data.client(0))
    runtime.begin(task.initial_weights(0), np.arange(EXAMPLES), 1)
    for batch in BATCHES:
        runtime.step(batch, LR)
    return runtime, runtime.end()[0].copy()


def test_fused_steps_are_plain_steps_and_those_of_pytorch():
    counts: Counter[str] = Counter()

    @settings(
        max_examples=320,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(
            st.builds(
                Block, st.sampled_from(KINDS), st.sampled_from(WRAPPED), st.sampled_from(TWISTS)
            ),
            min_size=1,
            max_size=3,
        )
    )
    def compared(blocks: list[Block]) -> None:
        task = task_of(blocks)
        try:
            expected = in_pytorch(task, blocks)
        except (RuntimeError, TypeError, UserWarning):  # PyTorch itself cannot, or warns
            return
        (_, theirs), (fused, ours) = (stepped(task, fused_from) for fused_from in (None, 1))
        np.testing.assert_allclose(theirs, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(expected - task.initial_weights(0)).max() > 1e-4
        counts["modules"] += 1
        calls = 0 if fused._layers is None else fused._layers.num_calls
        counts["fused"] += calls > len(BATCHES)  # more than the output layer
        chosen = [] if fused._layers is None else fused._layers.layers
        counts["LSTMs"] += any(isinstance(layer, nn.LSTM) for layer in chosen)
        layers = [m for m in fused.module.modules() if isinstance(m, nn.Linear)]
        counts["left out"] += any(layer not in chosen for layer in layers)

    compared()
    assert counts["modules"] >= 300
    assert counts["fused"] >= 150
    assert counts["left out"] >= 100
    assert (
        counts["LSTMs"] >= 10
        or not TorchRuntime(
            task_of([Block("lstm", "nothing", "nothing")]), one_thread=True, fused_from=1
        )._layers.layers[1:]
    )
