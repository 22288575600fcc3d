"""Ray: the bits of the plain loop, or side by side the same to float tolerance, on one machine or
two, whoever dies in between."""

import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from potluck import (
    Cluster,
    FedAvg,
    FedProx,
    Loop,
    Scaffold,
    Task,
    TwoNN,
    datasets,
    partitions,
    rounds,
)
from potluck.core import TaskError, WorkerError
from potluck.simulation import RoundWork, make_executor

ray = pytest.importorskip("ray", reason="Ray is not installed")
cluster_utils = pytest.importorskip("ray.cluster_utils")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as if it were a notebook

pytestmark = [
    # Ray's own: sockets and files that it leaves to the end of the process.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Slow(nn.Module):
    """Takes a while, so that one can die meanwhile; and draws random numbers."""

    def __init__(self, seconds, began=None):
        super().__init__()
        self.began = began  # a file that is there once local training has begun
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 10)
        )
        self.seconds = seconds

    def forward(self, inputs):
        if self.training and torch.is_grad_enabled():
            if self.began is not None:
                self.began.touch()
            time.sleep(self.seconds)
        return self.layers(inputs)


class Deadly(nn.Module):
    """Ends its process when it meets client 3, whose first pixel is 77."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs):
        if self.training and (inputs.flatten(1)[:, 0] == 77).any():
            os._exit(1)
        return self.layer(inputs.flatten(1))


@pytest.fixture(scope="module")
def data():
    return partitions.dirichlet(datasets.digits(), clients=24, alpha=0.5, seed=1, min_examples=12)


@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of two real nodes on this machine: ours, without workers, and another is added by
    the tests that need it."""
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={
            "num_cpus": 2,
            "num_gpus": 1,  # Ray takes our word for it
            "include_dashboard": False,
            "_system_config": {
                "health_check_period_ms": 500,
                "health_check_timeout_ms": 2000,
                "health_check_failure_threshold": 3,
            },
        },
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def history(algorithm, task, executor, num_rounds=3):
    return list(
        rounds(algorithm, task, cohort=0.5, num_rounds=num_rounds, seed=3, executor=executor)
    )


def assert_same_bits(one, other):
    for ours, theirs in zip(one, other, strict=True):
        assert ours.cohort.tolist() == theirs.cohort.tolist()
        assert ours.weights.tobytes() == theirs.weights.tobytes()
        assert ours.loss == theirs.loss or ours.number == 0
        assert ours.metrics == theirs.metrics
        assert ours[5:8] == theirs[5:8]
        assert ours.client_states.keys() == theirs.client_states.keys()
        for client, state in ours.client_states.items():
            assert state.tobytes() == theirs.client_states[client].tobytes()


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(client_lr=0.1, local_epochs=2, batch_size=14, client_schedule=lambda t: 0.9**t),
        Scaffold(client_lr=0.1, local_epochs=1, batch_size=14),
    ],
    ids=["fedavg", "scaffold"],
)
def test_the_cluster_gives_the_bits_of_the_loop(two_nodes, data, algorithm):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    executor = Cluster(task, 2, local="loop")
    try:
        assert_same_bits(history(algorithm, task, "loop"), history(algorithm, task, executor))
        assert executor.num_lost == 0
    finally:
        executor.close()


def assert_alike(one, other):
    """The same to float tolerance, in units of the way that the weights went."""
    moved = np.abs(one[-1].weights - one[0].weights).max()
    for ours, theirs in zip(one, other, strict=True):
        assert ours.cohort.tolist() == theirs.cohort.tolist()
        assert np.abs(ours.weights - theirs.weights).max() <= 1e-5 * moved
        assert ours[5:8] == theirs[5:8]
        assert ours.client_states.keys() == theirs.client_states.keys()
        for client, state in ours.client_states.items():
            np.testing.assert_allclose(theirs.client_states[client], state, atol=1e-5)


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(client_lr=0.1, local_epochs=2, batch_size=14),
        FedProx(client_lr=0.1, local_epochs=2, batch_size=14, mu=0.1),
        Scaffold(client_lr=0.1, local_epochs=1, batch_size=14),
    ],
    ids=["fedavg", "fedprox", "scaffold"],
)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: TwoNN((1, 8, 8)), id="2nn", marks=pytest.mark.soak),
        pytest.param(lambda: Slow(0), id="drop"),
    ],
)
def test_workers_that_train_side_by_side_give_what_the_loop_gives(
    two_nodes, data, algorithm, model
):
    task = Task(model=model, data=data)
    executor = Cluster(task, 2, local="vmap")
    try:
        ours = history(algorithm, task, executor)
        assert_alike(history(algorithm, task, "loop"), ours)
        assert re.fullmatch(r"ray, 2 workers, chunks of up to \d+", ours[-1].executor)
    finally:
        executor.close()


