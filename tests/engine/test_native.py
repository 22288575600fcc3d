"""LSTM layers that are compiled: PyTorch's are the oracle."""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from local_steps import miscompiled
from potluck import FedAvg, Task, rounds
from potluck.core import Correction
from potluck.data import Examples, FederatedData
from potluck.data.lines import PADDING, encode_lines
from potluck.engine import TorchRuntime
from potluck.engine.deferred import Deferred
from potluck.engine.native import compiler, lstm
from potluck.engine.runtime import pure_loss
from potluck.models.language import CharLSTM
from potluck.models.losses import PerCharacter
from potluck.simulation import Loop, Vmap, Workers

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler"
)
LR = 0.3


def both(
    plain: nn.LSTM, shape: tuple[int, ...], ends: list[int] | None, with_cell: bool
) -> list[tuple[Tensor, Tensor]]:
    """Outputs, states, gradients of the inputs and stepped weights: PyTorch's and ours."""
    ours = copy.deepcopy(plain)
    inputs, deferred = torch.randn(shape), Deferred()
    weights = torch.randn(*shape[:2], plain.hidden_size)
    if ends is not None:
        lines = weights if plain.batch_first else weights.transpose(0, 1)
        for line, end in zip(lines, ends, strict=True):
            line[end:] = 0.0

    def loss(outputs: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return (outputs * weights).sum() + (h.sum() + (c * c).sum() if with_cell else 0.0)

    first, second = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    outputs, (h, c) = plain(first)
    onward, *gradients = torch.autograd.grad(loss(outputs, h, c), [first, *plain.parameters()])
    found, (found_h, found_c) = lstm.in_place(ours, second, deferred)
    with deferred.open(LR):
        (found_onward,) = torch.autograd.grad(loss(found, found_h, found_c), [second])
    stepped = [p - LR * g for p, g in zip(plain.parameters(), gradients, strict=True)]
    theirs = [outputs, h, c, onward, *stepped]
    mine = [found, found_h, found_c, found_onward, *ours.parameters()]
    return [(a.detach(), b.detach()) for a, b in zip(theirs, mine, strict=True)]


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "hidden", "layers", "batch_first"),
    [
        ((10, 20, 8), 256, 2, True),  # the paper's
        ((3, 5, 8), 128, 1, True),
        ((1, 1, 3), 128, 1, True),
        ((7, 13, 40), 160, 2, False),  # inputs that fill no panel
        ((3, 30, 300), 128, 2, True),
        ((300, 5, 33), 128, 3, False),  # more places than are summed at once
    ],
)
def test_a_compiled_layer_takes_pytorchs_step(shape, hidden, layers, batch_first):
    plain = nn.LSTM(shape[2], hidden, num_layers=layers, batch_first=batch_first)
    assert lstm.suits(plain)
    for theirs, ours in both(plain, shape, None, with_cell=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@needs_compiler
@pytest.mark.parametrize("with_cell", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ends", [[20, 5, 0, 13], [3, 5, 1, 4], [0, 0, 0, 0]])
def test_what_is_padded_is_left_out_and_nothing_else(ends, batch_first, with_cell):
    plain = nn.LSTM(8, 128, num_layers=2, batch_first=batch_first)
    shape = (4, 20, 8) if batch_first else (20, 4, 8)
    for theirs, ours in both(plain, shape, ends, with_cell):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@needs_compiler
@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0])
def test_gates_of_any_size_are_squashed_as_by_pytorch(size):
    plain = nn.LSTM(4, 128)
    with torch.no_grad():
        plain.weight_ih_l0 *= size
    inputs = torch.randn(6, 3, 4)
    theirs, _ = plain(inputs)
    ours, _ = lstm.in_place(plain, inputs, Deferred())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_what_is_not_a_number_stays_so():
    plain = nn.LSTM(4, 128)
    inputs = torch.randn(6, 3, 4)
    inputs[2, 1, 0] = float("nan")
    ours, _ = lstm.in_place(plain, inputs, Deferred())
    assert torch.equal(torch.isnan(ours), torch.isnan(plain(inputs)[0]))
    assert torch.isnan(ours[2:, 1]).all()
    assert not torch.isnan(ours[:, 0]).any()


@needs_compiler
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(8, 64),
        nn.LSTM(8, 129),
        nn.LSTM(8, 128, bidirectional=True),
        nn.LSTM(8, 128, proj_size=32),
        nn.LSTM(8, 128, bias=False),
        nn.LSTM(8, 128, num_layers=2, dropout=0.5),
        nn.GRU(8, 128),
    ],
)
def test_other_layers_are_left_to_pytorch(layer):
    assert not lstm.suits(layer)


