"""Client optimizers: those of `torch.optim`, the same by every executor and on a device."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_vmap import assert_alike
from test_vmap_device import lines, needs_cuda, packed
from torch import nn

from potluck import (
    CNN,
    ClientAdam,
    ClientAdamW,
    ClientMomentum,
    ClientNesterov,
    ClientSGD,
    Cluster,
    FedAvg,
    FedProx,
    Loop,
    Scaffold,
    Task,
    TwoNN,
    Vmap,
    Workers,
    datasets,
    partitions,
    rounds,
)
from potluck.config.algorithm_section import build_algorithm
from potluck.config.experiment import check_experiment
from potluck.config.plan import plan_of, read_plan, write_plan
from potluck.core import PLAIN_SGD, ConfigError, Correction
from potluck.device import TorchTrainer
from potluck.engine import TorchRuntime
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.local_run import LocalRun
from potluck.engine.vmap.cohort_trainer import CohortRuntime
from potluck.models import CharLSTM, PerCharacter
from slope import slope_task

LR = 0.05
THEIRS = {  # by name: ours, and PyTorch's
    "sgd": (ClientSGD(), torch.optim.SGD, {}),
    "decay": (ClientSGD(weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (
        ClientMomentum(momentum=0.8, weight_decay=0.1),
        torch.optim.SGD,
        {"momentum": 0.8, "weight_decay": 0.1},
    ),
    "nesterov": (
        ClientNesterov(momentum=0.9, weight_decay=0.01),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adam": (ClientAdam(), torch.optim.Adam, {}),
    "adam, all": (
        ClientAdam(beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.2),
        torch.optim.Adam,
        {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    ),
    "adamw": (ClientAdamW(), torch.optim.AdamW, {}),
    "adamw, all": (
        ClientAdamW(beta1=0.0, beta2=0.99, eps=1e-2, weight_decay=0.3),
        torch.optim.AdamW,
        {"betas": (0.0, 0.99), "eps": 1e-2, "weight_decay": 0.3},
    ),
}
every_optimizer = pytest.mark.parametrize("name", THEIRS)


class Normed(nn.Module):
    """Averaged buffers, a counter, a frozen layer and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.frozen = nn.Linear(64, 32).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.frozen(self.norm(inputs.flatten(1)))))


def digits_task(model) -> Task:
    return Task(model=model, data=packed(datasets.digits().train, [12, 8, 10], 10))


TASKS = {
    "2nn": lambda: digits_task(partial(TwoNN, (1, 8, 8))),
    "cnn": lambda: digits_task(partial(CNN, (1, 8, 8))),
    "lstm": lambda: Task(
        model=partial(CharLSTM, 30, 8, 12),
        data=lines(sizes=(12, 8, 10), width=12),
        loss=PerCharacter(padding=29),
        metrics={},
    ),
    "normed": lambda: digits_task(Normed),
}
every_model = pytest.mark.parametrize("model", TASKS)


@every_optimizer
def test_a_step_is_that_of_torch_to_the_precision_of_64_bits(name):
    ours, kind, arguments = THEIRS[name]
    random = torch.Generator().manual_seed(0)
    weights, *gradients = torch.randn(9, 4, 5, generator=random, dtype=torch.float64)
    theirs = nn.Parameter(weights.clone())
    optimizer, state = kind([theirs], LR, **arguments), ours.init(weights)
    for number, gradient in enumerate(gradients, 1):
        theirs.grad = gradient.clone()
        optimizer.step()
        before = weights.clone(), [tensor.clone() for tensor in state]
        after, new = ours.step(weights, gradient, state, LR, number)
        assert torch.equal(weights, before[0])
        assert all(map(torch.equal, state, before[1]))
        weights, state = after, new
    torch.testing.assert_close(weights, theirs.detach(), rtol=1e-13, atol=1e-14)


