"""Statistics are averaged by weight and by nothing else, and constants stay what they are: against
an averaging in plain PyTorch, for every algorithm, server optimizer, codec and executor."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from potluck import (
    Adagrad,
    Adam,
    Average,
    FedAvg,
    FedProx,
    Momentum,
    Nesterov,
    Scaffold,
    Task,
    Yogi,
    fed_sgd,
    own_data,
    rounds,
    schedules,
)
from potluck.core import (
    DivergedError,
    FixedPointMean,
    TrainingError,
    derive_seed,
    encoded_bytes,
    stream,
)
from potluck.core.codecs import CODECS
from potluck.engine import spec_of
from potluck.engine.buffers import roles
from potluck.simulation import Loop, Vmap, Workers

SIZES = (4, 9, 14)
SCHEDULE = schedules.Exponential(0.5)
SERVERS = {
    "average": Average(server_lr=0.6),
    "momentum": Momentum(),
    "nesterov": Nesterov(),
    "adagrad": Adagrad(server_lr=0.3),
    "adam": Adam(server_lr=0.3),
    "yogi": Yogi(server_lr=0.3),
}
CLIENT_LR, MU, CLIP = 0.2, 0.4, 0.3


def algorithm(kind, server):
    steps = {"client_lr": CLIENT_LR, "local_epochs": 2, "batch_size": 5}
    rest = {"server": SERVERS[server], "server_schedule": SCHEDULE}
    return {
        "fedavg": lambda: FedAvg(**steps, **rest),
        "fedprox": lambda: FedProx(**steps, mu=MU, **rest),
        "scaffold": lambda: Scaffold(**steps, **rest),
        "clipped": lambda: FedAvg(**steps, gradient_clip=CLIP, **rest),
        "fedsgd": lambda: fed_sgd(client_lr=CLIENT_LR, **rest),
    }[kind]()


class Net(nn.Module):
    """A frozen layer, two kinds of normalization, a large counter of floats, and constants that
    are infinite, not a number and of another type."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.cumulative = nn.BatchNorm1d(6, momentum=None)
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", torch.tensor(70_400.0))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0, 0.0, math.nan, 0.0]))
        self.register_buffer("loose", torch.full((2,), -1e9), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("nothing", torch.empty(0))
        self.still = nn.BatchNorm1d(6).eval()

    def forward(self, inputs):
        hidden = self.cumulative(self.norm(self.frozen(inputs)).tanh())
        hidden = torch.where(self.mask.isfinite(), hidden, 0.0)
        if self.training:
            self.seen.add_(100.0)
        return self.head(self.still(hidden) * self.scale.float())


def make():
    torch.manual_seed(3)
    return Net()


@pytest.fixture(scope="module")
def task():
    random = np.random.default_rng(0)
    clients = {
        f"c{i}": (random.standard_normal((n, 6)).astype(np.float32), random.integers(0, 3, n))
        for i, n in enumerate(SIZES)
    }
    test = random.standard_normal((5, 6)).astype(np.float32), random.integers(0, 3, 5)
    return Task(model=make, data=own_data.from_clients(clients, test=test))


@pytest.fixture(scope="module")
def spec(task):
    return roles(task)


@pytest.fixture(scope="module")
def executors(task):
    made = {"loop": Loop(task), "workers": Workers(task, 2), "vmap": Vmap(task)}
    yield made
    assert made["vmap"].refused is None
    for executor in made.values():
        executor.close()


def tensors(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def loaded(task, weights):
    """A module of plain PyTorch with these weights, in which the right parts train."""
    module = task.module(seed=0).train()
    if isinstance(module, Net):
        module.still.eval()
    with torch.no_grad():
        for name, value in spec_of(module).unflatten(np.array(weights)).items():
            tensors(module)[name].copy_(torch.from_numpy(value))
    return module


_KNOWN = {}


def locally(task, kind, weights, client, round, drift):
    """Local training in plain PyTorch; once where runs begin alike."""
    drifts = b"" if drift is None else drift.tobytes()
    key = kind, weights.tobytes(), client, round, drifts
    if key not in _KNOWN:
        _KNOWN[key] = _locally(task, kind, weights, client, round, drift)
    return _KNOWN[key]


def _locally(task, kind, weights, client, round, drift):
    module, start = loaded(task, weights), loaded(task, weights)
    examples, total = task.data.client(client), spec_of(module).num_parameters
    order = stream(0, "batches", round, client).permutation(examples.num_examples)
    torch.manual_seed(derive_seed(0, "model", round, client))
    inputs, targets = torch.tensor(examples.inputs[order]), torch.tensor(examples.targets[order])
    size, epochs = (len(inputs), 1) if kind == "fedsgd" else (5, 2)
    offsets = np.cumsum([0, *[p.numel() for p in module.parameters()]])
    drifts = None if drift is None else torch.from_numpy(drift[:total])
    for _ in range(epochs):
        for i in range(0, len(inputs), size):
            module.zero_grad()
            loss = task.loss(module(inputs[i : i + size]), targets[i : i + size])
            loss.backward()
            trained = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
            if kind == "clipped":
                nn.utils.clip_grad_norm_(trained, CLIP)
            with torch.no_grad():
                pairs = zip(module.parameters(), start.parameters(), strict=True)
                for k, (p, received) in enumerate(pairs):
                    if not p.requires_grad or p.grad is None:
                        continue
                    step = p.grad + (MU * (p - received) if kind == "fedprox" else 0.0)
                    if drifts is not None:
                        step = step + drifts[offsets[k] : offsets[k + 1]].view_as(p)
                    p -= CLIENT_LR * step
    return spec_of(module).flatten({n: t.detach().numpy() for n, t in _vector(module).items()})


def _vector(module):
    return {n: t for n, t in tensors(module).items() if n in spec_of(module).names}


def own_controls(before, client, num_parameters):
    """c − c_i of SCAFFOLD at the beginning of a round."""
    control = before.state.algorithm["control"]
    kept = before.client_states.get(client)
    own = np.zeros_like(control) if kept is None else kept[-num_parameters:]
    return control - own


@pytest.mark.parametrize("executor", ["loop", "workers", "vmap"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["fedavg", "fedprox", "scaffold", "clipped", "fedsgd"])
def test_statistics_are_the_mean_of_the_clients_and_see_nothing_else(
    task, spec, executors, kind, server, codec, executor
):
    run = algorithm(kind, server)
    done = list(
        rounds(
            run, task, cohort=1.0, num_rounds=2, seed=0, codec=codec, executor=executors[executor]
        )
    )
    weights = np.ones(3) if kind == "scaffold" else np.array(SIZES)
    shares = weights / weights.sum()
    for before, after in pairwise(done):
        local = []
        for client in range(3):
            drift = None
            if kind == "scaffold":
                drift = own_controls(before, client, spec.num_parameters)
            local.append(locally(task, kind, before.weights, client, after.number, drift))
        names = spec.unflatten(np.array(after.weights))
        for name, role in zip(spec.names, spec.roles, strict=True):
            found = names[name]
            values = [spec.unflatten(one)[name].astype(np.float64) for one in local]
            if role == "statistic":
                mean = sum(share * value for share, value in zip(shares, values, strict=True))
                np.testing.assert_allclose(found, mean, rtol=2e-4, atol=2e-5, err_msg=name)
            elif role == "constant":
                first = spec.unflatten(np.array(done[0].weights))[name]
                assert found.tobytes() == first.tobytes(), name
        if codec == "float32" and kind != "scaffold":
            parameters = before.weights[: spec.num_parameters].astype(np.float64)
            both = zip(shares, local, strict=True)
            mean = sum(share * one[: spec.num_parameters] for share, one in both)
            _, expected = SERVERS[server].step(
                before.state.optimizer,
                parameters.astype(np.float32),
                (mean - parameters).astype(np.float32),
                SCHEDULE(after.number),
            )
            found = after.weights[: spec.num_parameters]
            # Adaptive servers divide by numbers as small as 0.001.
            atol = 3e-3 if server in ("adagrad", "adam", "yogi") else 1e-5
            np.testing.assert_allclose(found, expected, atol=atol)
    assert all(names[n].min() > 0.0 for n in spec.names if n.endswith("running_var"))
    trained, averaged = spec.size("trained"), spec.size("statistic")
    assert (trained, averaged) == (6 * 2 * 3 + 3 * 6 + 3, 4 * 6 + 1)
    up = encoded_bytes(codec, run.vectors * trained) + 4 * averaged
    assert done[1].uplink_bytes == 3 * up
    assert done[1].downlink_bytes == 3 * 4 * (run.vectors * trained + averaged)


def test_roles_are_found_without_being_told(spec):
    found = dict(zip(spec.names, spec.roles, strict=True))
    assert "scale" not in found
    expected = {
        "constant": {"frozen.weight", "frozen.bias", "mask", "loose", "nothing"}
        | {"still.running_mean", "still.running_var"},
        "statistic": {f"{n}.running_{s}" for n in ("norm", "cumulative") for s in ("mean", "var")}
        | {"seen"},
    }
    for role, names in expected.items():
        assert {name for name, other in found.items() if other == role} == names


class Queue(nn.Module):
    """A memory of outputs, with a pointer that is an integer of each client's own."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("queue", torch.randn(4, 5))
        self.register_buffer("place", torch.tensor(0))

    def forward(self, inputs):
        hidden = self.layer(inputs)
        if self.training:
            with torch.no_grad():
                self.queue[:, int(self.place)] = hidden.mean(0)
                self.place += 1
                self.place %= 5
        return self.head(hidden + (hidden @ self.queue).softmax(1) @ self.queue.T)


class Codebook(nn.Module):
    """Vector quantization whose codes are running means, assigned anew in every step."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("codes", torch.randn(5, 4))
        self.register_buffer("counts", torch.ones(5))

    def forward(self, inputs):
        hidden = self.layer(inputs)
        nearest = torch.cdist(hidden, self.codes).argmin(1)
        chosen = self.codes[nearest]
        if self.training:
            ones = nn.functional.one_hot(nearest, 5).float()
            self.counts = 0.9 * self.counts + 0.1 * ones.sum(0)
            moved = self.codes + 0.1 * ones.T @ (hidden.detach() - chosen)
            self.codes = moved / self.counts[:, None]
        return self.head(hidden + (chosen - hidden).detach())


KEEPING = {
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.Linear(8, 3)
    ),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "queue": Queue,
    "codebook": Codebook,
}


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("name", KEEPING)
def test_whatever_a_model_keeps_is_the_mean_of_the_clients(task, name, executor):
    keeping = Task(model=KEEPING[name], data=task.data)
    run = FedAvg(client_lr=CLIENT_LR, local_epochs=2, batch_size=5)
    first, last = rounds(run, keeping, cohort=1.0, num_rounds=1, executor=executor)
    local = [_locally(keeping, "fedavg", first.weights, k, 1, None) for k in range(3)]
    expected = np.average(np.array(local, np.float64), axis=0, weights=SIZES)
    np.testing.assert_allclose(last.weights, expected, rtol=1e-4, atol=1e-5)


class Tracked(nn.Module):
    """A momentum encoder that is a frozen parameter, and a mask that is one."""

    def __init__(self, through_data=False):
        super().__init__()
        self.through_data = through_data
        self.query = nn.Linear(6, 3)
        self.key = nn.Parameter(torch.zeros(3, 6), requires_grad=False)
        self.table = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)

    def forward(self, inputs):
        if self.training and self.through_data:
            self.key.data = torch.lerp(self.key.data, self.query.weight.data, 0.1)
        elif self.training:
            with torch.no_grad():
                self.key.lerp_(self.query.weight, 0.1)
        return self.query(inputs)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("codec", ["float32", "int4"])
@pytest.mark.parametrize("kind", ["fedavg", "scaffold"])
@pytest.mark.parametrize("through_data", [False, True])
def test_a_frozen_parameter_that_training_writes_is_a_statistic(
    task, through_data, kind, codec, executor
):
    tracked = Task(model=lambda: Tracked(through_data), data=task.data)
    spec = roles(tracked)
    assert spec.names[:2] == ("key", "table")
    assert spec.roles == ("statistic", "constant", "trained", "trained")
    run = algorithm(kind, "adam")
    first, last = rounds(run, tracked, cohort=1.0, num_rounds=1, codec=codec, executor=executor)
    start = spec.unflatten(np.array(first.weights))
    found = spec.unflatten(np.array(last.weights))
    assert found["table"].tobytes() == start["table"].tobytes()
    assert last.uplink_bytes == 3 * (encoded_bytes(codec, run.vectors * 21) + 4 * 18)
    # In its first step a client's key is 0.1 of the weights received; afterwards the weights move,
    # by no more than the rate times a gradient below 2, and never by what Adam makes of it.
    steps = np.array([2, 4, 6])
    shares = np.ones(3) / 3 if kind == "scaffold" else np.array(SIZES) / 27
    plain = sum(share * (1 - 0.9**n) for share, n in zip(shares, steps, strict=True))
    assert np.abs(found["key"] - plain * start["query.weight"]).max() < 0.4 * CLIENT_LR
    assert np.abs(found["key"]).max() > 0.0


class Late(nn.Module):
    """Writes what looks like a constant, once it has made enough steps."""

    def __init__(self, value=1.0, start=5.0, after=4):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("level", torch.tensor([start, 0.0]))
        self.value, self.after = value, after

    def forward(self, inputs):
        if self.training:
            self.steps += 1
            if self.steps > self.after:
                self.level[0] = self.value
        return self.layer(inputs)


@pytest.mark.parametrize("executor", ["loop", "workers"])
def test_what_only_looked_like_a_constant_is_averaged_and_counted(task, executor):
    late = Task(model=Late, data=task.data)
    assert roles(late).size("statistic") == 0
    run = FedAvg(client_lr=0.1, local_epochs=2, batch_size=5, server=Adam(server_lr=0.1))
    done = list(rounds(run, late, cohort=1.0, num_rounds=1, executor=executor))
    # Of 2, 4 and 6 steps only the last client's reach it: 13 examples of 27 stay at 5.
    level = spec_of(Late()).unflatten(done[1].weights)["level"]
    assert level[0] == pytest.approx((13 * 5.0 + 14 * 1.0) / 27, rel=1e-6)
    assert level[1] == 0.0
    assert done[1].uplink_bytes == 3 * 4 * (21 + 2)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("value", "start", "words"),
    [
        (math.nan, 5.0, r"client 'c2' .* must stay finite, got level = nan after"),
        (1.0, -math.inf, r"must start finite, got level = -inf before and 1 after"),
    ],
)
def test_a_statistic_that_is_not_finite_is_named(task, value, start, words, executor):
    broken = Task(model=lambda: Late(value, start), data=task.data)
    run = FedAvg(client_lr=0.1, local_epochs=2, batch_size=5)
    with pytest.raises(DivergedError, match=words):
        list(rounds(run, broken, cohort=1.0, num_rounds=1, executor=executor))


