"""A cohort as one program: what the plain loop gives, or the plain loop itself, and it says so."""

import dataclasses
import logging
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from potluck import (
    CNN,
    Adagrad,
    Adam,
    FedAvg,
    FedProx,
    LogisticRegression,
    Loop,
    Momentum,
    Nesterov,
    Scaffold,
    Task,
    TwoNN,
    Vmap,
    Workers,
    Yogi,
    datasets,
    fed_sgd,
    partitions,
    rounds,
    schedules,
)
from potluck.core import Correction, DivergedError, TrainingError, derive_seed
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime
from potluck.engine.local_run import LocalRun, batches_of
from potluck.engine.vmap import compile_later
from potluck.engine.vmap.cohort_trainer import CohortRuntime
from potluck.engine.vmap.compile_later import CompiledLater
from potluck.engine.vmap.fedsgd_step import PooledStep, _parts
from potluck.simulation.executors.vmap_executor import chunk_for
from potluck.simulation.executors.workers import cut
from slope import slope_task


class Dropped(nn.Module):
    """Draws masks in two layers, one of them by channel; averaged buffers, a counter that steps
    depend on, a frozen layer and one that is never used. Without a kink, on either side of which
    the rounding of a batch's norm could put a gradient."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64, momentum=None)
        self.first = nn.Linear(64, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.channels = nn.Dropout1d(0.3)
        self.last = nn.Linear(32, 10)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(self.norm(inputs.flatten(1))))
        hidden = self.channels(self.frozen(hidden).view(-1, 8, 4)).flatten(1)
        return self.last(functional.dropout(hidden, 0.5, self.training, inplace=True))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Linear(4, 10)

    def forward(self, inputs):
        return self.last(functional.gelu(self.norm(self.conv(inputs))).mean((2, 3)))


def tied():
    first = nn.Linear(64, 64)
    second = nn.Linear(64, 64)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Tanh(), nn.Linear(64, 10))


def deep():
    """A stack without all biases, whose layers are small and wide."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 40),
        nn.Linear(40, 10, bias=False),
    )


STACKS = {
    "logistic": lambda: LogisticRegression((1, 8, 8)),
    "2nn": lambda: TwoNN((1, 8, 8)),
    "deep": deep,
}
OTHERS = {"dropped": Dropped, "normed": Normed, "tied": tied, "cnn": lambda: CNN((1, 8, 8))}
MODELS = STACKS | OTHERS
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_stack = pytest.mark.parametrize("model", STACKS.values(), ids=STACKS)


@pytest.fixture(scope="module")
def data():
    """Clients of 2 to some hundred examples."""
    return partitions.unbalanced(datasets.digits(), clients=15, sigma=1.2, seed=0)


@pytest.fixture(scope="module")
def pairs():
    """Clients whose last batches of 10 are never of one example, which batch norm refuses."""
    dataset = datasets.digits()
    sizes = [25, 40, 12, 7, 33, 10, 58, 19]
    starts = np.cumsum([0, *sizes])
    return FederatedData(
        name="digits",
        train=Examples(dataset.train.inputs[: starts[-1]], dataset.train.targets[: starts[-1]]),
        test=dataset.test,
        offsets=starts,
        clients=tuple(map(str, range(len(sizes)))),
        num_classes=10,
    )


