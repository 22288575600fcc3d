"""Whatever runs a cohort: the same cohorts, the same batches, the same bits."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from potluck import (
    FedAvg,
    Loop,
    Poisson,
    Task,
    TwoNN,
    Workers,
    datasets,
    partitions,
    rounds,
    schedules,
)
from potluck.core import DivergedError, TrainingError, WorkerError
from potluck.engine import evaluate, federated_evaluation
from potluck.simulation import make_executor


class Dropped(nn.Module):
    """A model that draws random numbers while it trains, with averaged buffers and a counter that
    its steps depend on."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64, momentum=None)
        self.layers = nn.Sequential(
            nn.Linear(64, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 10)
        )

    def forward(self, inputs):
        return self.layers(self.norm(inputs.flatten(1)))


@pytest.fixture(scope="module")
def data():
    return partitions.dirichlet(datasets.digits(), clients=20, alpha=0.5, seed=1, min_examples=12)


@pytest.fixture(scope="module", params=[lambda: TwoNN((1, 8, 8)), Dropped], ids=["2nn", "dropout"])
def task(request, data):
    return Task(model=request.param, data=data)


ALGORITHM = FedAvg(
    client_lr=0.1, local_epochs=2, batch_size=14, client_schedule=schedules.Exponential(0.9)
)


def history(task, executor, **kwargs):
    try:
        kwargs = {"cohort": 0.4, "num_rounds": 4, "seed": 3} | kwargs
        return list(rounds(ALGORITHM, task, executor=executor, **kwargs))
    finally:
        if not isinstance(executor, str):
            executor.close()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_loop_and_workers_give_the_same_bits(task, num_workers):
    loop, workers = history(task, Loop(task)), history(task, Workers(task, num_workers))
    for one, other in zip(loop, workers, strict=True):
        assert one.cohort.tolist() == other.cohort.tolist()
        assert one.weights.tobytes() == other.weights.tobytes()
        assert one.loss == other.loss or one.number == 0
        assert one.metrics == other.metrics
        assert one[5:8] == other[5:8]
    assert np.abs(loop[-1].weights - loop[0].weights).max() > 0.01


def test_threads_change_no_more_than_rounding(task):
    one, two = history(task, Loop(task)), history(task, Loop(task, num_threads=2))
    np.testing.assert_allclose(one[-1].weights, two[-1].weights, rtol=0, atol=1e-5)