class Written(nn.Module):
    """Writes a buffer of some type in every step, in place or by assigning it."""

    def __init__(self, start, assigns=False):
        super().__init__()
        self.layer, self.assigns = nn.Linear(6, 3), assigns
        self.register_buffer("total", start)

    def forward(self, inputs):
        if self.assigns:
            self.total = self.total + 1
        else:
            self.total += 1
        return self.layer(inputs)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("assigns", [False, True])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_a_statistic_of_another_type_is_refused_by_name(task, kind, assigns, executor):
    start = torch.zeros(2, dtype=kind)
    written = Task(model=lambda: Written(start.clone(), assigns), data=task.data)
    with pytest.raises(TrainingError, match=rf"must be float32 .* total of dtype={kind}"):
        list(rounds(FedAvg(client_lr=0.1), written, cohort=1.0, num_rounds=1, executor=executor))


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8])
def test_counters_of_integers_stay_with_each_client(task, kind):
    counted = Task(model=lambda: Written(torch.zeros(2, dtype=kind)), data=task.data)
    done = list(rounds(FedAvg(client_lr=0.1), counted, cohort=1.0, num_rounds=2))
    assert done[1].uplink_bytes == 3 * 4 * 21


@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.Linear(6, 3).requires_grad_(False)])
def test_a_model_of_which_nothing_is_trained_is_told(task, make):
    with pytest.raises(ValueError, match="must have a parameter that is trained, got none"):
        next(rounds(FedAvg(client_lr=0.1), Task(model=make, data=task.data), cohort=1.0))