@pytest.mark.parametrize(
    ("model", "words"),
    [(lambda: TwoNN((1, 8, 8)), "chunks of up to"), (lambda: Slow(0.01), "one client at a time")],
    ids=["small", "slow"],
)
def test_workers_choose_what_is_faster(two_nodes, data, model, words):
    task = Task(model=model, data=data)
    chosen = []
    for _ in range(5):  # other programs may have the processor while one of the two is timed
        executor = Cluster(task, 2)
        try:
            last = history(FedAvg(client_lr=0.1, batch_size=14), task, executor, 2)[-1]
        finally:
            executor.close()
        chosen.append(last.executor)
        if words in last.executor:
            return
    raise AssertionError(chosen)


def test_workers_share_a_gpu(two_nodes, data):
    """On the lines for a GPU, which run on a CPU too; the GPU is one in Ray's books alone."""
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    algorithm = FedAvg(client_lr=0.1, local_epochs=2, batch_size=14)
    executor = Cluster(task, device="cpu", gpus=0.5)
    try:
        ours = history(algorithm, task, executor)
        assert_alike(history(algorithm, task, "loop"), ours)
        assert ours[-1].executor.startswith("ray, 2 workers on GPUs, chunks of up to")
        pool = executor._pool  # one may still be starting: a round needs only the first
        shares = [
            ray.get(member.actor.__ray_call__.remote(lambda self: ray.get_gpu_ids()))
            for member in [*pool._idle, *pool._starting.values()]
        ]
        assert shares == [[0], [0]]
    finally:
        executor.close()


def test_an_evaluation_that_fails_or_takes_all_examples_is_that_of_the_loop(two_nodes, data):
    def spread(outputs, targets):  # of all examples at once
        return float(outputs.argmax(1).double().std())

    fitting = Task(model=lambda: TwoNN((1, 8, 8)), data=data, metrics={"spread": spread})
    misfit = Task(model=lambda: TwoNN((1, 8, 8), num_classes=9), data=data)
    cluster = Cluster(fitting, num_workers=1)
    try:
        weights = fitting.initial_weights(0)
        assert cluster.evaluate(weights) == pytest.approx(Loop(fitting).evaluate(weights))
    finally:
        cluster.close()
    cluster = Cluster(misfit, num_workers=1)
    try:
        with pytest.raises(TaskError, match=r"client '.*': the loss must .* at least 10 outputs"):
            cluster.evaluate(misfit.initial_weights(0))
    finally:
        cluster.close()


def test_clients_are_counted_while_a_round_goes_on(two_nodes, data):
    told = []
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    executor = make_executor("ray", task, 2, progress=lambda *seen: told.append(seen))
    try:
        executor.train(
            RoundWork(
                FedAvg(client_lr=0.1, batch_size=14),
                task.initial_weights(1),
                np.arange(20),
                seed=1,
                round=1,
            )
        )
        assert told[0] == (0, 20)
        assert told[-1] == (20, 20)
        assert told == sorted(told)
        assert len(told) > 2
    finally:
        executor.close()


