"""One contract for every algorithm on every executor."""

import numpy as np
import pytest
from safetensors.numpy import save

from potluck import (
    Adam,
    FedAvg,
    FedProx,
    Nesterov,
    Poisson,
    Scaffold,
    Task,
    Workers,
    datasets,
    fed_sgd,
    partitions,
    rounds,
    schedules,
)
from potluck.algorithms import ClientHalf
from potluck.config.experiment import check_experiment
from potluck.core import ClientContext, WorkerError
from potluck.engine import TorchRuntime, run_of
from potluck.models import LogisticRegression
from potluck.simulation import RoundWork, make_executor, train
from potluck.simulation.runs.directory import read_tensors
from slope import slope_task

ALGORITHMS = {
    "fedavg": FedAvg(client_lr=0.2, local_epochs=2),
    "fedsgd": fed_sgd(client_lr=0.2),
    "clipped": FedAvg(client_lr=0.2, gradient_clip=0.5, client_schedule=schedules.Cosine(9)),
    "fedadam": FedAvg(
        client_lr=0.2, server=Adam(server_lr=0.05), server_schedule=schedules.Warmup(3)
    ),
    "fedprox": FedProx(client_lr=0.2, local_epochs=2, mu=0.1),
    "scaffold": Scaffold(client_lr=0.2, local_epochs=2),
    "scaffold with momentum": Scaffold(client_lr=0.2, gradient_clip=1.0, server=Nesterov()),
}
EXECUTORS = ("loop", "workers")
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
every_executor = pytest.mark.parametrize("executor", [*EXECUTORS, "vmap"])


@pytest.fixture(scope="module")
def task():
    data = partitions.unbalanced(datasets.digits(), clients=12, sigma=1.0, seed=0)
    return Task(model=lambda: LogisticRegression((1, 8, 8)), data=data)


def history(algorithm, task, executor="loop", **kwargs):
    kwargs = {"cohort": 0.4, "num_rounds": 5, "seed": 1} | kwargs
    return list(rounds(algorithm, task, executor=executor, **kwargs))


def vectors_of(state):
    return {**state.optimizer, **{f"own {n}": v for n, v in state.algorithm.items()}}


def states(round):
    """All that a round hands on, as bytes."""
    return (
        round.weights.tobytes(),
        {name: vector.tobytes() for name, vector in vectors_of(round.state).items()},
        {client: vector.tobytes() for client, vector in round.client_states.items()},
    )


@every_algorithm
def test_every_executor_gives_the_same_bits(algorithm, task):
    loop, workers = (history(algorithm, task, executor) for executor in EXECUTORS)
    for one, other in zip(loop, workers, strict=True):
        assert states(one) == states(other)
        assert one.loss == other.loss or one.number == 0
        assert one.num_examples == other.num_examples
    assert loop[-1].metrics["loss"] < loop[0].metrics["loss"]


@every_algorithm
@every_executor
def test_the_same_seed_gives_the_same_run(algorithm, executor, task):
    first, again = (history(algorithm, task, executor, num_rounds=3) for _ in range(2))
    assert states(first[-1]) == states(again[-1])
    other = history(algorithm, task, executor, num_rounds=3, seed=2)
    assert states(first[-1]) != states(other[-1])


@every_algorithm
@every_executor
def test_resuming_from_any_round_changes_nothing(algorithm, executor, task):
    whole = history(algorithm, task, executor)
    for earlier in whole[1::2]:
        resume = (earlier.number, earlier.state, earlier.client_states)
        rest = history(algorithm, task, executor, resume=resume)
        assert [round.number for round in rest] == list(range(earlier.number + 1, 6))
        assert not rest or states(rest[-1]) == states(whole[-1])


@every_algorithm
def test_both_halves_leave_their_arguments_as_they_are(algorithm, task):
    state = algorithm.server_init(task.initial_weights(0))
    received = algorithm.broadcast(state)
    runtime = TorchRuntime(task)
    kept = None
    for round in (1, 2):
        client = ClientContext(0, round, 3, task.data.client(3).num_examples, kept)
        before = [received.copy(), None if kept is None else kept.copy()]
        half = ClientHalf(algorithm, received, client)
        while half.request is not None:
            half.answer(runtime.train(run_of(task, half.request, client)))
        update = half.update
        assert np.array_equal(received, before[0])
        assert kept is None or np.array_equal(kept, before[1])
        assert update.delta.dtype == np.float32
        assert len(update.delta) == len(received) == algorithm.vectors * len(state.weights)
        assert (update.state is None) == (algorithm.client_vectors == 0)
        snapshot = (update.delta.copy(), {n: v.copy() for n, v in vectors_of(state).items()})
        new = algorithm.server_update(state, update.delta, round=round, participation=0.5)
        assert np.array_equal(update.delta, snapshot[0])
        for name, vector in snapshot[1].items():
            assert np.array_equal(vectors_of(state)[name], vector)
        for vector in (new.weights, *vectors_of(new).values()):
            assert vector.dtype == np.float32
            assert vector.shape == state.weights.shape
        assert not np.shares_memory(new.weights, state.weights)
        state, kept = new, update.state
        received = algorithm.broadcast(state)