@every_optimizer
def test_a_step_of_many_clients_is_that_of_each(name):
    ours, _, _ = THEIRS[name]
    random = torch.Generator().manual_seed(1)
    weights, gradient, *state = torch.rand(5, 3, 4, 5, generator=random)
    state = tuple(state[: len(ours.init(weights))])
    rates, numbers = torch.tensor([0.1, 0.2, 0.0]), torch.tensor([1, 2, 700], dtype=torch.float64)
    wide = rates.view(-1, 1, 1), numbers.view(-1, 1, 1)
    found, states = ours.step(weights, gradient, state, *wide)
    assert found.dtype == torch.float32
    for k in range(3):
        mine = tuple(tensor[k] for tensor in state)
        alone = ours.step(weights[k], gradient[k], mine, float(rates[k]), float(numbers[k]))
        torch.testing.assert_close(found[k], alone[0], rtol=1e-6, atol=1e-7)
        for together, one in zip(states, alone[1], strict=True):
            assert torch.equal(together[k], one)


def steps(runtime, task, optimizer, correction=Correction(), num=3):  # noqa: B008
    runtime.take(task.data.client(0))
    runtime.begin(task.initial_weights(0), np.arange(12), 0, correction, optimizer)
    for i in range(num):
        runtime.step(slice(4 * i, 4 * i + 4), LR)
    return runtime.end()[0].copy()


@every_model
@every_optimizer
def test_local_training_is_torch_s_own_loop(name, model):
    ours, kind, arguments = THEIRS[name]
    task = TASKS[model]()
    if model == "lstm":  # lines of one length: batches are not trimmed
        for symbols in task.data.train:
            symbols[symbols == task.data.padding] = 1
    runtime = TorchRuntime(task)
    found = steps(runtime, task, ours)
    module = task.module(task.initial_weights(0)).train()
    optimizer = kind([p for p in module.parameters() if p.requires_grad], LR, **arguments)
    inputs, targets = (torch.from_numpy(array[:12].copy()) for array in task.data.client(0))
    for i in range(3):
        optimizer.zero_grad()
        part = slice(4 * i, 4 * i + 4)
        task.loss(module(inputs[part]), targets[part]).backward()
        optimizer.step()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = {name: tensors[name].detach().numpy() for name in runtime.spec.names}
    expected = runtime.spec.flatten(kept)
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.abs(found - task.initial_weights(0)).max() > 1e-3


def test_steps_by_hand():
    # ∂/∂w (w − 3)² = 2 (w − 3). w = 1: g = −4, v = −4, w = 1 + 0.1 · 4 = 1.4.
    # Then g = −3.2, v = 0.5 · −4 − 3.2 = −5.2, w = 1.4 + 0.52 = 1.92.
    def local(optimizer, epochs):
        algorithm = FedAvg(client_lr=0.1, local_epochs=epochs, client_optimizer=optimizer)
        *_, final = rounds(algorithm, slope_task([(1, 3)]), cohort=1.0, num_rounds=1)
        return final.weights[0]

    assert local(ClientMomentum(momentum=0.5), 2) == pytest.approx(1.92, rel=1e-6)
    # Nesterov's: g + 0.5 v = −6, w = 1.6; then g = −2.8, v = −4.8, w = 1.6 + 0.1 · 5.2 = 2.12.
    assert local(ClientNesterov(momentum=0.5), 2) == pytest.approx(2.12, rel=1e-6)
    # Decay is in the gradient: −4 + 0.5 · 1 = −3.5, w = 1.35.
    assert local(ClientSGD(weight_decay=0.5), 1) == pytest.approx(1.35, rel=1e-6)
    # Adam's first step is as long as the rate; decoupled decay takes 0.1 · 0.5 of w before.
    assert local(ClientAdam(), 1) == pytest.approx(1.1, rel=1e-6)
    assert local(ClientAdamW(weight_decay=0.5), 1) == pytest.approx(0.95 + 0.1, rel=1e-6)


