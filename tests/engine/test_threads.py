"""Several programs on one machine: none lets its kernels wait for the cores of the others."""

from __future__ import annotations

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
from potluck.server.evaluator import Judge
from potluck.config.experiment import check_experiment
from potluck.models import metrics
seen = []
torch.set_num_threads(4)
original = metrics.functional.cross_entropy
def spy(*args, **kwargs):
    seen.append(torch.get_num_threads())
    return original(*args, **kwargs)
metrics.functional.cross_entropy = spy
content = {
    "name": "e", "task": {"data": "digits", "model": "logistic"}, "partition": {"kind": "iid"},
    "algorithm": {"client_lr": 0.1}, "run": {"rounds": 1},
}
judge = Judge(check_experiment(content, "test"))
judge.evaluate(judge.begin(()).weights)
print(torch.get_num_threads(), *set(seen))
"""


@pytest.mark.parametrize("program", [DEVICE, EVALUATOR], ids=["device", "evaluator"])
def test_one_thread_is_the_default_where_pytorch_would_take_four(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4", "1"]