@every_algorithm
@every_executor
def test_a_client_with_one_example_trains(algorithm, executor):
    task = slope_task([(1, 2)], [(1, 2), (2, 4), (0.5, 1)])
    results = history(algorithm, task, executor, cohort=1.0, num_rounds=2)
    assert results[-1].weights[0] > 1.0
    assert results[-1].num_examples == 4


@every_algorithm
@every_executor
def test_an_empty_cohort_changes_nothing(algorithm, executor, task):
    results = history(
        algorithm, task, executor, cohort=Poisson(0.05), num_rounds=8, evaluate_every=8
    )
    empty = [round for round in results[1:] if len(round.cohort) == 0]
    assert empty
    assert len(empty) < 8
    for round in empty:
        assert states(round) == states(results[round.number - 1])
        assert round.uplink_bytes == round.downlink_bytes == 0


@every_algorithm
def test_bytes_count_every_vector_that_travels(algorithm, task):
    results = history(algorithm, task, num_rounds=2)
    expected = len(results[1].cohort) * algorithm.vectors * 4 * len(results[0].weights)
    assert [round.uplink_bytes for round in results] == [0, expected, expected]
    assert results[1].uplink_bytes == results[1].downlink_bytes
    kept = {len(vector) for vector in results[-1].client_states.values()}
    assert kept <= {algorithm.client_vectors * len(results[0].weights)} - {0}


def test_one_executor_serves_algorithms_of_different_sizes(task):
    workers = Workers(task, 2)
    try:
        for name in ("fedavg", "scaffold", "fedavg", "scaffold with momentum", "fedprox"):
            shared = history(ALGORITHMS[name], task, workers, num_rounds=2)
            assert states(shared[-1]) == states(history(ALGORITHMS[name], task, num_rounds=2)[-1])
    finally:
        workers.close()


def test_a_schedule_that_cannot_travel_is_named_and_the_workers_live_on(task):
    workers = Workers(task, 2)
    try:
        with pytest.raises(WorkerError, match=r"potluck\.schedules, or executor='loop'"):
            history(FedAvg(client_lr=0.1, client_schedule=lambda t: 1 / t), task, workers)
        assert len(history(ALGORITHMS["scaffold"], task, workers)) == 6
    finally:
        workers.close()


@every_executor
def test_an_executor_leaves_the_states_that_it_is_given(executor, task):
    algorithm = ALGORITHMS["scaffold"]
    *_, last = history(algorithm, task, cohort=1.0, num_rounds=2)
    given = dict(last.client_states)
    before = {client: state.copy() for client, state in given.items()}
    runner = make_executor(executor, task, 2)
    try:
        result = runner.train(
            RoundWork(
                algorithm,
                algorithm.broadcast(last.state),
                np.array([2, 5]),
                seed=0,
                round=3,
                states=given,
            )
        )
    finally:
        runner.close()
    assert set(result.states) == {2, 5}
    assert not np.array_equal(result.states[2], before[2])
    assert all(np.array_equal(given[client], before[client]) for client in before)


TABLES = [
    {"client_lr": 0.1, "gradient_clip": 1.0},
    {"name": "fedsgd", "client_lr": 0.1},
    {"name": "fedprox", "client_lr": 0.1, "mu": 0.1},
    {"name": "scaffold", "client_lr": 0.1, "server": {"name": "adam", "server_lr": 0.01}},
]


def experiment_of(table, executor="loop"):
    return check_experiment(
        {
            "name": "contract",
            "task": {"data": "digits", "model": "logistic"},
            "partition": {"kind": "shards", "clients": 20},
            "algorithm": table,
            "run": {"rounds": 6, "cohort": 0.3, "executor": executor, "workers": 2},
        },
        "test",
    )


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.get("name", "fedavg"))
@every_executor
def test_a_run_resumed_from_its_checkpoint_is_the_uninterrupted_one(table, executor, tmp_path):
    experiment = experiment_of(table, executor)
    list(train(experiment, tmp_path / "whole"))
    for stop in (2, 5):
        for round in train(experiment, tmp_path / "parts"):
            if round.number == stop:
                break
    list(train(experiment, tmp_path / "parts"))
    for name in ("rounds.jsonl", "final.safetensors", "checkpoint.safetensors"):
        whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, name


def test_a_checkpoint_that_has_the_control_among_the_optimizers_vectors_goes_on(tmp_path):
    """As the first versions wrote it."""
    experiment = experiment_of(TABLES[-1])
    list(train(experiment, tmp_path / "whole"))
    for round in train(experiment, tmp_path / "parts"):
        if round.number == 2:
            break
    path = tmp_path / "parts" / "checkpoint.safetensors"
    tensors, info = read_tensors(path)
    tensors["optimizer.control"] = tensors.pop("algorithm.control")
    path.write_bytes(save(tensors, info))
    list(train(experiment, tmp_path / "parts"))
    whole, parts = ((tmp_path / r / path.name).read_bytes() for r in ("whole", "parts"))
    assert whole == parts
