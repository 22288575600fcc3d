"""A cohort on a device: the lines for a GPU, run on a CPU, give what the plain loop gives."""

import dataclasses
import logging
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vmap import ALGORITHMS, MODELS, Branches, Dropped, assert_alike, history
from torch import nn
from torch._C._functorch import get_unwrapped, is_batchedtensor

from potluck import (
    Auto,
    FedAvg,
    FedProx,
    Loop,
    Scaffold,
    Task,
    Vmap,
    datasets,
    fed_sgd,
    partitions,
)
from potluck.core import Correction, DivergedError, FixedPointMean, derive_seed
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime
from potluck.engine.devices import device_of, devices_of, on_stream, stream_of
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.gpu.cuda_graph import Captured
from potluck.engine.gpu.device_examples import Resident
from potluck.engine.gpu.reduce import DeviceSum
from potluck.engine.gpu.schedule import ticks
from potluck.engine.local_run import LocalRun, batches_of
from potluck.engine.precision import products
from potluck.models import CharacterAccuracy, CharLSTM, PeepholeCharLSTM, PerCharacter, PerStep
from slope import slope_task

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(scope="module")
def data():
    """Clients of 2 to some hundred examples."""
    return partitions.unbalanced(datasets.digits(), clients=15, sigma=1.2, seed=0)


@pytest.fixture(scope="module")
def pairs():
    """Clients whose last batches of 10 are never of one example, which batch norm refuses."""
    return packed(datasets.digits().train, [25, 40, 12, 7, 33, 10, 58, 19], 10)


def packed(train, sizes, classes, padding=None):
    count = sum(sizes)
    return FederatedData(
        name="packed",
        train=Examples(train.inputs[:count], train.targets[:count]),
        test=Examples(train.inputs[:9], train.targets[:9]),
        offsets=np.cumsum([0, *sizes]),
        clients=tuple(map(str, range(len(sizes)))),
        num_classes=classes,
        padding=padding,
    )


def lines(sizes=(3, 41, 17, 8, 25), width=40, symbols=30):
    """Lines of random symbols and lengths, for roles of unequal parts."""
    random, count = np.random.default_rng(0), sum(sizes)
    length = random.integers(2, width + 1, count)
    drawn = random.integers(0, symbols - 1, (count, width + 1)).astype(np.int16)
    pads = np.arange(width) >= length[:, None]
    parts = [np.where(pads, np.int16(symbols - 1), p) for p in (drawn[:, :-1], drawn[:, 1:])]
    return packed(Examples(*parts), sizes, symbols, padding=symbols - 1)


def text_task(model=CharLSTM, loss=None, data=None):
    return Task(
        model=partial(model, 30, 8, 12),
        data=data or lines(),
        loss=loss or PerCharacter(padding=29),
        metrics={"accuracy": CharacterAccuracy(padding=29)},
    )


def both(task, algorithm, **options):
    """Rounds of `vmap` on a device and of `loop`, and the former."""
    vmap = Vmap(task, device="cpu", **options)
    kwargs = {"cohort": 1.0, "num_rounds": 2}
    ours = history(task, vmap, algorithm, **kwargs)
    return ours, history(task, Loop(task), algorithm, **kwargs), vmap


CASES = [
    *[(name, "fedavg") for name in MODELS if name != "cnn"],
    *[(name, kind) for name in ("logistic", "tied", "dropped") for kind in ("scaffold", "fedsgd")],
    ("logistic", "full batches"),
    ("normed", "clipped"),
    ("2nn", "scaffold, clipped"),
    ("tied", "fedprox"),
    ("logistic", "yogi"),
]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_on_a_device_a_round_is_that_of_the_loop(name, kind, data, pairs):
    task = Task(model=MODELS[name], data=pairs if name == "dropped" else data)
    vmap = Vmap(task, device="cpu", chunk=4)
    ours = history(task, vmap, ALGORITHMS[kind])
    assert vmap.refused is None
    assert_alike(ours, history(task, Loop(task), ALGORITHMS[kind]))


