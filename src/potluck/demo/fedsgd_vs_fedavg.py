"""The demonstration: federated averaging against synchronised gradient averaging.

The digits of scikit-learn are divided among 100 clients, IID and two-shard (two or three classes a
client). The same 2NN is trained to 95 % by FedSGD (one averaged gradient a round) and by FedAvg (20
local steps a round, each on all of a client's examples). All else is the same; the learning rates
of both were chosen by `benchmarks/demo/tune.py` on other seeds and on held-out training images.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from potluck.config.experiment import Experiment, check_experiment
from potluck.simulation.runs.report import Cost, best_so_far, format_bytes

TARGET = 0.95
PARTITIONS = ("iid", "two-shard")
ALGORITHMS = ("FedSGD", "FedAvg")
SEEDS = (1, 2, 3)

_KINDS = {"iid": "iid", "two-shard": "shards"}
_SETTINGS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("iid", "FedSGD"): {"name": "fedsgd", "client_lr": 0.6813},
    ("two-shard", "FedSGD"): {"name": "fedsgd", "client_lr": 0.4642},
    ("iid", "FedAvg"): {"local_epochs": 20, "batch_size": "full", "client_lr": 0.6813},
    ("two-shard", "FedAvg"): {"local_epochs": 20, "batch_size": "full", "client_lr": 0.4642},
}
_COLOURS = {"FedSGD": "#D55E00", "FedAvg": "#0072B2"}

HEADER = (
    "partition",
    "algorithm",
    "client_lr",
    "rounds to 95 %",
    "uplink to 95 %",
    "fewer rounds",
)


class ComparedRun(NamedTuple):
    """One of the four runs that are compared."""

    partition: str
    algorithm: str
    experiment: Experiment


def settings() -> list[ComparedRun]:
    """Both algorithms on both partitions."""
    return [
        ComparedRun(partition, algorithm, _experiment(partition, algorithm))
        for partition in PARTITIONS
        for algorithm in ALGORITHMS
    ]


def table(results: Mapping[tuple[str, str], Sequence[Cost]]) -> list[tuple[str, ...]]:
    """A row of cells, as in `HEADER`, for every (partition, algorithm): means over the seeds."""
    rows: list[tuple[str, ...]] = []
    for partition in PARTITIONS:
        slow = _mean_rounds(results[partition, "FedSGD"])
        for algorithm in ALGORITHMS:
            costs = results[partition, algorithm]
            mean = _mean_rounds(costs)
            paid = [cost.bytes_to_target[0] for cost in costs if cost.bytes_to_target is not None]
            rows.append(
                (
                    partition,
                    algorithm,
                    f"{_SETTINGS[partition, algorithm]['client_lr']:g}",
                    "–" if mean is None else f"{mean:.1f}",
                    "–" if mean is None else format_bytes(sum(paid) / len(paid)),
                    "" if mean is None or slow is None else f"{slow / mean:.1f}×",
                )
            )
    return rows


def draw(results: Mapping[tuple[str, str], Sequence[Cost]], paths: Iterable[Path]) -> None:
    """Draws both partitions side by side into each of `paths`: every seed thin, counted as the best
    accuracy so far."""
    figure_module: Any = importlib.import_module("matplotlib.figure")  # slow, and seldom needed
    figure = figure_module.Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for partition, axes in zip(PARTITIONS, panels, strict=True):
        axes.axhline(TARGET, color="0.6", linewidth=1.0, zorder=0)
        for algorithm in ALGORITHMS:
            costs = results[partition, algorithm]
            mean = _mean_rounds(costs)
            label = algorithm if mean is None else f"{algorithm}: {mean:.0f} rounds"
            for cost in costs:
                numbers, scores = zip(*best_so_far(cost.curve), strict=True)
                axes.plot(numbers, scores, color=_COLOURS[algorithm], linewidth=1.4, label=label)
                label = None
        axes.set_title(f"digits, 100 clients, {partition}", fontsize="medium")
        axes.set_xlabel("round")
        axes.set_xlim(left=0)
        axes.set_ylim(0.0, 1.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    panels[0].set_ylabel("test accuracy, best so far")
    panels[0].annotate(
        "95 %", (0.0, TARGET), xytext=(3, 3), textcoords="offset points", color="0.4"
    )
    for path in paths:
        figure.savefig(path, dpi=150)


def _experiment(partition: str, algorithm: str) -> Experiment:
    content = {
        "name": f"digits-{partition}-{algorithm.lower()}",
        "task": {"data": "digits", "model": "2nn"},
        "partition": {"kind": _KINDS[partition], "clients": 100},
        "algorithm": dict(_SETTINGS[partition, algorithm]),
        "run": {"rounds": 400, "cohort": 0.1, "target": TARGET},
    }
    return check_experiment(content, "the demonstration")


def _mean_rounds(costs: Sequence[Cost]) -> float | None:
    reached = [cost.to_target for cost in costs if cost.to_target is not None]
    return sum(reached) / len(reached) if reached and len(reached) == len(costs) else None
