"""What else FedAvg could do on two-shard digits, beside what `potluck demo` shows of it.

    python benchmarks/demo/alternatives.py > benchmarks/demo/alternatives.json

Rounds to 95 % on the images that `tune.py` sets aside, three seeds that the demo does not have,
each setting at the best of the rates around it. A run that ends before the target counts as its
limit. Every row goes to the error stream as it comes; two cores need about half an hour.
"""

from __future__ import annotations

import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import tune

from potluck import FedAvg, fed_sgd, rounds, schedules
from potluck.core import TrainingError
from potluck.core.plain_json import to_json
from potluck.simulation.runs.report import rounds_to_target
from potluck.simulation.runs.run_manifest import commit, machine

SEEDS = (1000, 1001, 1002)
LIMIT = {"fedsgd": 200, "fedavg": 80}
RATES = (0.2154, 0.4642, 0.6813)
# cohort, local epochs, batch size (None: all of a client's), decay of the rate a round
FEDAVG = (
    (0.1, 1, 10, None),
    (0.1, 5, 10, None),
    (0.1, 20, 10, None),
    (0.1, 5, None, None),
    (0.1, 20, None, None),  # the demo's
    (0.1, 20, None, 0.98),
    (0.1, 40, None, None),
    (0.2, 20, None, None),
    (0.5, 20, None, None),
    (0.5, 40, None, None),
)
FEDSGD = (0.1, 0.2, 0.5)  # cohorts


def rounds_needed(setting: tuple[Any, ...], lr: float, seed: int) -> float:
    """Rounds to the target, or the limit."""
    torch.set_num_threads(1)
    cohort, *rest = setting
    if rest:
        epochs, size, decay = rest
        schedule = schedules.Constant() if decay is None else schedules.Exponential(decay)
        algorithm = FedAvg(
            client_lr=lr, local_epochs=epochs, batch_size=size, client_schedule=schedule
        )
    else:
        algorithm = fed_sgd(client_lr=lr)
    limit = LIMIT["fedavg" if rest else "fedsgd"]
    curve: list[tuple[int, float]] = []
    try:
        for round in rounds(
            algorithm,
            tune.task_of("two-shard"),
            cohort=cohort,
            num_rounds=limit,
            seed=seed,
            executor="vmap",
        ):
            curve.append((round.number, (round.metrics or {})["accuracy"]))
            if curve[-1][1] >= tune.TARGET:
                break
    except TrainingError as error:  # a rate that diverges
        print(f"{setting} {lr} seed {seed}: {error}", file=sys.stderr)
    return rounds_to_target(curve, tune.TARGET) or float(limit)


def main() -> None:
    rows: list[dict[str, Any]] = []
    settings = [(cohort,) for cohort in FEDSGD] + list(FEDAVG)
    with ProcessPoolExecutor() as pool:
        jobs = {
            (setting, lr): [pool.submit(rounds_needed, setting, lr, seed) for seed in SEEDS]
            for setting in settings
            for lr in RATES
        }
        for setting in settings:
            of_rates = {lr: [round(job.result(), 1) for job in jobs[setting, lr]] for lr in RATES}
            best = min(RATES, key=lambda lr: statistics.fmean(of_rates[lr]))
            names = ("cohort", "local_epochs", "batch_size", "decay")
            row = {
                "algorithm": "FedAvg" if len(setting) > 1 else "FedSGD",
                **dict(zip(names, setting, strict=False)),
                "best_rate": best,
                "rounds": round(statistics.fmean(of_rates[best]), 1),
                "by_rate": of_rates,
            }
            print(to_json(row), file=sys.stderr, flush=True)
            rows.append(row)
    about = {"commit": commit(), "machine": machine(), "seeds": SEEDS, "limit": LIMIT}
    print(to_json(about | {"settings": rows}, indent=1))


if __name__ == "__main__":
    main()