ALGORITHMS = {
    "fedavg": FedAvg(client_lr=0.1, local_epochs=2),
    "full batches": FedAvg(client_lr=0.1, local_epochs=3, batch_size=None),
    "fedsgd": fed_sgd(client_lr=0.2),
    "clipped": FedAvg(client_lr=0.1, gradient_clip=0.5, client_schedule=schedules.Cosine(9)),
    "fedprox": FedProx(client_lr=0.1, local_epochs=2, mu=0.3),
    "scaffold": Scaffold(client_lr=0.1, local_epochs=2),
    "scaffold, clipped": Scaffold(client_lr=0.1, gradient_clip=1.0, server=Nesterov()),
    "momentum": FedAvg(client_lr=0.1, server=Momentum(momentum=0.5)),
    "adagrad": FedAvg(client_lr=0.1, server=Adagrad(server_lr=0.05)),
    "adam": FedAvg(client_lr=0.1, server=Adam(server_lr=0.05), server_schedule=schedules.Warmup(3)),
    "yogi": FedProx(client_lr=0.1, mu=0.1, server=Yogi(server_lr=0.05)),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def history(task, executor, algorithm=ALGORITHMS["fedavg"], **kwargs):
    kwargs = {"cohort": 0.5, "num_rounds": 3, "seed": 3, "evaluate_every": 3} | kwargs
    try:
        return list(rounds(algorithm, task, executor=executor, **kwargs))
    finally:
        executor.close()


def assert_alike(ones, others, atol=1e-5):
    for one, other in zip(ones, others, strict=True):
        assert one.cohort.tolist() == other.cohort.tolist()
        np.testing.assert_allclose(one.weights, other.weights, rtol=0, atol=atol)
        assert one.number == 0 or one.loss == pytest.approx(other.loss, rel=1e-4)
        assert (one.num_examples, one.uplink_bytes) == (other.num_examples, other.uplink_bytes)
        for mine, theirs in ((one.state.optimizer, other.state.optimizer),
                             (one.state.algorithm, other.state.algorithm),
                             (one.client_states, other.client_states)):  # fmt: skip
            assert set(mine) == set(theirs)
            for name, vector in mine.items():
                np.testing.assert_allclose(vector, theirs[name], rtol=1e-4, atol=atol)
    assert np.abs(ones[-1].weights - ones[0].weights).max() > 1e-3


@every_algorithm
@pytest.mark.parametrize("model", ["logistic", "dropped"])
def test_vmap_is_loop_is_workers_for_every_algorithm(algorithm, model, data, pairs):
    task = Task(model=MODELS[model], data=pairs if model == "dropped" else data)
    vmap = Vmap(task)
    ours = history(task, vmap, algorithm)
    assert vmap.refused is None
    assert_alike(history(task, Loop(task), algorithm), ours)
    assert_alike(history(task, Workers(task, 2), algorithm), ours)
    assert_alike(history(task, Workers(task, 2, chunk=3), algorithm), ours)


@every_model
def test_vmap_is_loop_for_every_model(model, pairs):
    task = Task(model=model, data=pairs)
    vmap = Vmap(task, chunk=3)
    ours = history(task, vmap)
    assert vmap.refused is None
    assert_alike(history(task, Loop(task)), ours)


@pytest.fixture(scope="module")
def runtimes(data, pairs):
    """For every model: the task, and the runtime of one client and those of many."""

    def made(name):
        task = Task(model=MODELS[name], data=pairs if name == "dropped" else data)
        faster = [CohortRuntime(task, plain=True)]
        if name in STACKS:
            faster.append(CohortRuntime(task))
        assert [runtime.is_stack for runtime in faster] == [False, True][: len(faster)]
        return task, TorchRuntime(task), faster

    return {name: made(name) for name in MODELS}


@given(
    name=st.sampled_from(list(MODELS)),
    clients=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    batch=st.sampled_from([2, 3, 10, None]),
    epochs=st.integers(1, 3),
    clip=st.sampled_from([None, 0.05, 1e6]),
    proximal=st.sampled_from([0.0, 0.7]),
    drifts=st.booleans(),
    same_start=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25)
def test_every_client_gets_what_it_would_get_alone(
    runtimes, name, clients, batch, epochs, clip, proximal, drifts, same_start, seed
):
    task, plain, faster = runtimes[name]
    random = np.random.default_rng(seed)
    start = task.initial_weights(seed)
    runs = []
    for k, client in enumerate(clients):
        size = int(task.data.sizes[client])
        batches = [b for b in batches_of(size, batch) if name != "dropped" or b.stop - b.start > 1]
        drift = random.normal(0, 0.1, len(start)).astype(np.float32) if drifts else None
        runs.append(
            LocalRun(
                start if same_start else start * np.float32(1 + k / 10),
                random.permutation(size) + task.data.offsets[client],
                [(b, 0.1 / (1 + e)) for e in range(epochs) for b in batches][:8],
                derive_seed(seed, "model", k),
                Correction(clip, proximal, drift),
            )
        )
    for runtime in faster:
        weights, losses = runtime.train(runs)
        for client, run, row, loss in zip(clients, runs, weights, losses, strict=True):
            plain.take(task.data.client(client))
            order = run.rows - task.data.offsets[client]
            expected, expected_loss = alone(plain, run, order)
            if not np.allclose(row, expected, rtol=0, atol=1e-5):
                # Where rounding decides whether a ReLU lets an input through, or a maximum is
                # taken here or there, one client alone is no oracle: it does not agree with itself.
                near = [alone(plain, run, order, noise) for noise in range(1, 9)]
                assume(all(np.allclose(w, expected, rtol=0, atol=5e-6) for w, _ in near))
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
            assert loss == pytest.approx(expected_loss, rel=1e-4)


def alone(runtime, run, order, noise=0):
    """The weights and the loss of one client's run; with noise, from a start that is some
    roundings away."""
    scale = np.random.default_rng(noise).normal(1, 3e-7 * (noise > 0), len(run.start))
    runtime.begin((run.start * scale).astype(np.float32), order, run.seed, run.correction)
    for rows, lr in run.steps:
        runtime.step(rows, lr)
    weights, loss = runtime.end()
    return weights.copy(), loss


def test_the_size_of_a_chunk_changes_no_more_than_rounding(data):
    task = Task(model=MODELS["2nn"], data=data)
    assert_alike(history(task, Vmap(task, chunk=1)), history(task, Vmap(task, chunk=64)))
    with pytest.raises(ValueError, match="chunk=0"):
        Vmap(task, chunk=0)


def test_chunks_shrink_with_the_model():
    assert chunk_for(100) == 256
    assert 4 <= chunk_for(6_653_480) < chunk_for(796_840) < chunk_for(31_400) < 256
    assert chunk_for(2**50) == 1


def test_workers_train_chunks_of_about_equal_work():
    assert cut(np.full(10, 600), 2, 5) == [(0, 5), (5, 10)]
    assert cut(np.full(12, 600), 4, 5) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert cut(np.array([90, 30, 30, 20, 10]), 2, 4) == [(0, 1), (1, 5)]
    assert cut(np.array([5, 1, 1, 1]), 2, 2) == [(0, 1), (1, 3), (3, 4)]
    assert cut(np.array([7]), 2, 5) == [(0, 1)]
    assert cut(np.empty(0, np.int64), 2, 5) == []


def test_workers_with_chunks_repeat_to_the_bit_whoever_trains_which(data):
    task = Task(model=MODELS["logistic"], data=data)
    one, other = (history(task, Workers(task, 2, chunk=2)) for _ in range(2))
    assert one[-1].weights.tobytes() == other[-1].weights.tobytes()
    with pytest.raises(ValueError, match="chunk=0"):
        Workers(task, 2, chunk=0)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedsgd"])
def test_resuming_from_any_round_changes_nothing(name, data):
    task, algorithm = Task(model=MODELS["logistic"], data=data), ALGORITHMS[name]
    whole = history(task, Vmap(task), algorithm)
    for earlier in whole[1:-1]:
        resume = (earlier.number, earlier.state, earlier.client_states)
        rest = history(task, Vmap(task), algorithm, resume=resume)
        assert rest[-1].weights.tobytes() == whole[-1].weights.tobytes()


def test_global_randomness_and_threads_are_left_alone(pairs):
    task = Task(model=Dropped, data=pairs)
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    history(task, Vmap(task))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


class Twice(FedAvg):
    """Trains twice in a round, the second time from where the first one ended."""

    def client_update(self, received, client):
        first = yield self.local_sgd(received, client.round)
        start = first.weights.copy()  # the next answer may be written over it
        update = yield from FedAvg.client_update(self, start, client)
        return update._replace(delta=update.delta + start - received)


def test_an_algorithm_that_trains_twice_is_answered_twice(data):
    task = Task(model=MODELS["logistic"], data=data)
    twice = Twice(client_lr=0.1)
    ours = history(task, Vmap(task), twice)
    assert_alike(history(task, Loop(task), twice), ours)
    once = history(task, Vmap(task), FedAvg(client_lr=0.1))
    assert np.abs(ours[-1].weights - once[-1].weights).max() > 1e-3


class Branches(nn.Module):
    """Does something else on what the data say, which cannot be vectorised."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        hidden = inputs.flatten(1)
        return self.layer(hidden if hidden.sum() > 1e9 else 2 * hidden)


class Rectified(nn.Module):
    """Draws what is not known to be drawn."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        return functional.rrelu(self.layer(inputs.flatten(1)), training=self.training)


class Noisy(LogisticRegression):
    def __init__(self):
        super().__init__((1, 8, 8))

    def forward(self, inputs):
        return super().forward(inputs + torch.rand_like(inputs))


class Remembers(nn.Module):
    """Keeps state in Python, which gives one program for many clients something else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return self.layer(inputs.flatten(1)) * (1 + self.calls % 5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branches, "at torch.Tensor.__bool__: "),
        (Rectified, "at torch.nn.functional.rrelu: .*aten::rrelu_with_noise"),
        (Noisy, "at torch.rand_like: .*random operation"),
        (Remembers, "it writes 'calls', and not by writing into a buffer in place"),
    ],
    ids=["branches", "rrelu", "noisy", "remembers"],
)
def test_what_cannot_be_vectorised_is_trained_by_the_loop_and_a_line_says_why(
    model, reason, data, caplog
):
    task = Task(model=model, data=data)
    vmap = Vmap(task)
    with caplog.at_level(logging.WARNING, "potluck"):
        ours = history(task, vmap, num_rounds=2)
    (record,) = caplog.records
    assert record.message.startswith("vmap cannot train this model, so loop does. ")
    assert re.search(reason, record.message)
    assert "\n" not in record.message
    loop = history(task, Loop(task), num_rounds=2)
    assert loop[-1].weights.tobytes() == ours[-1].weights.tobytes()


def test_a_loss_that_reads_the_weights_of_the_model_is_differentiated(data):
    made = []

    def model():
        made.append(LogisticRegression((1, 8, 8)))
        return made[-1]

    def penalised(outputs, targets):
        penalty = sum((p**2).sum() for p in made[-1].parameters())
        return functional.cross_entropy(outputs, targets) + penalty

    task = Task(model=model, data=data, loss=penalised)
    start = task.initial_weights(0)
    cohort = CohortRuntime(task)  # trains the module that was made last
    steps = [(slice(0, 60), 0.05)] * 20
    weights, _ = cohort.train([LocalRun(start, np.arange(60), steps, 0, Correction())] * 2)
    assert np.linalg.norm(weights[0]) < 0.5 * np.linalg.norm(start)


def test_a_client_whose_loss_is_not_finite_is_named_and_the_others_are_not_touched():
    # Client 1 has a y that makes its loss infinite in float32.
    task = slope_task([(1, 2)], [(1, 1e30)], [(1, -4)])
    for algorithm in (FedAvg(client_lr=0.1), Scaffold(client_lr=0.1), fed_sgd(client_lr=0.1)):
        each = [
            history(task, executor, algorithm, cohort=1.0, skip_failures=True)
            for executor in (Loop(task), Vmap(task), Workers(task, 2, chunk=2))
        ]
        for theirs, *others in zip(*each, strict=True):
            for ours in others:
                assert ours.failures == theirs.failures
                np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-5)
        assert [failure.client for failure in each[0][1].failures] == [1]
        with pytest.raises(DivergedError, match=r"client '1' \(number 1\), round 1: .*loss="):
            history(task, Vmap(task), algorithm, cohort=1.0)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("model", ["logistic", "tied"])
def test_a_label_out_of_range_names_the_client_and_the_program_goes_on(model, algorithm, data):
    targets = data.train.targets.copy()
    row = int(data.offsets[4]) + 1
    targets[row] = 12
    train = Examples(data.train.inputs, targets)
    task = Task(model=MODELS[model], data=dataclasses.replace(data, train=train))
    vmap = Vmap(task)
    kwargs = {"cohort": 1.0, "skip_failures": True}
    ours = history(task, vmap, ALGORITHMS[algorithm], **kwargs)
    assert vmap.refused is None
    assert [f.client for f in ours[1].failures] == [4]
    assert "IndexError: Target 12 is out of bounds" in ours[1].failures[0].reason
    assert_alike(history(task, Loop(task), ALGORITHMS[algorithm], **kwargs), ours)
    for executor in (Vmap(task), Workers(task, 2, chunk=4)):
        with pytest.raises(TrainingError, match="client '4'"):
            history(task, executor, cohort=1.0)


SHORT_OF_MEMORY = """
import resource
from pathlib import Path

import numpy as np
from torch import nn

from potluck import FedAvg, Loop, Task, Vmap, datasets, partitions, rounds

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20_000), nn.Tanh(), nn.Linear(20_000, 10))

