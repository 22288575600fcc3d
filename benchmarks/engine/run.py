"""The engine against a plain hand-written PyTorch loop, in one run, taking turns.

    python benchmarks/engine/run.py [--rounds 20] [--examples 600] [--logistic-rounds 100]
                                    [--lstm-rounds 20] [--ray-rounds 10] [--parts lstm]

CNN: MNIST's shape, 100 clients × 600 examples, C = 0.1, E = 1, B = 10. Logistic regression: 1,000
clients × 60, C = 0.1, E = 1, B = 10. Character LSTM: 100 clients × 40 lines of 8 to 79
characters, C = 0.1, E = 1, B = 10, in batches of similar length for all contenders. Ray: the CNN
again, on a cluster of this machine, with one worker and with two.

Evaluation is left out on both sides. The contenders take turns round by round, so that a change in
the machine's speed meets all of them, and all must end with the same model. Random inputs: only
time is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import bare
import numpy as np
import torch

from potluck import CNN, Cluster, FedAvg, LogisticRegression, Loop, Task, Workers
from potluck.core import sample_cohort, stream
from potluck.core.plain_json import to_json
from potluck.data import Examples, FederatedData
from potluck.data.federated import lengths
from potluck.engine.local_run import batch_order
from potluck.models import CharLSTM, PerCharacter
from potluck.simulation import RoundWork, available_cores
from potluck.simulation.runs.run_manifest import commit, machine

PARTS = ("logistic", "cnn", "lstm", "ray")
SEED = 1
LR = 0.05


def random_data(num_clients: int, size: int) -> FederatedData:
    """Images of noise, of MNIST's shape, `size` for each client."""
    random = np.random.default_rng(0)
    n = num_clients * size
    train = Examples(random.random((n, 1, 28, 28), np.float32), random.integers(0, 10, n))
    return FederatedData(
        name="noise",
        train=train,
        test=Examples(train.inputs[:100], train.targets[:100]),
        offsets=np.arange(0, n + 1, size),
        clients=tuple(map(str, range(num_clients))),
        num_classes=10,
    )


def random_lines(num_clients: int, size: int) -> FederatedData:
    """Lines of random characters, as long as a play's; `size` for each client."""
    random = np.random.default_rng(0)
    n = num_clients * size
    length = np.clip(np.rint(random.normal(43, 12, n)), 8, 79).astype(np.int64)
    symbols = random.integers(32, 127, (n, 81))
    padded = np.arange(80) >= length[:, None]
    train = Examples(
        *(np.where(padded, bare.PADDING, part) for part in (symbols[:, :-1], symbols[:, 1:]))
    )
    return FederatedData(
        name="lines of noise",
        train=train,
        test=Examples(train.inputs[:100], train.targets[:100]),
        offsets=np.arange(0, n + 1, size),
        clients=tuple(map(str, range(num_clients))),
        num_classes=258,
        padding=bare.PADDING,
    )


class Bare:
    """The hand-written loop, with the threads PyTorch takes by itself."""

    def __init__(self, task: Task, model: torch.nn.Module, num_threads: int) -> None:
        data = task.data
        self.clients = [
            (torch.from_numpy(x), torch.from_numpy(y))
            for x, y in (data.client(k) for k in range(data.num_clients))
        ]
        self.model, self.num_threads = model, num_threads
        self.padding = data.padding
        start = torch.from_numpy(task.initial_weights(SEED))
        values = start.split([p.numel() for p in model.parameters()])
        self.weights = {
            name: value.view_as(parameter).clone()
            for (name, parameter), value in zip(model.named_parameters(), values, strict=True)
        }

    def round(self, number: int, cohort: np.ndarray) -> None:
        torch.set_num_threads(self.num_threads)

        def shuffle(client: int, size: int) -> torch.Tensor:
            random = stream(SEED, "batches", number, client)
            inputs = self.clients[client][0].numpy()
            by_length = None if self.padding is None else lengths(inputs, self.padding)
            return torch.from_numpy(batch_order(size, 10, by_length, random))

        self.weights = bare.train_round(
            self.model, self.weights, self.clients, cohort.tolist(), shuffle,
            epochs=1, batch_size=10, lr=LR, is_text=self.padding is not None,
        )  # fmt: skip

    def vector(self) -> np.ndarray:
        return torch.cat([value.flatten() for value in self.weights.values()]).numpy()


class Engine:
    """An executor of ours, driven by the same algorithm lines as everywhere."""

    def __init__(self, task: Task, executor: Any) -> None:
        self.executor, self.algorithm = executor, FedAvg(client_lr=LR)
        self.state = self.algorithm.server_init(task.initial_weights(SEED))

    def round(self, number: int, cohort: np.ndarray) -> None:
        result = self.executor.train(
            RoundWork(self.algorithm, self.state.weights, cohort, seed=SEED, round=number)
        )
        assert not result.failures, result.failures
        self.state = self.algorithm.server_update(self.state, result.aggregate, round=number)

    def vector(self) -> np.ndarray:
        return self.state.weights