def test_the_paper_s_cnn_on_a_device_is_that_of_the_loop(data):
    task = Task(model=MODELS["cnn"], data=packed(data.train, [20, 7, 13], 10))
    ours, theirs, vmap = both(task, FedAvg(client_lr=0.1))
    assert vmap.refused is None
    assert_alike(ours, theirs)


TEXTS = {
    "per character": (CharLSTM, PerCharacter(padding=29)),
    "per step": (CharLSTM, PerStep(padding=29, steps=40)),
    "peepholes": (PeepholeCharLSTM, PerCharacter(padding=29)),
}
RULES = {
    "fedavg": FedAvg(client_lr=0.5, local_epochs=2, batch_size=4),
    "fedsgd": fed_sgd(client_lr=0.5),
    "fedprox": FedProx(client_lr=0.5, mu=0.5, batch_size=4, gradient_clip=0.1),
    "scaffold": Scaffold(client_lr=0.5, batch_size=4),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rule", RULES)
def test_an_lstm_on_lines_of_unequal_length_is_that_of_the_loop(text, rule):
    model, loss = TEXTS[text]
    ours, theirs, vmap = both(text_task(model, loss), RULES[rule])
    assert vmap.refused is None
    assert vmap.placed.is_pure
    assert_alike(ours, theirs)
    assert ours[-1].metrics == pytest.approx(theirs[-1].metrics, rel=1e-4)
    assert vmap._pooling._is_tried == (rule == "fedsgd")


@given(
    clients=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    batch=st.sampled_from([1, 3, 10, None]),
    clip=st.sampled_from([None, 0.05]),
    proximal=st.sampled_from([0.0, 0.7]),
    drifts=st.booleans(),
    chunk=st.integers(1, 5),
    lanes=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=15)
def test_every_client_gets_what_it_would_get_alone(
    texts, clients, batch, clip, proximal, drifts, chunk, lanes, seed
):
    task, plain = texts
    random, start = np.random.default_rng(seed), task.initial_weights(seed)
    runs = []
    for k, client in enumerate(clients):
        size = int(task.data.sizes[client])
        drift = random.normal(0, 0.1, len(start)).astype(np.float32) if drifts else None
        batches = batches_of(size, batch)
        runs.append(
            LocalRun(
                start * np.float32(1 + k / 10),
                random.permutation(size) + task.data.offsets[client],
                [(b, 0.5 / (1 + i)) for i, b in enumerate(batches)][:5],
                derive_seed(seed, "model", k),
                Correction(clip, proximal, drift),
            )
        )
    weights, losses = DeviceCohort(task, CPU, chunk=chunk, lanes=lanes).train(runs)
    for client, run, row, loss in zip(clients, runs, weights, losses, strict=True):
        plain.take(task.data.client(client))
        plain.begin(run.start, run.rows - task.data.offsets[client], run.seed, run.correction)
        for rows, lr in run.steps:
            plain.step(rows, lr)
        expected, expected_loss = plain.end()
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
        assert loss == pytest.approx(expected_loss, rel=1e-4)


@pytest.fixture(scope="module")
def texts():
    task = text_task()
    return task, TorchRuntime(task)


def runs_of(task, num_steps=3):
    start = task.initial_weights(0)
    return [
        LocalRun(
            start,
            np.arange(a, b),
            [(slice(0, min(b - a, 10)), 0.1)] * num_steps,
            0,
            Correction(),
        )
        for a, b in zip(task.data.offsets[:-1], task.data.offsets[1:], strict=True)
    ]


def test_the_sum_of_a_device_has_the_bits_of_the_mean(data):
    task = Task(model=MODELS["2nn"], data=data)
    runs, weights = runs_of(task), data.sizes.astype(np.float64)
    cohort = DeviceCohort(task, CPU, chunk=4, lanes=2)
    total, mean = DeviceSum(cohort.spec, runs[0].start, CPU), FixedPointMean(cohort.spec.dim)
    for first, clients, program in cohort.chunks(runs):
        part, kept = weights[first : first + clients], weights[first : first + clients].copy()
        kept[0] = 0.0  # is left out
        total.add(program, kept)
        deltas = program.result(clients).numpy() - runs[0].start
        largest = total.largest(program, clients)
        np.testing.assert_array_equal(largest, np.abs(deltas).max(1))
        for delta, weight in zip(deltas[1:], part[1:], strict=True):
            mean.add(delta, weight)
    assert total.take().tobytes() == mean.sum.tobytes()


def test_a_round_that_is_summed_on_the_device_is_one_whose_updates_come_back(data):
    class Other(FedAvg):
        """The same, which nobody knows to be linear."""

    task = Task(model=MODELS["tied"], data=data)
    summed, back = (
        history(task, Vmap(task, device="cpu"), kind(client_lr=0.1)) for kind in (FedAvg, Other)
    )
    for one, other in zip(summed, back, strict=True):
        assert one.weights.tobytes() == other.weights.tobytes()


def test_chunks_and_lanes_change_no_more_than_rounding(data):
    task = Task(model=MODELS["tied"], data=data)
    runs = runs_of(task)
    expected, losses = DeviceCohort(task, CPU, chunk=15).train(runs)
    for chunk, lanes in ((1, 1), (4, 3), (2, 2)):
        found, found_losses = DeviceCohort(task, CPU, chunk=chunk, lanes=lanes).train(runs)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found_losses, losses, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fedavg", "scaffold"])
def test_resuming_changes_nothing(kind, data):
    task, algorithm = Task(model=MODELS["logistic"], data=data), ALGORITHMS[kind]
    whole = history(task, Vmap(task, device="cpu"), algorithm)
    resume = (whole[1].number, whole[1].state, whole[1].client_states)
    rest = history(task, Vmap(task, device="cpu"), algorithm, resume=resume)
    assert rest[-1].weights.tobytes() == whole[-1].weights.tobytes()


def test_examples_that_do_not_fit_are_placed_a_chunk_at_a_time(data):
    task = Task(model=MODELS["tied"], data=data)
    runs = runs_of(task)
    whole, parts = DeviceCohort(task, CPU, chunk=4), DeviceCohort(task, CPU, chunk=4, lanes=2)
    parts._share = 1000.0  # bytes
    expected, _ = whole.train(runs)
    for _ in range(2):  # also when there is room from before
        found, _ = parts.train(runs)
        np.testing.assert_array_equal(found, expected)
    assert whole.resident().is_whole
    assert not parts.resident().is_whole
    some = Resident(data.train, CPU, 0.0)
    places, moved = some.place(np.array([7, 3, 7]))
    assert (places.tolist(), moved) == ([1, 0, 1], True)
    np.testing.assert_array_equal(some.inputs[places].numpy(), data.train.inputs[[7, 3, 7]])


class Hungry(nn.Module):
    """Fits into memory for four clients at most, as a device would find."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        weight = self.layer.weight
        if is_batchedtensor(weight) and len(get_unwrapped(weight)) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.tanh(self.layer(inputs.flatten(1)))


def test_a_chunk_without_memory_is_halved_and_the_round_goes_on(data, caplog):
    task = Task(model=Hungry, data=data)
    with caplog.at_level(logging.WARNING, "potluck"):
        ours, theirs, vmap = both(task, FedAvg(client_lr=0.1))
    assert [record.message for record in caplog.records] == [
        "out of memory on cpu: chunks are halved to 7",
        "out of memory on cpu: chunks are halved to 3",
    ]
    assert (vmap.refused, vmap.placed.chunk) == (None, 3)
    assert_alike(ours, theirs)


def test_what_cannot_be_vectorised_is_trained_by_the_loop_and_a_line_says_why(data, caplog):
    task = Task(model=Branches, data=data)
    with caplog.at_level(logging.WARNING, "potluck"):
        ours, theirs, vmap = both(task, FedAvg(client_lr=0.1))
    (record,) = caplog.records
    assert "at torch.Tensor.__bool__: " in record.message
    assert vmap.refused is not None
    assert ours[-1].weights.tobytes() == theirs[-1].weights.tobytes()


def test_a_client_whose_loss_is_not_finite_is_named_and_the_others_are_not_touched():
    # Client 1 has a y that makes its loss infinite in float32.
    task = slope_task([(1, 2)], [(1, 1e30)], [(1, -4)])
    for algorithm in (FedAvg(client_lr=0.1), Scaffold(client_lr=0.1), fed_sgd(client_lr=0.1)):
        options = {"cohort": 1.0, "skip_failures": True}
        ours = history(task, Vmap(task, device="cpu"), algorithm, **options)
        theirs = history(task, Loop(task), algorithm, **options)
        for one, other in zip(ours, theirs, strict=True):
            assert one.failures == other.failures
            np.testing.assert_allclose(one.weights, other.weights, rtol=1e-5)
        with pytest.raises(DivergedError, match=r"client '1' \(number 1\), round 1: .*loss="):
            history(task, Vmap(task, device="cpu"), algorithm, cohort=1.0)


def test_data_that_would_end_the_process_on_a_gpu_never_get_there(data):
    targets = data.train.targets.copy()
    targets[int(data.offsets[4]) + 1] = 12
    task = Task(
        model=MODELS["tied"],
        data=dataclasses.replace(data, train=Examples(data.train.inputs, targets)),
    )
    vmap = Vmap(task, device="cpu")
    assert vmap.placed.misfits == {4}
    for algorithm in (FedAvg(client_lr=0.1), fed_sgd(client_lr=0.1)):
        ours = history(task, vmap, algorithm, cohort=1.0, skip_failures=True)
        assert [f.client for f in ours[1].failures] == [4]
        assert "IndexError: Target 12 is out of bounds" in ours[1].failures[0].reason
    text = lines()
    text.train.inputs[0, 0] = 77
    assert DeviceCohort(text_task(data=text), CPU).misfits == {0}


def test_auto_may_choose_a_device(data):
    task = Task(model=MODELS["logistic"], data=data)
    now = iter(np.arange(0.0, 1e6))  # all are as fast, and rounds take a second
    auto = Auto(task, 1, clock=lambda: float(next(now)), device=CPU)
    ours = history(task, auto)
    assert "vmap on cpu in chunks of 15" in " ".join(round.executor for round in ours)
    assert_alike(ours, history(task, Loop(task)))
    assert Auto(task, 1, device="cpu")._on_device is None


def plan_of(sizes, batch, epochs=1):
    starts = np.cumsum([0, *sizes])
    return [
        LocalRun(
            np.zeros(1, np.float32), np.arange(a, b),
            [(s, 0.1) for _ in range(epochs) for s in batches_of(b - a, batch)], 0, Correction(),
        )
        for a, b in pairwise(starts)
    ]  # fmt: skip


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=60)
    | st.builds(lambda size, clients: [size] * clients, st.integers(1, 90), st.integers(1, 9)),
    batch=st.sampled_from([1, 4, 10, 40, None]),
    fills=st.booleans(),
    text=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_ticks_make_every_step_of_every_client_once_and_in_order(sizes, batch, fills, text):
    runs = plan_of(sizes, batch, epochs=2)
    length = np.random.default_rng(0).integers(1, 81, sum(sizes)) if text else None
    lengths = [length[run.rows] for run in runs] if text else None
    made = [[] for _ in runs]
    for tick in ticks(runs, lengths, 80, fills=fills):
        assert tick.clients.tolist() == sorted(set(tick.clients.tolist()))
        assert tick.width in ((16, 32, 48, 64, 80) if text else (0,))
        for client, rows, rate in zip(tick.clients, tick.rows, tick.rates, strict=True):
            assert rate == np.float32(0.1)
            assert fills or rows.min() >= 0
            assert set((~rows[rows < 0]).tolist()) <= {int(rows[0])}
            assert not text or length[rows[rows >= 0]].max() <= tick.width
            made[client].append(rows[rows >= 0].tolist())
    for run, steps in zip(runs, made, strict=True):
        assert steps == [run.rows[rows].tolist() for rows, _ in run.steps]


def test_ticks_fill_short_batches_up_and_step_everybody_together():
    sizes = [tick.rows.shape for tick in ticks(plan_of([25, 10, 3], 10), None, 0, fills=True)]
    assert sizes == [(3, 10), (1, 10), (1, 10)]
    exact = [tick.rows.shape for tick in ticks(plan_of([25, 10, 3], 10), None, 0, fills=False)]
    assert sorted(exact) == [(1, 3), (1, 5), (1, 10), (2, 10)]


def test_bfloat16_moves_a_model_as_float32_does_and_less_exactly():
    ours, theirs, vmap = both(text_task(), RULES["fedavg"], precision="bf16")
    assert vmap.refused is None
    moved = np.abs(theirs[-1].weights - theirs[0].weights).max()
    apart = np.abs(ours[-1].weights - theirs[-1].weights).max()
    assert 1e-6 * moved < apart < 0.05 * moved


def test_precision_is_asked_for_and_leaves_no_trace(data):
    task = Task(model=MODELS["2nn"], data=data)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with products("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        with products("float32"):
            assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    with pytest.raises(ValueError, match="CPU, which has no TF32, got precision='tf32'"):
        Vmap(task, device="cpu", precision="tf32")
    with pytest.raises(ValueError, match="without a device, got precision='bf16'"):
        Vmap(task, precision="bf16")
    with pytest.raises(ValueError, match=r"one of 'float32', .*got precision='half'"):
        Vmap(task, device="cpu", precision="half")


def test_a_device_is_named_or_refused():
    assert device_of("cpu") == CPU
    assert devices_of("cpu", 3) == [CPU] * 3
    for name in ("gpu", "cuda:", "cuda:x", "mps", "cpu:1", "cuda1"):
        with pytest.raises(ValueError, match=f"'auto', got device='{name}'"):
            device_of(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_does_without():
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=r"must be at hand .*, got none: .*device='auto'"):
            device_of(name)
    assert device_of("auto") == CPU
    assert devices_of("auto", 2) == [CPU, CPU]


def test_on_a_cpu_nothing_is_captured():
    calls = []
    step = Captured(lambda: calls.append(1), stream_of(CPU), None)
    for _ in range(6):
        with on_stream(stream_of(CPU)):
            step()
    assert (len(calls), step.is_captured, step.refused) == (6, False, None)


@needs_cuda
@pytest.mark.parametrize("name", ["2nn", "cnn", "tied", "text", "peepholes", "dropped"])
def test_on_a_gpu_a_replayed_round_is_that_of_the_loop(name, data, pairs):
    task = {
        "text": lambda: text_task(),
        "peepholes": lambda: text_task(PeepholeCharLSTM),
        "dropped": lambda: Task(model=Dropped, data=pairs),
    }.get(name, lambda: Task(model=MODELS[name], data=data))()
    vmap = Vmap(task, device="cuda", chunk=4)
    # Few steps: rounding grows with them, fastest in the CNN, on any machine.
    rule, options = FedAvg(client_lr=0.1), {"cohort": 1.0, "num_rounds": 2}
    ours = history(task, vmap, rule, **options)
    assert vmap.refused is None
    assert vmap.placed.num_captured > 0 or name == "dropped"
    assert_alike(ours, history(task, Loop(task), rule, **options), atol=1e-4)


@needs_cuda
def test_a_step_that_cannot_be_captured_goes_on_and_a_line_says_why(caplog):
    device = torch.device("cuda")
    total = torch.zeros(1, device=device)

    def waits():
        total.add_(float(total.sum() >= 0))  # asks the GPU for a number

    stream = stream_of(device)
    step = Captured(waits, stream, torch.cuda.graph_pool_handle())
    for _ in range(6):
        with on_stream(stream):
            step()
    torch.cuda.synchronize()
    assert torch.rand(3, device=device).shape == (3,)  # others may go on drawing there
    assert float(total) == 6.0
    assert step.refused is not None
    assert "steps are not captured in CUDA graphs: " in caplog.text
