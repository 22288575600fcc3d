"""Choose the learning rates of `potluck demo`, for FedSGD and FedAvg alike.

Nothing that the demo reports is touched: a fifth of the *training* digits is set aside to judge
by, the rest is divided among 100 clients, and the seeds are others than the demo's.

    python benchmarks/demo/tune.py > benchmarks/demo/rates.json
"""

from __future__ import annotations

import json
import statistics
import sys

import torch

from potluck import FedAvg, Task, TwoNN, datasets, fed_sgd, partitions, rounds
from potluck.simulation.manifest import commit, machine
from potluck.simulation.report import rounds_to_target
from potluck.tasks import Dataset, Examples

TARGET = 0.95
SEEDS = (1000, 1001)
GRID = [round(10 ** (k / 6), 4) for k in range(-7, 1)]  # 0.068 … 1
MOST_ROUNDS = {"fedsgd": 300, "fedavg-e5": 100, "fedavg-e20": 60}


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
    return FedAvg(client_lr=lr, local_epochs=int(name.removeprefix("fedavg-e")), batch_size=10)


def rounds_needed(name: str, lr: float, task: Task, seed: int) -> float:
    """Rounds to the target, or the limit."""
    curve: list[tuple[int, float]] = []
    try:
        for round in rounds(
            algorithm(name, lr), task, cohort=0.1, num_rounds=MOST_ROUNDS[name], seed=seed
        ):
            curve.append((round.number, (round.metrics or {})["accuracy"]))
            if curve[-1][1] >= TARGET:
                break
    except Exception as error:  # a rate that diverges
        print(f"{name} {lr} seed {seed}: {error}", file=sys.stderr)
    return rounds_to_target(curve, TARGET) or float(MOST_ROUNDS[name])


def main() -> None:
    torch.set_num_threads(1)
    dataset = validation()
    result: dict[str, dict[str, object]] = {}
    for part in ("iid", "two-shard"):
        divide = partitions.iid if part == "iid" else partitions.shards
        task = Task(model=lambda: TwoNN((1, 8, 8)), data=divide(dataset, clients=100, seed=1000))
        for name in MOST_ROUNDS:
            means: dict[float, float] = {}
            for lr in GRID:
                means[lr] = statistics.fmean(rounds_needed(name, lr, task, s) for s in SEEDS)
                print(f"{part} {name} client_lr={lr}: {means[lr]:.1f}", file=sys.stderr)
            best = min(means, key=lambda lr: means[lr])
            result[f"{part} {name}"] = {"best": best, "mean rounds": means}
    print(json.dumps({"commit": commit(), "machine": machine(), **result}, indent=1))


if __name__ == "__main__":
    main()