def to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def step_by_hand(
    weights: list[Tensor], inputs: Tensor, into: Tensor, rounded: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """States, gradients of the inputs and stepped weights of one layer, all factors of products
    rounded and nothing else: the chain rule, written out."""
    w, u, b, b2 = weights
    size = u.shape[1]
    h = c = torch.zeros(inputs.shape[1], size)
    kept = []
    for x in inputs:
        a = rounded(x) @ rounded(w).t() + rounded(h) @ rounded(u).t() + b + b2
        i, f, g, o = (
            squash(part)
            for squash, part in zip(
                (torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid),
                a.chunk(4, dim=1),
                strict=True,
            )
        )
        before, c = (h, c), f * c + i * g
        h = o * c.tanh()
        kept.append((x, before, (i, f, g, o), c, h))
    into_h, into_c = torch.zeros_like(h), torch.zeros_like(c)
    onward, changes = [], [torch.zeros_like(p) for p in weights]
    for (x, (h_before, c_before), (i, f, g, o), c, _), flows in zip(
        reversed(kept), reversed(into), strict=True
    ):
        into_h, s = into_h + flows, c.tanh()
        into_c = into_c + into_h * o * (1 - s * s)
        parts = (
            into_c * g * i * (1 - i),
            into_c * c_before * f * (1 - f),
            into_c * i * (1 - g * g),
            into_h * s * o * (1 - o),
        )
        into_a = torch.cat(parts, dim=1)
        onward.insert(0, rounded(into_a) @ rounded(w))
        changes[0] += rounded(into_a).t() @ rounded(x)
        changes[1] += rounded(into_a).t() @ rounded(h_before)
        changes[2] += into_a.sum(0)
        changes[3] += into_a.sum(0)
        into_h, into_c = rounded(into_a) @ rounded(u), into_c * f
    stepped = [p - LR * change for p, change in zip(weights, changes, strict=True)]
    return [torch.stack([h for *_, h in kept]), torch.stack(onward), *stepped]


@pytest.mark.parametrize("inputs", [8, 33, 128])
@pytest.mark.parametrize("lines", [1, 11, 37])
def test_products_in_bfloat16_round_their_factors_and_nothing_else(inputs, lines):
    torch.manual_seed(0)
    layer = nn.LSTM(inputs, 128)
    if not lstm.suits(layer, "bf16"):
        pytest.skip("no compiled products in bfloat16 here")
    weights = [parameter.detach().clone() for parameter in layer.parameters()]
    x, into = torch.randn(5, lines, inputs), torch.randn(5, lines, 128)
    into[3:, 0] = 0.0
    ours = x.clone().requires_grad_()
    deferred = Deferred()
    found, _ = lstm.in_place(layer, ours, deferred, "bf16")
    with deferred.open(LR):
        (onward,) = torch.autograd.grad((found * into).sum(), [ours])
    tensors = [found, onward, *layer.parameters()]
    # Some sums differ in their last bit, and some of these round to another bfloat16.
    expected = step_by_hand(weights, x, into, to_bfloat16)
    unrounded = step_by_hand(weights, x, into, lambda factor: factor)
    for mine, theirs, others in zip(tensors, expected, unrounded, strict=True):
        assert (mine - theirs).abs().mean() < 0.3 * (mine - others).abs().mean()
        torch.testing.assert_close(mine.detach(), theirs, rtol=0.0, atol=5e-3)


class Reader(nn.Module):
    """Reads lines with one LSTM and says of each which of two kinds it is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embedding = nn.Embedding(258, 8)
        self.lstm = nn.LSTM(8, 128, batch_first=True)
        self.output = nn.Linear(128, 258)

    def forward(self, inputs: Tensor) -> Tensor:
        embedded = self.embedding(inputs.int())
        if self.how == "state given":
            state = torch.ones(1, len(inputs), 128)
            return self.output(self.lstm(embedded, (state, state))[0])
        outputs, (h, _) = self.lstm(embedded)
        if self.how == "called twice":
            outputs = outputs + self.lstm(embedded.flip(1))[0]
        if self.how == "sometimes twice" and 2 < len(inputs) < 10:
            outputs = outputs + self.lstm(embedded.flip(1))[0]
        if self.how == "last state":
            outputs = outputs + h[0][:, None]
        if self.how == "penalty":
            outputs = outputs + self.lstm.weight_hh_l0.square().mean()
        return self.output(outputs)


def lines() -> FederatedData:
    random = np.random.default_rng(0)
    some = [bytes(random.integers(97, 123, n).tolist()) for n in random.integers(1, 12, 46)]
    examples = encode_lines(some, 12)
    return FederatedData(
        name="lines",
        train=examples,
        test=Examples(examples.inputs[:5], examples.targets[:5]),
        offsets=np.array([0, 23, 46]),
        clients=("a", "b"),
        num_classes=258,
        padding=PADDING,
    )


def task(model) -> Task:
    return Task(model=model, data=lines(), loss=PerCharacter(padding=PADDING), metrics={})


WAYS = {  # and how often the compiled layer is called in four steps
    "once": 4,
    "last state": 4,
    "sometimes twice": 5,
    "called twice": 8,
    "state given": 0,
    "penalty": 4,
}


@needs_compiler
@pytest.mark.parametrize("correction", [None, Correction(0.1, 0.0, None)])
@pytest.mark.parametrize(("how", "calls"), WAYS.items())
def test_a_runtime_compiles_a_layer_where_that_is_exact(how, calls, correction):
    problem = task(lambda: Reader(how))
    start, examples = problem.initial_weights(1), problem.data.client(0)
    ours = TorchRuntime(problem, one_thread=True)
    assert ours._layers.layers == [ours.module.lstm]
    plain = TorchRuntime(problem)
    assert plain._layers is None
    found = []
    for runtime in (ours, plain):
        runtime.take(examples)
        runtime.begin(start, np.arange(23), 0, *([] if correction is None else [correction]))
        for batch in (slice(0, 10), slice(10, 20), slice(20, 23), slice(0, 23)):
            runtime.step(batch, 0.5)
        weights, loss = runtime.end()
        found.append((weights.copy(), loss))
    moved = np.abs(found[1][0] - start).max()
    assert moved > 1e-2
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5 * moved)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert ours._layers.num_calls == (0 if correction else calls)


@needs_compiler
@pytest.mark.parametrize(("num_threads", "layers"), [(1, 1), (2, 0)])
def test_kernels_on_several_threads_keep_pytorchs_lstm(num_threads, layers):
    problem = task(lambda: Reader("once"))
    for runtime in (Loop(problem, num_threads)._runtime, Vmap(problem, 2, num_threads)._plain):
        found = [] if runtime._layers is None else runtime._layers.layers
        assert sum(type(layer) is nn.LSTM for layer in found) == layers


@needs_compiler
def test_loop_and_workers_give_the_same_bits_and_the_pure_steps_to_tolerance():
    problem = task(lambda: CharLSTM(hidden=128))
    algorithm = FedAvg(client_lr=0.5, local_epochs=1, batch_size=10)
    found = []
    for make in (Loop, lambda t: Workers(t, 2)):
        executor = make(problem)
        *_, last = rounds(algorithm, problem, cohort=1.0, num_rounds=2, executor=executor)
        executor.close()
        found.append(last.weights)
    np.testing.assert_array_equal(*found)
    weights = torch.from_numpy(problem.initial_weights(1))
    inputs, targets = (torch.from_numpy(array[:10].copy()) for array in problem.data.client(0))
    gradient = torch.func.grad(pure_loss(problem))(weights, inputs, targets).numpy()
    runtime = TorchRuntime(problem, one_thread=True)
    runtime.take(problem.data.client(0))
    runtime.begin(weights.numpy(), np.arange(23), 0)
    runtime.step(slice(0, 10), 1.0)
    error = np.abs(weights.numpy() - runtime.end()[0] - gradient).max()
    assert error < 1e-5 * np.abs(gradient).max()


def test_without_a_compiler_everything_goes_through_pytorch(
    cold_kernels, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        assert not lstm.suits(nn.LSTM(8, 128))
    (said,) = caplog.messages
    assert "LSTMs are not compiled: there is no C++ compiler" in said
    runtime = TorchRuntime(task(lambda: Reader("once")), one_thread=True)
    assert runtime._layers is None


@needs_compiler
def test_a_compiler_that_fails_leaves_it_to_pytorch(cold_kernels, monkeypatch, caplog):
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "--no-such-flag"))
    assert not lstm.suits(nn.LSTM(8, 128))
    (said,) = caplog.messages
    assert "LSTMs are not compiled" in said
    assert list(cold_kernels.glob("lstm*")) == []


@needs_compiler
def test_what_is_compiled_wrongly_is_not_used(cold_kernels, monkeypatch, tmp_path, caplog):
    right, wrong = "into_h * s * o * (1.0f - o)", "into_h * s * o"
    monkeypatch.setattr(lstm, "_SOURCES", miscompiled(lstm._SOURCES, tmp_path, right, wrong))
    assert not lstm.suits(nn.LSTM(8, 128))
    assert "differs from PyTorch's" in caplog.text


@needs_compiler
@pytest.mark.parametrize(("target", "columns"), [("x86-64", 8), ("haswell", 16)])
def test_processors_with_narrower_vectors_take_the_same_step(
    cold_kernels, monkeypatch, target, columns
):
    if platform.machine() != "x86_64" or not torch.cpu._is_avx2_supported():
        pytest.skip("no x86 processor with AVX2")
    flags = [f"-march={target}" if f.startswith("-march") else f for f in compiler.FLAGS]
    monkeypatch.setattr(compiler, "FLAGS", flags)
    plain = nn.LSTM(33, 128, num_layers=2)
    assert lstm.suits(plain)
    assert not lstm.suits(plain, "bf16")
    assert lstm._library().columns == columns
    for theirs, ours in both(plain, (7, 13, 33), None, with_cell=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@needs_compiler
def test_it_can_be_switched_off(cold_kernels, monkeypatch, caplog):
    monkeypatch.setenv("POTLUCK_NATIVE", "0")
    assert not lstm.suits(nn.LSTM(8, 128))
    assert not cold_kernels.exists()
    assert not caplog.messages
