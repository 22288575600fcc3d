"""Rounds of tiny models, large populations and empty rounds: our executors and a plain loop.

    python benchmarks/speed/run.py [--parts c,e,f] [--rounds 20] [--out results.json]

c: logistic regression with 7,850 parameters, 1,000 clients × 60 examples, 100 a round, B 10, E 1,
   beside the hand-written loop of `benchmarks/engine/bare.py`.
e: 10,000, 100,000 and 1,000,000 clients × 10 examples of 64 features, 1,000 a round, with `vmap`;
   the peak memory of a process with 100,000 of them; and the start of a process.
f: rounds with next to no work: 100 clients with one example of one feature.

Evaluation is left out. Contenders take turns round by round, so that a change in the machine's
speed meets all of them; medians over the rounds after the first. Random inputs: only time is
measured, but for c all must end with the same model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potluck import Auto, FedAvg, LogisticRegression, Loop, Task, Vmap, Workers
from potluck.core import sample_cohort, stream
from potluck.simulation import available_cores
from potluck.simulation.manifest import commit, machine
from potluck.tasks import Examples, FederatedData

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import bare

SEED, LR = 1, 0.05
ALGORITHM = FedAvg(client_lr=LR)


def noise(num_clients: int, size: int, shape: tuple[int, ...], classes: int = 10) -> FederatedData:
    """Random examples, `size` for each client; beyond 100,000 they repeat."""
    random = np.random.default_rng(0)
    n, made = num_clients * size, min(num_clients * size, 100_000)
    inputs, targets = random.random((made, *shape), np.float32), random.integers(0, classes, made)
    times = -(-n // made)
    train = Examples(np.tile(inputs, (times, *[1] * len(shape)))[:n], np.tile(targets, times)[:n])
    return FederatedData(
        name="noise",
        train=train,
        test=Examples(train.inputs[:100], train.targets[:100]),
        offsets=np.arange(0, n + 1, size),
        clients=tuple(map(str, range(num_clients))),
        num_classes=classes,
    )


class Engine:
    """An executor of ours, driven by the same algorithm lines as everywhere."""

    def __init__(self, task: Task, executor: Any) -> None:
        self.task, self.executor = task, executor
        self.state = ALGORITHM.server_init(task.initial_weights(SEED))

    def round(self, number: int, cohort: np.ndarray) -> None:
        result = self.executor.train(ALGORITHM, self.state.weights, cohort, seed=SEED, round=number)
        assert not result.failures, result.failures
        self.state = ALGORITHM.server_update(self.state, result.aggregate, round=number)

    def vector(self) -> np.ndarray:
        return self.state.weights


class Bare:
    """The hand-written loop, on one thread."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        data = task.data
        self.clients = [
            (torch.from_numpy(x), torch.from_numpy(y))
            for x, y in (data.client(k) for k in range(data.num_clients))
        ]
        self.model = model
        start = torch.from_numpy(task.initial_weights(SEED))
        values = start.split([p.numel() for p in self.model.parameters()])
        self.weights = {
            name: value.view_as(parameter).clone()
            for (name, parameter), value in zip(self.model.named_parameters(), values, strict=True)
        }

    def round(self, number: int, cohort: np.ndarray) -> None:
        def shuffle(client: int, size: int) -> torch.Tensor:
            random = stream(SEED, "batches", number, client)
            return torch.from_numpy(ALGORITHM.order(size, None, random))

        self.weights = bare.train_round(
            self.model, self.weights, self.clients, cohort.tolist(), shuffle,
            epochs=1, batch_size=10, lr=LR,
        )  # fmt: skip

    def vector(self) -> np.ndarray:
        return torch.cat([value.flatten() for value in self.weights.values()]).numpy()


def in_turns(
    contenders: dict[str, Any], sizes: dict[str, int], cohort: int, num_rounds: int
) -> dict[str, list[float]]:
    """Seconds of every round of every contender, the first of which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, num_rounds + 2):
        for name, contender in contenders.items():
            clients = sample_cohort(sizes[name], cohort, seed=SEED, round=number)
            before = time.perf_counter()
            contender.round(number, clients)
            seconds[name].append(time.perf_counter() - before)
    return seconds


def table(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Of each contender: seconds a round, and its speed in units of `base`."""
    return {
        name: {
            "first_round": round(mine[0], 5),
            "seconds_a_round": round(statistics.median(mine[1:]), 5),
            "fastest_round": round(min(mine[1:]), 5),
            "speed": round(
                statistics.median(b / m for b, m in zip(seconds[base][1:], mine[1:], strict=True)),
                2,
            ),
        }
        for name, mine in seconds.items()
    }


