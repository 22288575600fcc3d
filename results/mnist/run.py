"""MNIST beside the paper: run what is missing, then write the tables and curves.

    python results/mnist/run.py [--runs runs] [--report-only]

Runs are resumable: stop this at any time and start it again. `README.md`, the pictures and a copy
of every manifest and `rounds.jsonl` (and `timings.jsonl`) are written beside this file.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

from potluck.experiment import load_experiment
from potluck.simulation import RunRecord, build_data, read_run, train
from potluck.simulation.report import Cost, draw, measure

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parents[1] / "experiments"
COPIED = ("manifest.json", "rounds.jsonl", "timings.jsonl")


class Cell(NamedTuple):
    """One cell of the paper."""

    experiment: str
    what: str
    paper: str  # rounds, as its tables give them
    bar: int  # what we mean to reach in at most so many rounds
    seeds: tuple[int, ...] = (1, 2, 3)


CELLS = (
    Cell("mnist-2nn-iid-e1-b10-c0.1", "2NN 97 %, E 1, B 10, IID", "87 / 92", 92),
    Cell("mnist-2nn-two-shard-e1-b10-c0.1", "2NN 97 %, E 1, B 10, two-shard", "664 / 831", 664),
    Cell("mnist-cnn-iid-e5-b10-c0.1", "CNN 99 %, E 5, B 10, IID", "18 / 20", 25),
    Cell("mnist-cnn-two-shard-e5-b10-c0.1", "CNN 99 %, E 5, B 10, two-shard", "206 / 229", 229),
)

INTRODUCTION = """\
# MNIST beside the paper

Plain FedAvg, 100 clients, C = 0.1, evaluated on the 10,000 test images after every round; rounds
are counted as the paper counts them (the curve made monotone, the crossing interpolated). Each
run's manifest and rounds lie beside this file, and `potluck report results/mnist` reads them.
`make results` makes what is missing; the runs of commit aa64806b55c9 were started by a few lines
that call `potluck.simulation.train` on the same experiments, as `potluck train` does, before that
command was there. The learning rates are those that the paper's figures show (2NN 0.1; CNN 0.215
IID, 0.1 two-shard); none was tuned on these runs.

"""


def run_missing(runs: Path) -> None:
    for cell in CELLS:
        experiment = load_experiment(EXPERIMENTS / f"{cell.experiment}.toml")
        data = build_data(experiment)
        for seed in cell.seeds:
            for round in train(experiment, runs / cell.experiment / f"seed-{seed}", seed=seed,
                               data=data):  # fmt: skip
                print(cell.experiment, f"seed {seed}", round.number, round.metrics, flush=True)


def collect(runs: Path) -> dict[str, list[RunRecord]]:
    """Copy what tables are made from, and read it."""
    records: dict[str, list[RunRecord]] = {}
    for cell in CELLS:
        for seed in cell.seeds:
            source, copy = (root / cell.experiment / f"seed-{seed}" for root in (runs, HERE))
            if (source / "rounds.jsonl").exists():
                copy.mkdir(parents=True, exist_ok=True)
                for name in COPIED:
                    shutil.copy(source / name, copy / name)
            if (copy / "rounds.jsonl").exists():
                records.setdefault(cell.experiment, []).append(read_run(copy))
    return records


def table(costs: dict[str, list[Cost]]) -> str:
    lines = [
        "| cell | paper (tables 1 / 2 or 4) | ours, mean ± std | each seed | bar |",
        "|---|---|---|---|---|",
    ]
    for cell in CELLS:
        mine = costs.get(cell.experiment, [])
        reached = [cost.to_target for cost in mine if cost.to_target is not None]
        mean = f"{statistics.fmean(reached):.1f}" if reached else "–"
        if len(reached) > 1:
            mean += f" ± {statistics.stdev(reached):.1f}"
        mean += f" ({len(reached)} of {len(cell.seeds)} seeds)"
        each = ", ".join(
            f"{cost.to_target:.1f}"
            if cost.to_target is not None
            else f"– (best {cost.best:.4f} in {cost.rounds})"
            for cost in mine
        )
        lines.append(
            f"| {cell.what} | {cell.paper} | {mean} | {each or 'not run'} | ≤ {cell.bar} |"
        )
    return "\n".join(lines) + "\n"


def provenance(records: dict[str, list[RunRecord]]) -> str:
    lines = [
        "",
        "| experiment | seed | rounds run | hours | commit | machine |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in records.items():
        for run in runs:
            m = run.manifest
            lines.append(
                f"| {name} | {m['seed']} | {run.rounds[-1]['round']} | "
                f"{sum(run.seconds) / 3600:.2f} | {m['commit']} | {m['machine']}, "
                f"torch {m['versions']['torch']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report_only:
        run_missing(arguments.runs)
    records = collect(arguments.runs)
    costs = {name: [measure(run) for run in runs] for name, runs in records.items()}
    text = INTRODUCTION + table(costs) + provenance(records)
    for name, mine in costs.items():
        draw(mine, [HERE / f"{name}.png"])
        text += f"\n![{name}]({name}.png)\n"
    (HERE / "README.md").write_text(text)
    print(table(costs))


if __name__ == "__main__":
    main()