@pytest.mark.parametrize("server", SERVERS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(task, server):
    how = {"cohort": 2, "num_rounds": 4, "codec": "int8"}
    whole = list(rounds(algorithm("fedavg", server), task, **how))
    resume = (2, whole[2].state, whole[2].client_states)
    rest = list(rounds(algorithm("fedavg", server), task, **how, resume=resume))
    for one, other in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)
        assert one.uplink_bytes == other.uplink_bytes


def test_processes_give_the_bits_of_the_loop(task, executors):
    run = algorithm("scaffold", "yogi")
    one, two = (
        list(rounds(run, task, cohort=1.0, num_rounds=2, executor=executors[name]))[-1].weights
        for name in ("loop", "workers")
    )
    np.testing.assert_array_equal(one, two)


VALUES = st.floats(-1e9, 1e9, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(VALUES, min_size=3, max_size=3), st.integers(1, 5000)),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_the_mean_of_statistics_is_exact_in_any_order_and_grouping(updates, random):
    vectors = [(np.array([0.5, *values], np.float32), float(weight)) for values, weight in updates]
    forward = FixedPointMean(4, wide=3)
    for vector, weight in vectors:
        forward.add(vector, weight)
    random.shuffle(vectors)
    parts = [FixedPointMean(4, wide=3) for _ in range(3)]
    for vector, weight in vectors:
        random.choice(parts).add(vector, weight)
    merged = FixedPointMean.of(parts[0].sum, parts[0].total, parts[0].bound, wide=3)
    for part in parts[1:]:
        merged.merge(part)
    np.testing.assert_array_equal(forward.sum, merged.sum)
    total = math.fsum(weight for _, weight in vectors)
    for i in range(4):
        exact = math.fsum(float(v[i]) * w for v, w in vectors) / total
        assert forward.mean()[i] == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_counters_may_be_large_and_variances_small():
    mean = FixedPointMean(3, wide=2)
    for _ in range(1000):
        mean.add(np.array([0.25, 70_400.0, 1e-9], np.float32), 6000.0)
    np.testing.assert_allclose(mean.mean(), [0.25, 70_400.0, 1e-9], rtol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_statistics_that_cannot_be_summed_are_refused_and_leave_the_sum(value):
    mean = FixedPointMean(2, wide=1)
    mean.add(np.array([1.0, 2.0], np.float32), 3.0)
    before = mean.sum.copy()
    with pytest.raises(DivergedError, match="statistics must be finite and small enough"):
        mean.add(np.array([1.0, value], np.float32), 3.0)
    np.testing.assert_array_equal(mean.sum, before)
    assert mean.mean().tolist() == [1.0, 2.0]


@dataclasses.dataclass
class Kept:
    weights: np.ndarray


class Bare:
    def __init__(self, weights):
        self.weights = weights


def test_an_algorithm_may_have_server_states_of_its_own(task):
    class Own(FedAvg):
        kind = Kept

        def server_init(self, weights):
            return self.kind(weights)

        def server_update(self, state, aggregate, *, round, participation):
            return self.kind(state.weights + aggregate)

    plain, own = (
        list(rounds(one(client_lr=0.1, batch_size=5), task, cohort=1.0, num_rounds=2))
        for one in (FedAvg, Own)
    )
    np.testing.assert_array_equal(plain[2].weights, own[2].weights)
    Own.kind = Bare
    with pytest.raises(TypeError, match="must be a named tuple or a dataclass"):
        next(rounds(Own(client_lr=0.1), task, cohort=1.0))