def part_c(num_rounds: int) -> dict[str, Any]:
    task = Task(model=LogisticRegression, data=noise(1000, 60, (1, 28, 28)))
    workers, auto = Workers(task), Auto(task)
    contenders: dict[str, Any] = {
        "bare loop": Bare(task, bare.logistic_regression()),
        "loop": Engine(task, Loop(task)),
        "workers": Engine(task, workers),
        "vmap": Engine(task, Vmap(task)),
        "auto": Engine(task, auto),
    }
    seconds = in_turns(contenders, dict.fromkeys(contenders, 1000), 100, num_rounds)
    result = table(seconds, "bare loop")
    base = contenders["bare loop"].vector()
    moved = float(np.abs(base - task.initial_weights(SEED)).max())
    for name, contender in contenders.items():
        result[name]["difference_of_models"] = (
            float(np.abs(contender.vector() - base).max()) / moved
        )
    result["auto"]["choice"] = auto.choice
    workers.close()
    auto.close()
    return result


def part_e(num_rounds: int) -> dict[str, Any]:
    sizes = {"10,000 clients": 10_000, "100,000 clients": 100_000, "1,000,000 clients": 1_000_000}
    contenders: dict[str, Any] = {}
    for name, size in sizes.items():
        task = Task(model=lambda: LogisticRegression((64,)), data=noise(size, 10, (64,)))
        contenders[name] = Engine(task, Vmap(task))
    result = table(in_turns(contenders, sizes, 1000, num_rounds), "10,000 clients")
    before = time.perf_counter()
    output = subprocess.run(
        [sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True
    ).stdout
    result["a process with 100,000 clients"] = {
        **json.loads(output), "seconds": round(time.perf_counter() - before, 2)
    }  # fmt: skip
    return result


def memory() -> None:
    """In a process of its own: peak memory of five rounds with 100,000 clients."""
    started = time.perf_counter()
    task = Task(model=lambda: LogisticRegression((64,)), data=noise(100_000, 10, (64,)))
    made = time.perf_counter()
    engine = Engine(task, Vmap(task))
    engine.round(1, sample_cohort(100_000, 1000, seed=SEED, round=1))
    first = time.perf_counter() - made
    for number in range(2, 6):
        engine.round(number, sample_cohort(100_000, 1000, seed=SEED, round=number))
    # Not `getrusage`, which also remembers the process that this one was forked from.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])
    answer = {"peak_bytes": peak, "data_seconds": round(made - started, 2)}
    print(json.dumps({**answer, "executor_and_first_round_seconds": round(first, 3)}))


def part_f(num_rounds: int) -> dict[str, Any]:
    task = Task(model=lambda: nn.Linear(1, 2), data=noise(100, 1, (1,), 2))
    workers, auto = Workers(task), Auto(task)
    contenders: dict[str, Any] = {
        "bare loop": Bare(task, nn.Linear(1, 2)),
        "loop": Engine(task, Loop(task)),
        "workers": Engine(task, workers),
        "vmap": Engine(task, Vmap(task)),
        "auto": Engine(task, auto),
    }
    seconds = in_turns(contenders, dict.fromkeys(contenders, 100), 100, num_rounds)
    result = table(seconds, "bare loop")
    result["auto"]["choice"] = auto.choice
    workers.close()
    auto.close()
    return result


def start_seconds() -> float:
    """From nothing to the end of a first round of `vmap`, in a new interpreter: best of three."""
    program = (
        "from potluck import *; "
        "d = partitions.iid(datasets.digits(), clients=100, seed=0); "
        "t = Task(model=lambda: LogisticRegression((1, 8, 8)), data=d); "
        "list(rounds(FedAvg(client_lr=0.1), t, num_rounds=1, executor='vmap'))"
    )
    best = float("inf")
    for _ in range(3):
        before = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        best = min(best, time.perf_counter() - before)
    return round(best, 2)


PARTS = {"c": part_c, "e": part_e, "f": part_f}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="c,e,f")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory()
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "cores": available_cores(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "seed": SEED,
        "rounds": arguments.rounds,
        "start_seconds": start_seconds(),
    }
    for part in arguments.parts.split(","):
        result[part] = PARTS[part](arguments.rounds)
        print(part, json.dumps(result[part], indent=1), flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
