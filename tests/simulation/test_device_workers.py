"""`vmap` in several processes, each on a device of its own: the result is that of one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_vmap import assert_alike, history

from potluck import (
    FedAvg,
    LogisticRegression,
    Loop,
    Scaffold,
    Task,
    datasets,
    fed_sgd,
    partitions,
)
from potluck.core import WorkerError
from potluck.simulation import make_executor
from potluck.simulation.executors.gpu_workers import DeviceWorkers, divided
from slope import slope_task

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def model():
    return LogisticRegression((1, 8, 8))


@pytest.fixture(scope="module")
def task():
    return Task(
        model=model, data=partitions.unbalanced(datasets.digits(), clients=15, sigma=1.2, seed=0)
    )


@pytest.mark.parametrize(
    "algorithm",
    [FedAvg(client_lr=0.1, local_epochs=2), Scaffold(client_lr=0.1), fed_sgd(client_lr=0.2)],
    ids=["fedavg", "scaffold", "fedsgd"],
)
def test_processes_on_devices_give_what_the_loop_gives(algorithm, task):
    ours = history(task, DeviceWorkers(task, [CPU, CPU]), algorithm)
    theirs = history(task, Loop(task), algorithm)
    assert_alike(ours, theirs)
    assert ours[-1].metrics == pytest.approx(theirs[-1].metrics)


def test_a_cohort_smaller_than_the_processes_is_trained(task):
    ours = history(task, DeviceWorkers(task, [CPU] * 3), cohort=1)
    assert_alike(ours, history(task, Loop(task), cohort=1))


def test_a_client_that_fails_in_a_process_is_named():
    task = slope_task([(1, 2)], [(1, 1e30)], [(1, -4)])
    kwargs = {"cohort": 1.0, "skip_failures": True}
    ours = history(task, DeviceWorkers(task, [CPU, CPU]), FedAvg(client_lr=0.1), **kwargs)
    theirs = history(task, Loop(task), FedAvg(client_lr=0.1), **kwargs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.failures == other.failures
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-5)


def test_a_process_that_dies_is_an_error_that_says_so(task):
    executor = DeviceWorkers(task, [CPU, CPU])
    os.kill(executor._pool.processes[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"live as long as the run, got exit codes \[0, -9\]"):
        history(task, executor)
    with pytest.raises(WorkerError, match="were closed"):
        history(task, executor)


def test_a_device_that_cannot_be_used_is_told_when_the_processes_start(task):
    with pytest.raises(WorkerError, match=r"a process on cpu failed: ValueError: .*no TF32"):
        DeviceWorkers(task, [CPU], "tf32")
    with pytest.raises(ValueError, match="got none"):
        DeviceWorkers(task, [])


def test_a_cohort_is_divided_by_examples():
    cohort, sizes = np.array([3, 5, 8, 9, 12]), np.array([10, 1, 4, 7, 3])
    # 10; 7; 4 to the second, which has 7; 3 to the first, which has 10; 1 to the second.
    assert [part.tolist() for part in divided(cohort, sizes, 2)] == [[3, 12], [5, 8, 9]]
    assert [len(part) for part in divided(cohort[:1], sizes[:1], 3)] == [1, 0, 0]


def test_what_does_not_go_together_is_refused(task):
    with pytest.raises(ValueError, match=r"device must be left out with executor='loop', got dev"):
        make_executor("loop", task, device="cuda")
    with pytest.raises(ValueError, match=r"precision must be left out with executor='auto', got"):
        make_executor("auto", task, precision="bf16")
    with pytest.raises(ValueError, match="and no GPU, got precision='bf16' with device='cpu'"):
        make_executor("vmap", task, device="cpu", precision="bf16")
    assert make_executor("vmap", task, device="cpu").placed is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_asking_for_one_is_an_error_and_auto_is_none(task):
    with pytest.raises(ValueError, match=r"a CUDA GPU must be at hand for device='cuda', got none"):
        make_executor("vmap", task, 2, device="cuda")
    assert make_executor("vmap", task, device="auto").placed is None


@pytest.mark.soak
def test_the_benchmark_runs_on_a_cpu(tmp_path):
    out = tmp_path / "results.json"
    subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/gpu/run.py",
            "--device",
            "cpu",
            "--quick",
            "--out",
            out,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    written = out.read_text()
    for part in ("2nn", "cnn", "lstm", "shakespeare", "fedsgd"):
        assert f'"{part}": ' in written


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_processes_on_gpus_give_what_the_loop_gives(task):
    executor = make_executor("vmap", task, 2, device="cuda")
    assert isinstance(executor, DeviceWorkers)
    assert_alike(history(task, executor), history(task, Loop(task)), atol=1e-4)
