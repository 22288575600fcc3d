"""Choose the learning rates of `potluck demo`, for FedSGD and FedAvg alike.

Nothing that the demo reports is touched: a fifth of the *training* digits is set aside to judge
by, the rest is divided among 100 clients, and the seeds are others than the demo's.

    python benchmarks/demo/tune.py > benchmarks/demo/rates.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from potluck import FedAvg, Task, TwoNN, datasets, fed_sgd, partitions, rounds
from potluck.core import TrainingError
from potluck.core.plain_json import to_json
from potluck.data import Dataset, Examples
from potluck.simulation.runs.report import rounds_to_target
from potluck.simulation.runs.run_manifest import commit, machine

TARGET = 0.95
SEEDS = (1000, 1001)
MORE_SEEDS = tuple(range(1000, 1008))  # between the two best rates
GRID = [round(10 ** (k / 6), 4) for k in range(-6, 1)]  # 0.1 … 1
MOST_ROUNDS = {"fedsgd": 250, "fedavg": 80}


def validation() -> Dataset:
    """The training digits, a fifth of each class (every fifth image) as the test set."""
    train = datasets.digits().train
    seen: dict[int, int] = {}
    held: list[bool] = []
    for target in train.targets.tolist():
        seen[target] = seen.get(target, 0) + 1
        held.append(seen[target] % 5 == 0)
    kept = [not h for h in held]
    return Dataset(
        name="digits, validation",
        train=Examples(train.inputs[kept], train.targets[kept]),
        test=Examples(train.inputs[held], train.targets[held]),
        num_classes=10,
    )


def algorithm(name: str, lr: float) -> FedAvg:
    if name == "fedsgd":
        return fed_sgd(client_lr=lr)
    return FedAvg(client_lr=lr, local_epochs=20, batch_size=None)


def task_of(part: str) -> Task:
    divide = partitions.iid if part == "iid" else partitions.shards
    data = divide(validation(), clients=100, seed=1000)
    return Task(model=lambda: TwoNN((1, 8, 8)), data=data)


def rounds_needed(part: str, name: str, lr: float, seed: int) -> float:
    """Rounds to the target, or the limit."""
    torch.set_num_threads(1)
    curve: list[tuple[int, float]] = []
    try:
        for round in rounds(
            algorithm(name, lr), task_of(part), cohort=0.1, num_rounds=MOST_ROUNDS[name], seed=seed
        ):
            curve.append((round.number, (round.metrics or {})["accuracy"]))
            if curve[-1][1] >= TARGET:
                break
    except TrainingError as error:  # a rate that diverges
        print(f"{part} {name} {lr} seed {seed}: {error}", file=sys.stderr)
    return rounds_to_target(curve, TARGET) or float(MOST_ROUNDS[name])


def main() -> None:
    result: dict[str, object] = {"commit": commit(), "machine": machine(), "seeds": SEEDS}
    with ProcessPoolExecutor() as pool:

        def mean(part: str, name: str, lr: float, seeds: Sequence[int]) -> float:
            runs = [pool.submit(rounds_needed, part, name, lr, seed) for seed in seeds]
            rounds_of_seeds = statistics.fmean(run.result() for run in runs)
            print(f"{part} {name} {lr} {seeds}: {rounds_of_seeds:.1f}", file=sys.stderr)
            return round(rounds_of_seeds, 1)

        for part in ("iid", "two-shard"):
            for name in MOST_ROUNDS:
                first = {lr: mean(part, name, lr, SEEDS) for lr in GRID}
                nearest = sorted(GRID, key=lambda lr: first[lr])[:2]
                second = {lr: mean(part, name, lr, MORE_SEEDS) for lr in nearest}
                result[f"{part} {name}"] = {
                    "best": min(nearest, key=lambda lr: second[lr]),
                    "mean rounds": first,
                    "mean rounds, more seeds": second,
                }
    print(to_json(result, indent=1))


if __name__ == "__main__":
    main()