def compare(
    task: Task, contenders: dict[str, Callable[[], Any]], num_rounds: int
) -> dict[str, Any]:
    """Seconds of every round of every contender, in turns, after one round to warm up."""
    started: dict[str, float] = {}
    ready: dict[str, Any] = {}
    for name, make in contenders.items():
        before = time.perf_counter()
        ready[name] = make()
        started[name] = time.perf_counter() - before
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(1, num_rounds + 2):
        cohort = sample_cohort(task.data.num_clients, 0.1, seed=SEED, round=number)
        for name, contender in ready.items():
            before = time.perf_counter()
            contender.round(number, cohort)
            seconds[name].append(time.perf_counter() - before)
        if number % 5 == 1:
            print(
                number - 1, {name: round(sum(s[1:]), 1) for name, s in seconds.items()}, flush=True
            )
    base = ready["bare loop"].vector()
    moved = float(np.abs(base - task.initial_weights(SEED)).max())
    result: dict[str, Any] = {}
    bare = seconds["bare loop"][1:]
    for name, contender in ready.items():
        mine = seconds[name][1:]
        result[name] = {
            "seconds": round(sum(mine), 3),
            "start_seconds": round(started[name], 3),
            "speed": round(sum(bare) / sum(mine), 3),
            "speed_median_of_rounds": round(
                statistics.median(b / m for b, m in zip(bare, mine, strict=True)), 3
            ),
            "difference_from_bare": float(np.abs(contender.vector() - base).max()) / moved,
        }
        if isinstance(contender, Engine):
            contender.executor.close()
    return result


@contextlib.contextmanager
def own_cluster(cores: int) -> Generator[None]:
    """A Ray cluster on this machine, as large as it is told, whatever the machine has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def import_seconds() -> float:
    """Of `import potluck` in a new interpreter: the best of five, inside the process."""
    program = "import time; t = time.perf_counter(); import potluck; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                             check=True).stdout)
        for _ in range(5)
    ]  # fmt: skip
    return round(min(runs), 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--examples", type=int, default=600, help="of a client of the CNN")
    parser.add_argument("--logistic-rounds", type=int, default=100)
    parser.add_argument("--lstm-rounds", type=int, default=20)
    parser.add_argument("--ray-rounds", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    cores = available_cores()
    threads = torch.get_num_threads()

    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "cores": cores,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "seed": SEED,
        "import_seconds": import_seconds(),
    }

    def measured(name: str, part: dict[str, Any]) -> None:
        """Write what there is, so that a run that is stopped leaves its finished parts."""
        result[name] = part
        print(name, to_json(part, indent=1), flush=True)
        arguments.out.write_text(to_json(result, indent=1) + "\n")

    if "logistic" in arguments.parts:
        small = random_data(1000, 60)
        logistic = Task(model=LogisticRegression, data=small)
        measured(
            f"logistic regression, 1,000 clients, {arguments.logistic_rounds} rounds",
            compare(
                logistic,
                {
                    "bare loop": lambda: Bare(logistic, bare.logistic_regression(), 1),
                    "loop": lambda: Engine(logistic, Loop(logistic)),
                    "workers": lambda: Engine(logistic, Workers(logistic)),
                },
                arguments.logistic_rounds,
            ),
        )
    if "cnn" in arguments.parts:
        images = random_data(100, arguments.examples)
        conv = Task(model=CNN, data=images)
        measured(
            f"cnn, {arguments.examples} examples a client, {arguments.rounds} rounds",
            compare(
                conv,
                {
                    "bare loop": lambda: Bare(conv, bare.cnn(), threads),
                    "loop": lambda: Engine(conv, Loop(conv, num_threads=threads)),
                    "workers": lambda: Engine(conv, Workers(conv)),
                },
                arguments.rounds,
            ),
        )
    if "lstm" in arguments.parts:
        text = Task(
            model=CharLSTM,
            data=random_lines(100, 40),
            loss=PerCharacter(padding=bare.PADDING),
            metrics={},
        )
        measured(
            f"character lstm, 40 lines a client, {arguments.lstm_rounds} rounds",
            compare(
                text,
                {
                    "bare loop": lambda: Bare(text, bare.CharLSTM(), 1),
                    "loop": lambda: Engine(text, Loop(text)),
                    "workers, 1": lambda: Engine(text, Workers(text, 1)),
                    "workers, 2": lambda: Engine(text, Workers(text, 2)),
                },
                arguments.lstm_rounds,
            ),
        )
    if "ray" in arguments.parts:
        conv = Task(model=CNN, data=random_data(100, arguments.examples))
        with own_cluster(3):  # a core of the cluster for each worker of both contenders
            measured(
                f"ray: cnn, {arguments.examples} examples a client, {arguments.ray_rounds} rounds",
                compare(
                    conv,
                    {
                        "bare loop": lambda: Bare(conv, bare.cnn(), threads),
                        "workers, 1": lambda: Engine(conv, Workers(conv, 1)),
                        "workers, 2": lambda: Engine(conv, Workers(conv, 2)),
                        "ray, 1": lambda: Engine(conv, Cluster(conv, 1)),
                        "ray, 2": lambda: Engine(conv, Cluster(conv, 2)),
                    },
                    arguments.ray_rounds,
                ),
            )


if __name__ == "__main__":
    main()
