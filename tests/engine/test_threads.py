"""Several programs on one machine: none lets its kernels wait for the cores of the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DEVICE = """
import numpy as np, torch
from potluck import datasets, partitions
from potluck.device import TorchTrainer, one_client
from potluck.config.experiment import check_experiment
from potluck.config.plan import plan_of
from potluck.simulation import build_data, build_task
from potluck.engine import spec_of
content = {
    "name": "e", "task": {"data": "digits", "model": "logistic"}, "partition": {"kind": "iid"},
    "algorithm": {"client_lr": 0.1}, "run": {"rounds": 1},
}
experiment = check_experiment(content, "test")
data = build_data(experiment)
task = build_task(experiment, data)
trainer = TorchTrainer(lambda _: one_client(data, 0))
torch.set_num_threads(4)
trainer.train(
    plan_of(experiment, data), spec_of(task.module()), task.initial_weights(0), seed=0, round=1,
    client=0, check=lambda: None,
)
print(4, torch.get_num_threads())
"""

EVALUATOR = """
import torch
from potluck.server.evaluator import RunEvaluator
from potluck.config.experiment import check_experiment
from potluck.models import losses
seen = []
torch.set_num_threads(4)
original = losses.functional.cross_entropy
def spy(*args, **kwargs):
    seen.append(torch.get_num_threads())
    return original(*args, **kwargs)
losses.functional.cross_entropy = spy
content = {
    "name": "e", "task": {"data": "digits", "model": "logistic"}, "partition": {"kind": "iid"},
    "algorithm": {"client_lr": 0.1}, "run": {"rounds": 1},
}
evaluator = RunEvaluator(check_experiment(content, "test"))
evaluator.evaluate(evaluator.begin(()).weights)
print(torch.get_num_threads(), *set(seen))
"""


@pytest.mark.parametrize("program", [DEVICE, EVALUATOR], ids=["device", "evaluator"])
def test_one_thread_is_the_default_where_pytorch_would_take_four(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4", "1"]


FORKED = """
import os, signal, threading
from potluck.engine.module.randomness import borrowed_randomness
taken, free = threading.Event(), threading.Event()
def hold():
    with borrowed_randomness():
        taken.set()
        free.wait()
thread = threading.Thread(target=hold)
thread.start()
taken.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a lock that nobody releases
    with borrowed_randomness():
        os._exit(0)
free.set()
thread.join()
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_does_not_wait_for_a_thread_that_it_was_forked_without():
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["0"]