def test_the_state_ends_with_a_client_s_round():
    task = slope_task([(1, 3)])
    algorithm = FedAvg(client_lr=0.1, client_optimizer=ClientMomentum(momentum=0.5))
    *_, final = rounds(algorithm, task, cohort=1.0, num_rounds=2)
    *_, plain = rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=2)
    assert final.weights[0] == plain.weights[0]  # one step in each round: v = g


def test_only_trained_parameters_that_have_a_gradient_are_stepped():
    task = digits_task(Normed)
    runtime = TorchRuntime(task)
    start = runtime.spec.unflatten(task.initial_weights(0))
    plain = runtime.spec.unflatten(steps(runtime, task, PLAIN_SGD))
    decayed = runtime.spec.unflatten(steps(runtime, task, ClientAdamW(weight_decay=1.0)))
    for name, tensor in decayed.items():
        same = plain if name.startswith("norm.running") else start
        moves = name.startswith(("norm.weight", "norm.bias", "head"))
        assert np.array_equal(tensor, same[name]) != moves, name


def test_layers_are_fused_with_steps_of_plain_sgd_alone():
    task = digits_task(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1100), nn.Linear(1100, 10))
    )
    runtime = TorchRuntime(task)
    steps(runtime, task, ClientSGD())
    assert runtime._layers.num_calls > 0
    before = runtime._layers.num_calls
    for optimizer in (ClientSGD(weight_decay=0.1), ClientMomentum(momentum=0.5), ClientAdam()):
        steps(runtime, task, optimizer)
    assert runtime._layers.num_calls == before


CORRECTIONS = {
    "none": partial(FedAvg),
    "clipped": partial(FedAvg, gradient_clip=0.4),
    "proximal": partial(FedProx, mu=0.5, gradient_clip=0.5),
}
# A larger ε: where a gradient is rounding alone, Adam makes a whole step of it.
OPTIMIZERS = {
    "sgd": PLAIN_SGD,
    "decay": ClientSGD(weight_decay=0.1),
    "momentum": ClientMomentum(momentum=0.8, weight_decay=0.1),
    "nesterov": ClientNesterov(momentum=0.8),
    "adam": ClientAdam(eps=1e-3, weight_decay=0.1),
    "adamw": ClientAdamW(eps=1e-3, weight_decay=0.1),
}


@pytest.fixture(scope="module", params=TASKS)
def executors(request):
    """A task and all that train it on this machine."""
    task = TASKS[request.param]()
    made = [Workers(task, 2), Vmap(task), Vmap(task, device="cpu", chunk=2)]
    with contextlib.ExitStack() as stack:
        for executor in made:
            stack.enter_context(contextlib.closing(executor))
        yield task, *made


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_executor_trains_alike(executors, optimizer, correction):
    task, workers, *side_by_side = executors
    algorithm = CORRECTIONS[correction](
        client_lr=LR, batch_size=4, client_optimizer=OPTIMIZERS[optimizer]
    )

    def history(executor):
        run = {"cohort": 1.0, "num_rounds": 2, "seed": 3, "evaluate_every": 2}
        return list(rounds(algorithm, task, executor=executor, **run))

    expected = history(Loop(task))
    assert history(workers)[-1].weights.tobytes() == expected[-1].weights.tobytes()
    for vmap in side_by_side:
        assert_alike(expected, history(vmap), atol=2e-5)
        is_lstm = task.data.padding is not None  # which PyTorch cannot vectorise on a CPU
        assert (vmap.refused is None) == (not is_lstm or vmap.placed is not None)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "sgd"])