def test_what_workers_cannot_be_is_refused(data):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    for arguments, message in (
        ({"local": "fast"}, "local must be 'auto', 'loop' or 'vmap', got local='fast'"),
        ({"device": "cuda", "local": "loop"}, "local must be left out with a device"),
        ({"local": "vmap", "precision": "bf16"}, "precision must be 'float32' with local='vmap'"),
        ({"precision": "tf32"}, "which has no TF32"),
        ({"gpus": 0.0}, r"gpus must be above 0, got gpus=0\.0"),
        ({"device": "cuda:1"}, "must be 'cpu' or 'cuda' with executor='ray'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_executor("ray", task, 2, **arguments)


def worker_processes(executor):
    """The process numbers of an executor's workers."""
    return [
        ray.get(member.actor.__ray_call__.remote(lambda self: os.getpid()))
        for member in executor._pool._idle
    ]


def once(file, act, *arguments, **options):
    """Do something, in a thread, as soon as a file is there."""

    def wait():
        while not file.exists():
            time.sleep(0.01)
        act(*arguments, **options)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_worker_that_is_killed_changes_nothing(two_nodes, data, tmp_path):
    began = tmp_path / "began"
    task = Task(model=lambda: Slow(0.02, began), data=data)
    algorithm = FedAvg(client_lr=0.1, local_epochs=2, batch_size=14)
    plain = history(algorithm, Task(model=lambda: Slow(0), data=data), Loop(task))
    executor = Cluster(task, 2, local="loop")
    try:
        killed = rounds(algorithm, task, cohort=0.5, num_rounds=3, seed=3, executor=executor)
        results = [next(killed)]
        victim = worker_processes(executor)[0]
        began.unlink(missing_ok=True)
        killing = once(began, os.kill, victim, signal.SIGKILL)
        results += list(killed)
        killing.join()
        assert executor.num_lost == 1
        assert_same_bits(plain, results)
    finally:
        executor.close()


def test_a_node_that_is_killed_changes_nothing(two_nodes, data, tmp_path):
    began = tmp_path / "began"
    node = two_nodes.add_node(num_cpus=2)
    two_nodes.wait_for_nodes()
    task = Task(model=lambda: Slow(0.02, began), data=data)
    algorithm = FedAvg(client_lr=0.1, local_epochs=2, batch_size=14)
    plain = history(algorithm, Task(model=lambda: Slow(0), data=data), Loop(task))
    executor = Cluster(task, 4, local="loop")
    try:
        killed = rounds(algorithm, task, cohort=0.5, num_rounds=3, seed=3, executor=executor)
        results = [next(killed)]
        began.unlink(missing_ok=True)
        killing = once(began, two_nodes.remove_node, node, allow_graceful=False)
        results += list(killed)
        killing.join()
        assert executor.num_lost >= 1
        assert_same_bits(plain, results)
    finally:
        executor.close()


@pytest.mark.parametrize("local", ["loop", "auto"])
def test_a_client_that_kills_workers_is_named_and_the_others_count(two_nodes, data, local):
    inputs = data.train.inputs.copy()
    inputs[data.offsets[3] : data.offsets[4], 0, 0, 0] = 77
    deadly = type(data)(
        **{name: getattr(data, name) for name in data.__slots__}
        | {"train": type(data.train)(inputs, data.train.targets)}
    )
    task = Task(model=Deadly, data=deadly)
    algorithm = FedAvg(client_lr=0.1, batch_size=14)
    executor = Cluster(task, 2, local=local)
    try:
        others = np.flatnonzero(data.sizes < data.sizes[3])
        cohort = np.sort(np.append(others[:7], 3))  # the largest: the one that is timed first
        received = task.initial_weights(1)
        result = executor.train(RoundWork(algorithm, received, cohort, seed=1, round=1))
        assert [failure.client for failure in result.failures] == [3]
        assert "three workers died" in result.failures[0].reason
        others = Loop(task).train(
            RoundWork(algorithm, received, cohort[cohort != 3], seed=1, round=1)
        )
        assert result.aggregate.tobytes() == others.aggregate.tobytes()
        # It is met by whoever times the first clients, too.
        assert executor.num_lost == (3 if local == "loop" else 6)
    finally:
        executor.close()


def test_data_are_placed_once_and_traffic_grows_with_workers(two_nodes, data):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    algorithm = FedAvg(client_lr=0.1, batch_size=14)
    executor = Cluster(task, 2, local="loop")
    sums = []
    try:
        schedule = executor._pool.schedule

        def counted(*args, **kwargs):
            completed = schedule(*args, **kwargs)
            sums.append(len(completed.sums))
            return completed

        executor._pool.schedule = counted
        for count in (2, 12, 24):
            weights = task.initial_weights(1)
            executor.train(RoundWork(algorithm, weights, np.arange(count), seed=1, round=1))
        assert max(sums) <= 2
    finally:
        executor.close()


def test_a_cluster_that_does_not_answer_is_an_error_with_a_name(data):
    if ray.is_initialized():
        ray.shutdown()
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    with pytest.raises(WorkerError, match=r"address='127\.0\.0\.1:1'.*ray start"):
        Cluster(task, address="127.0.0.1:1")
    with pytest.raises(ValueError, match="num_workers=0"):
        make_executor("ray", task, 0)