data = partitions.iid(datasets.digits(), clients=100, seed=0)
task = Task(model=wide, data=data)
vmap = Vmap(task, chunk=100)
def last(executor):
    return list(rounds(FedAvg(client_lr=0.1), task, cohort=100, num_rounds=1, seed=0,
                       evaluate_every=2, executor=executor))[-1].weights
expected = last(Loop(task))
used = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, used + 500 * 2**20))
np.testing.assert_array_equal(last(vmap), expected)
print(vmap.refused)
"""


def test_a_cohort_that_does_not_fit_into_memory_is_trained_one_by_one():
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=True
    )
    assert "allocate memory" in done.stdout


def test_federated_sgd_is_one_large_batch_where_examples_do_not_mix(data, pairs):
    for name in ("logistic", "cnn"):
        task = Task(model=MODELS[name], data=data)
        vmap = Vmap(task)
        history(task, vmap, ALGORITHMS["fedsgd"])
        assert vmap._pooling._is_tried
    task = Task(model=Dropped, data=pairs)
    vmap = Vmap(task)
    assert_alike(
        history(task, Loop(task), ALGORITHMS["fedsgd"]), history(task, vmap, ALGORITHMS["fedsgd"])
    )
    assert vmap._pooling._is_refused
    assert vmap.refused is None


def test_a_large_batch_is_made_of_whole_clients(data):
    batches = [np.arange(n) for n in (700, 300, 400, 2500, 1, 1)]
    assert _parts(batches) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    task = Task(model=MODELS["logistic"], data=data)
    start = task.initial_weights(0)
    rows = [np.arange(a, b) for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)]
    shares = data.sizes / data.sizes.sum()
    local, losses = PooledStep(task).step(start, rows, shares, 0.1)
    union, _ = PooledStep(task).step(start, [np.concatenate(rows)], np.ones(1), 0.1)
    np.testing.assert_allclose(local, union, rtol=0, atol=1e-7)
    assert len(losses) == 15
    own = Task(
        model=MODELS["logistic"], data=data, loss=lambda *both: functional.cross_entropy(*both)
    )
    its_local, its_losses = PooledStep(own).step(start, rows, shares, 0.1)  # a client at a time
    np.testing.assert_allclose(local, its_local, rtol=0, atol=1e-7)
    np.testing.assert_allclose(losses, its_losses, rtol=1e-6)


def test_sequences_are_trimmed_to_the_longest_of_their_group():
    random = np.random.default_rng(0)
    length = random.integers(1, 9, 60)
    inputs = random.integers(0, 20, (60, 8)).astype(np.int16)
    inputs[np.arange(8) >= length[:, None]] = 20
    examples = Examples(inputs, random.integers(0, 3, 60))
    data = FederatedData(
        name="sequences", train=examples, test=examples, offsets=np.array([0, 20, 45, 60]),
        clients=("a", "b", "c"), num_classes=3, padding=20,
    )  # fmt: skip

    class Bag(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.embedding = nn.Embedding(21, 6, padding_idx=20)
            self.dropout, self.last = nn.Dropout(rate), nn.Linear(6, 3)

        def forward(self, symbols):
            return self.last(self.dropout(self.embedding(symbols.int())).sum(1))

    for rate in (0.0, 0.5):
        task = Task(model=lambda rate=rate: Bag(rate), data=data)
        vmap = Vmap(task)
        ours = history(task, vmap, cohort=1.0)
        assert vmap.refused is None
        assert_alike(history(task, Loop(task), cohort=1.0), ours)


def ticking(seconds):
    """A clock on which every look takes so long."""
    now = iter(np.arange(0.0, 1e9, seconds))
    return lambda: float(next(now))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_step_is_the_step(pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    task = Task(model=Normed, data=pairs)
    runtime = CohortRuntime(task, compiles=True)
    gradient = runtime._gradient._plain_gradient
    # Every look at the clock takes less time than the one before: what comes last is the fastest.
    now = iter(np.cumsum(1.0 / np.arange(1, 1000)))
    gradient._after, gradient._clock = 0.6, lambda: float(next(now))
    start = task.initial_weights(0)
    runs = [
        LocalRun(
            start, np.arange(10) + task.data.offsets[k], [(slice(0, 10), 0.1)] * 8, 0, Correction()
        )
        for k in (0, 1)
    ]
    weights, losses = runtime.train(runs)
    assert gradient.num_compiled == 1
    expected, expected_losses = CohortRuntime(task, plain=True).train(runs)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)


@pytest.mark.soak
def test_what_cannot_be_compiled_goes_on_as_it_is():
    calls = []

    def prints(tensor):
        calls.append(len(calls))
        return {"sum": tensor * float(tensor.sum())}  # leaves the graph

    later = CompiledLater(prints, after_seconds=2.5, clock=ticking(1.0))
    ones = torch.ones(3)
    for _ in range(5):
        assert torch.equal(later(ones)["sum"], 3 * ones)
    assert list(later._chosen) == [((3,),)]
    assert later.num_compiled == 0
    later(torch.ones(4))
    assert len(later._chosen) == 1  # a shape at a time


def test_a_compiled_function_that_differs_or_is_no_faster_is_not_kept(monkeypatch):
    for seconds, kept in (({"plain": 2.0, "fast": 1.0}, 1), ({"plain": 1.0, "fast": 1.0}, 0)):
        now = [0.0]

        def plain(tensor, now=now, seconds=seconds):
            now[0] += seconds["plain"]
            return 2 * tensor

        def fast(tensor, now=now, seconds=seconds):
            now[0] += seconds["fast"]
            return tensor + tensor

        later = CompiledLater(plain, after_seconds=1.0, clock=lambda now=now: now[0])
        monkeypatch.setattr(compile_later, "_compiled", lambda function, fast=fast: fast)
        later(torch.ones(2))
        assert later.num_compiled == kept
        monkeypatch.setattr(compile_later, "_compiled", lambda function: lambda tensor: 3 * tensor)
        later(torch.ones(5))
        assert later.num_compiled == kept