@every_model
def test_many_clients_step_as_each_alone_under_a_drift(model, name):
    """The steps beneath the executors, where clients have made different numbers of steps."""
    task, optimizer = TASKS[model](), OPTIMIZERS[name]
    start = task.initial_weights(0)
    drift = np.random.default_rng(0).normal(0, 0.01, len(start)).astype(np.float32)
    correction = Correction(gradient_clip=0.5, proximal=0.3, drift=drift)
    plain = TorchRuntime(task)
    runs, expected = [], []
    for client, num in ((0, 3), (1, 2), (2, 2), (0, 1)):
        batches = [(slice(i, i + 4), LR / (1 + i)) for i in range(0, 4 * num, 4)]
        rows = np.arange(4 * num) + task.data.offsets[client]
        runs.append(LocalRun(start, rows, batches, 0, correction, optimizer))
        plain.take(task.data.client(client))
        plain.begin(start, np.arange(4 * num), 0, correction, optimizer)
        for batch in batches:
            plain.step(*batch)
        expected.append(plain.end()[0].copy())
    cpu = torch.device("cpu")
    kinds = [partial(DeviceCohort, task, cpu, chunk=3)]
    if model != "lstm":  # which PyTorch cannot vectorise
        kinds += [partial(CohortRuntime, task), partial(CohortRuntime, task, plain=True)]
        kinds += [partial(DeviceCohort, task, cpu, plain=True)]
    for runtime in (kind() for kind in kinds):
        for _ in range(2):  # the second time, nothing is left of the first
            weights, _ = runtime.train(runs)
            np.testing.assert_allclose(weights, np.stack(expected), rtol=0, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_replayed_steps_are_those_of_the_loop(name):
    task = TASKS["2nn"]()
    algorithm = FedAvg(
        client_lr=LR, batch_size=4, local_epochs=4, client_optimizer=OPTIMIZERS[name]
    )
    vmap, run = Vmap(task, device="cuda"), {"cohort": 1.0, "num_rounds": 2, "seed": 3}
    ours = list(rounds(algorithm, task, executor=vmap, **run))
    assert vmap.refused is None
    assert vmap.placed.num_captured > 0
    assert_alike(ours, list(rounds(algorithm, task, executor=Loop(task), **run)), atol=1e-4)


def test_ray_trains_as_loop_to_the_bits():
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    task = TASKS["2nn"]()
    run = {"cohort": 1.0, "num_rounds": 1, "seed": 3}
    with contextlib.closing(Cluster(task, 2, local="loop")) as cluster:
        for optimizer in OPTIMIZERS.values():
            algorithm = FedAvg(client_lr=LR, batch_size=4, client_optimizer=optimizer)
            *_, theirs = rounds(algorithm, task, executor=Loop(task), **run)
            *_, ours = rounds(algorithm, task, executor=cluster, **run)
            assert ours.weights.tobytes() == theirs.weights.tobytes()
    ray.shutdown()


def test_one_large_batch_stands_for_the_steps_of_plain_sgd_alone():
    task = TASKS["2nn"]()
    run = {"cohort": 1.0, "num_rounds": 1, "seed": 3}
    for optimizer in OPTIMIZERS.values():
        algorithm = FedAvg(client_lr=0.5, batch_size=None, client_optimizer=optimizer)
        for options in ({}, {"device": "cpu"}):
            vmap = Vmap(task, **options)
            ours = list(rounds(algorithm, task, executor=vmap, **run))
            assert vmap._pooling._is_tried == (optimizer == PLAIN_SGD)
            assert_alike(ours, list(rounds(algorithm, task, executor=Loop(task), **run)))


def test_scaffold_refuses_what_its_controls_do_not_hold_for():
    with pytest.raises(ValueError, match="sum of its gradients"):
        Scaffold(client_lr=0.1, client_optimizer=ClientAdam())
    assert Scaffold(client_lr=0.1, client_optimizer=ClientSGD()) == Scaffold(client_lr=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(ClientMomentum, momentum=1.0), "momentum must be at least 0 and below 1"),
        (partial(ClientNesterov, momentum=-0.1), "momentum must be at least 0 and below 1"),
        (partial(ClientSGD, weight_decay=-0.1), "weight_decay must be at least 0"),
        (partial(ClientAdam, beta1=1.0), "beta1 must be at least 0 and below 1"),
        (partial(ClientAdamW, beta2=-0.1), "beta2 must be at least 0 and below 1"),
        (partial(ClientAdamW, eps=0.0), "eps must be above 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def experiment(optimizer=None, **algorithm):
    algorithm = {"client_lr": LR, "batch_size": 4} | algorithm
    if optimizer is not None:
        algorithm["client_optimizer"] = optimizer
    content = {
        "name": "optimizers",
        "task": {"data": "digits", "model": "2nn"},
        "partition": {"kind": "iid", "clients": 20},
        "algorithm": algorithm,
        "run": {"rounds": 1},
    }
    return check_experiment(content, "experiment.toml")


NAMED = [
    ({"name": "sgd"}, ClientSGD()),
    ({"name": "sgd", "weight_decay": 0.1}, ClientSGD(weight_decay=0.1)),
    ({"name": "momentum"}, ClientMomentum(momentum=0.9)),
    ({"name": "nesterov", "momentum": 0.5}, ClientNesterov(momentum=0.5)),
    ({"name": "adam", "beta2": 0.99, "eps": 0.001}, ClientAdam(beta2=0.99, eps=0.001)),
    ({"name": "adamw"}, ClientAdamW()),
]


@pytest.mark.parametrize(("table", "expected"), NAMED)
def test_an_experiment_names_it_and_a_plan_carries_it(table, expected):
    one = experiment(table)
    assert build_algorithm(one).client_optimizer == expected
    data = partitions.iid(datasets.digits(), clients=2, seed=0)
    content = write_plan(plan_of(one, data))
    assert ("client_optimizer" in content["algorithm"]) == (expected != PLAIN_SGD)
    planned = build_algorithm(read_plan(content))
    assert planned == build_algorithm(one)


def test_the_plan_of_plain_sgd_has_the_keys_that_older_devices_know():
    data = partitions.iid(datasets.digits(), clients=2, seed=0)
    keys = {"name", "client_lr", "local_epochs", "batch_size", "server"}
    for one in (experiment(), experiment({"name": "sgd"})):
        assert set(write_plan(plan_of(one, data))["algorithm"]) == keys


def test_what_a_plan_s_algorithm_does_not_know_is_refused_and_not_passed_over():
    """As by a device that is older than the key, whose sections are strict likewise."""
    data = partitions.iid(datasets.digits(), clients=2, seed=0)
    content = write_plan(plan_of(experiment({"name": "adamw"}), data))
    older = content | {"algorithm": content["algorithm"] | {"name": "scaffold"}}
    with pytest.raises(ConfigError, match=r"algorithm\.scaffold\.client_optimizer"):
        read_plan(older)
    with pytest.raises(ConfigError, match="client_optimizer"):
        experiment({"name": "adamw"}, name="scaffold")
    with pytest.raises(ConfigError, match="client_optimizer"):
        experiment({"name": "lion"})


@pytest.mark.parametrize("table", [table for table, _ in NAMED[1:]])
def test_a_device_trains_as_the_simulation(table):
    task = TASKS["2nn"]()
    one = experiment(table, local_epochs=2)
    plan = read_plan(write_plan(plan_of(one, task.data)))
    trainer = TorchTrainer(lambda _: packed(task.data.train, [12], 10))
    spec, start = TorchRuntime(task).spec, task.initial_weights(3)
    where = {"seed": 3, "round": 1, "client": 0}
    update = trainer.train(plan, spec, start, check=lambda: None, **where)
    alone = Task(model=task.model, data=packed(task.data.train, [12], 10))
    algorithm = build_algorithm(one)
    *_, final = rounds(algorithm, alone, cohort=1.0, num_rounds=1, seed=3)
    np.testing.assert_allclose(start + update.delta, final.weights, rtol=0, atol=1e-6)