class Wide(nn.Sequential):
    """A layer that is large enough to update itself in place where products are float32."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 1100), nn.ReLU(), nn.Linear(1100, 10))


def test_bfloat16_gives_the_same_bits_everywhere_and_float32_within_its_rounding(data):
    task = Task(model=Wide, data=data)
    exact = history(task, Loop(task))
    rounded = history(task, Loop(task, precision="bf16"))
    shared = history(task, make_executor("workers", task, 2, precision="bf16"))
    for one, other in zip(rounded, shared, strict=True):
        assert one.weights.tobytes() == other.weights.tobytes()
        assert one.metrics == other.metrics
    moved = np.linalg.norm(exact[-1].weights - exact[0].weights)
    assert 1e-4 < np.linalg.norm(exact[-1].weights - rounded[-1].weights) / moved < 0.05
    assert rounded[-1].metrics["accuracy"] == pytest.approx(exact[-1].metrics["accuracy"], abs=0.03)
    with pytest.raises(ValueError, match="CPU, which has no TF32, got precision='tf32'"):
        make_executor("workers", task, precision="tf32")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(task):
    first, again = history(task, "loop"), history(task, "loop")
    assert first[-1].weights.tobytes() == again[-1].weights.tobytes()
    other = history(task, "loop", seed=4)
    assert first[1].cohort.tolist() != other[1].cohort.tolist()


def test_resuming_from_any_round_changes_nothing(task):
    whole = history(task, "loop")
    for earlier in whole[:-1]:
        rest = history(task, "loop", resume=(earlier.number, earlier.state))
        assert [r.number for r in rest] == list(range(earlier.number + 1, 5))
        assert rest[-1].weights.tobytes() == whole[-1].weights.tobytes()


def test_rounds_count_bytes_and_evaluate_when_asked(data):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    results = history(task, "loop", evaluate_every=3)
    assert [r.metrics is not None for r in results] == [True, False, False, True, True]
    dim = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
    assert [r.uplink_bytes for r in results] == [0] + [8 * 4 * dim] * 4
    assert results[2].num_examples == data.sizes[results[2].cohort].sum()
    assert results[-1].metrics == evaluate(task, results[-1].weights)


def test_poisson_cohorts_may_be_empty(data):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    results = history(task, "loop", cohort=Poisson(0.02), num_rounds=12)
    empty = [r for r in results[1:] if len(r.cohort) == 0]
    assert empty
    before = results[empty[0].number - 1]
    assert empty[0].weights.tobytes() == before.weights.tobytes()
    assert empty[0].uplink_bytes == 0


def test_federated_evaluation_counts_clients_and_examples(data):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    weights = history(task, "loop")[-1].weights
    result = federated_evaluation(task, weights)["accuracy"]
    one_by_one = [evaluate(task, weights, data.client(k))["accuracy"] for k in range(20)]
    np.testing.assert_allclose(result.per_client, one_by_one)
    assert result.mean == pytest.approx(np.mean(one_by_one))
    assert result.weighted_mean == pytest.approx(evaluate(task, weights, data.train)["accuracy"])
    assert result.worst_decile == pytest.approx(np.mean(sorted(one_by_one)[:2]))


class Fails(nn.Module):
    """Fails, or gives NaN, on every client but those with `max(label) < 9`."""

    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.how = how

    def forward(self, inputs):
        return self.layer(inputs.flatten(1))

    def loss(self, outputs, targets):
        loss = functional.cross_entropy(outputs, targets)
        if self.layer.weight.requires_grad and torch.is_grad_enabled() and targets.max() == 9:
            if self.how == "raises":
                raise RuntimeError("no nines")
            return loss * float("nan")
        return loss


@pytest.mark.parametrize("executor", ["loop", "workers"])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [("raises", TrainingError, "RuntimeError: no nines"), ("nan", DivergedError, "loss=nan")],
)
def test_a_failing_client_is_named_and_stops_the_run(executor, how, error, message):
    data = partitions.shards(datasets.digits(), clients=10, shards_per_client=1, seed=0)
    model = Fails(how)
    task = Task(model=model, data=data, loss=model.loss)
    with pytest.raises(error, match=rf"client '\d' \(number \d\), round 1: .*{message}") as caught:
        history(task, executor, cohort=1.0)
    assert caught.type is error


@pytest.mark.parametrize("executor", ["loop", "workers"])
def test_failing_clients_can_be_left_out_and_are_counted(executor):
    data = partitions.shards(datasets.digits(), clients=10, shards_per_client=1, seed=0)
    model = Fails("raises")
    task = Task(model=model, data=data, loss=model.loss)
    nines = {k for k in range(10) if data.client(k).targets.max() == 9}
    results = history(task, executor, cohort=1.0, num_rounds=2, skip_failures=True)
    assert {failure.client for failure in results[1].failures} == nines
    assert results[1].num_examples == sum(
        data.client(k).num_examples for k in range(10) if k not in nines
    )
    assert results[1].uplink_bytes == (10 - len(nines)) * 4 * 650


def test_a_label_out_of_range_names_the_client():
    data = partitions.iid(datasets.digits(), clients=5, seed=0)
    task = Task(model=lambda: TwoNN((1, 8, 8), num_classes=7), data=data)
    with pytest.raises(TrainingError, match=r"client '0' .* round 1: .* label here is 8"):
        list(
            rounds(
                ALGORITHM, task, cohort=1.0, num_rounds=1, evaluate_every=5, resume=(0, start(task))
            )
        )


def start(task):
    return ALGORITHM.server_init(task.initial_weights(0))


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_killed_worker_is_reported_and_leaves_no_process(data, chunk):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    workers = Workers(task, 2, chunk=chunk)
    processes = list(workers._pool.processes)
    results = rounds(ALGORITHM, task, executor=workers, cohort=1.0)
    next(results)
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"exit codes \[-9"):
        for _ in results:
            pass
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(WorkerError, match="closed"):
        workers.evaluate(task.initial_weights(0))
    workers.close()


def test_workers_leave_when_their_parent_is_killed(data, tmp_path):
    child = os.fork()
    if child == 0:
        workers = Workers(Task(model=lambda: TwoNN((1, 8, 8)), data=data), 2)
        pids = [str(process.pid) for process in workers._pool.processes]
        (tmp_path / "pids.partial").write_text(" ".join(pids))
        (tmp_path / "pids.partial").rename(tmp_path / "pids")
        signal.pause()
    wait_for(lambda: (tmp_path / "pids").exists())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cohort": 1.5}, "cohort=1.5"),
        ({"cohort": 50}, r"population \(20\), got cohort=50"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(data, arguments, message):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    with pytest.raises(ValueError, match=message):
        rounds(ALGORITHM, task, **arguments)


def test_an_unknown_executor_is_refused(data):
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    with pytest.raises(ValueError, match="executor='gpu'"):
        make_executor("gpu", task)
    with pytest.raises(ValueError, match="num_workers=0"):
        Workers(task, 0)


MODES = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("executor", ["loop", "workers", "vmap"])
@pytest.mark.parametrize("mode", MODES)
def test_the_modes_of_the_caller_change_nothing(task, mode, executor):
    expected = history(task, executor)[-1]
    with MODES[mode]():
        found = history(task, executor)[-1]
        assert torch.is_grad_enabled() == (mode == "autocast")
        assert evaluate(task, found.weights) == expected.metrics
    assert found.weights.tobytes() == expected.weights.tobytes()
    assert found.metrics == expected.metrics


def test_the_modes_of_the_caller_hold_between_rounds(task):
    running = rounds(FedAvg(client_lr=0.1), task, cohort=0.2)
    with torch.no_grad():
        next(running)
        assert not torch.is_grad_enabled()
    next(running)
    assert torch.is_grad_enabled()
    running.close()
