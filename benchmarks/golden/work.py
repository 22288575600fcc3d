"""Small runs by every executor and algorithm, through the public names alone; a line of JSON each.

    python benchmarks/golden/work.py

Two trees that compute the same print the same lines. The numbers depend on the processor, so they
are compared between trees on one machine (`run.py`) and are not kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potluck import (
    CNN,
    Adagrad,
    Adam,
    Average,
    FedAvg,
    FedProx,
    LogisticRegression,
    Momentum,
    Nesterov,
    Poisson,
    Scaffold,
    Task,
    TwoNN,
    Yogi,
    datasets,
    fed_sgd,
    own_data,
    partitions,
    rounds,
    schedules,
)

LOCAL: dict[str, Any] = {"client_lr": 0.1, "local_epochs": 2, "batch_size": 14}
ALGORITHMS = {
    "fedsgd": fed_sgd(client_lr=0.1),
    "fedavg": FedAvg(**LOCAL),
    "clipped": FedAvg(**LOCAL, gradient_clip=0.5, client_schedule=schedules.Exponential(0.9)),
    "fedprox": FedProx(**LOCAL, mu=0.1),
    "scaffold": Scaffold(**LOCAL),
    "average": FedAvg(**LOCAL, server=Average(server_lr=0.5)),
    "momentum": FedAvg(**LOCAL, server=Momentum(server_lr=0.5)),
    "nesterov": FedAvg(**LOCAL, server=Nesterov(server_lr=0.5)),
    "adagrad": FedAvg(**LOCAL, server=Adagrad(server_lr=0.01)),
    "adam": FedAvg(**LOCAL, server=Adam(server_lr=0.01)),
    "yogi": FedAvg(**LOCAL, server=Yogi(server_lr=0.01)),
}
EXECUTORS = ("loop", "workers", "vmap")
EXPERIMENTS = {
    "digits": 'data = "digits"\nmodel = "2nn"',
    "text": 'data = "pythonlib"\nmodel = "char-lstm"\nhidden = 16',
}


class Normed(nn.Module):
    """Statistics, a constant, a frozen layer and random numbers while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 24), nn.BatchNorm1d(24)
        self.register_buffer("mask", torch.rand(24) < 0.8)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.last = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 10))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(inputs.flatten(1))) * self.mask
        return self.last(self.frozen(hidden))


def tasks() -> dict[str, Task]:
    """The built-in models, one with state, and a regression."""
    digits = partitions.dirichlet(datasets.digits(), clients=8, alpha=0.5, seed=1, min_examples=12)
    make = np.random.default_rng(5)
    values = {
        f"c{k}": (make.normal(size=(n, 6)), make.normal(size=n)) for k, n in enumerate((9, 14, 30))
    }
    numbers = own_data.from_clients(values, kind="regression")
    return {
        "2nn": Task(model=lambda: TwoNN((1, 8, 8)), data=digits),
        "cnn": Task(model=lambda: CNN((1, 8, 8)), data=digits),
        "logistic": Task(model=lambda: LogisticRegression((1, 8, 8)), data=digits),
        "normed": Task(model=Normed, data=digits),
        "regression": Task(model=lambda: nn.Linear(6, 1), data=numbers),
    }


def lines() -> Iterator[dict[str, Any]]:
    """What each run ended with."""
    made = tasks()
    names = itertools.chain(
        itertools.product(["2nn"], ALGORITHMS, EXECUTORS, ["float32"]),
        itertools.product(list(made)[1:], ["fedavg", "scaffold"], EXECUTORS, ["float32"]),
        itertools.product(["2nn", "normed"], ["fedavg"], ["ray"], ["float32"]),
        itertools.product(["2nn", "normed"], ["fedavg"], ["loop"], ["bfloat16", "int8", "int4"]),
    )
    for model, algorithm, executor, codec in names:
        values: dict[str, Any] = {"executor": executor, "codec": codec, "seed": 3}
        run = rounds(ALGORITHMS[algorithm], made[model], cohort=0.5, num_rounds=3, **values)
        yield {"run": f"{model} {algorithm} {executor} {codec}"} | _told(list(run)[-1])
    run = rounds(ALGORITHMS["fedavg"], made["2nn"], cohort=Poisson(0.4), num_rounds=3, seed=3)
    yield {"run": "2nn fedavg loop poisson"} | _told(list(run)[-1])
    for name, task in EXPERIMENTS.items():
        yield {"run": f"potluck train {name}", "files": _trained(task)}


def _told(last: Any) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(last.weights).tobytes()).hexdigest()
    metrics = {name: float(score).hex() for name, score in last.metrics.items()}
    counts = [int(last.uplink_bytes), int(last.downlink_bytes), last.cohort.tolist()]
    return {"weights": digest, "loss": float(last.loss).hex(), "metrics": metrics, "counts": counts}


def _trained(task: str) -> dict[str, str]:
    """The digests of the files that the command leaves, but for those that tell times."""
    content = f'name = "golden"\n[task]\n{task}\n[algorithm]\nclient_lr = 0.1\n[run]\nrounds = 2\n'
    if "pythonlib" not in task:
        content += '[partition]\nkind = "iid"\nclients = 5\n'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "golden.toml"
        file.write_text(content, encoding="utf-8")
        words = [sys.executable, "-m", "potluck", "train", str(file), "--out", f"{folder}/run"]
        subprocess.run(words, check=True, capture_output=True)
        found = [path for path in sorted(Path(folder, "run").rglob("*")) if path.is_file()]
        digests = {"names": " ".join(str(path.relative_to(folder)) for path in found)}
        for path in found:
            if path.suffix == ".safetensors":
                digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


if __name__ == "__main__":
    for line in lines():
        print(json.dumps(line, allow_nan=False), flush=True)
