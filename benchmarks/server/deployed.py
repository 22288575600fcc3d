"""A deployed run beside the simulated one: the same weights where it can be, or accuracy in noise.

    python benchmarks/server/deployed.py            both parts, into results-deployed.json
    python benchmarks/server/deployed.py --quick    the same on digits, smaller; writes nothing

`same`: 20 device processes, 10 rounds of MNIST's 2NN (IID, C = 0.25, E = 1, B = 10), cohorts drawn
as the simulation draws them. Compared are the cohorts and, after every round, the weights.

`noise`: 100 device processes, each with two shards of MNIST, C = 0.1, E = 1, B = 10. The server
takes whoever checks in, and the first ten reports count, without over-selection and with 1.3. Which
devices those are is decided by their speed, so weights differ; compared is the accuracy, the mean
of the last ten rounds, over three seeds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load

from potluck.config.experiment import load_experiment
from potluck.core import sample_cohort
from potluck.core.plain_json import to_json
from potluck.demo.federation import LocalFederation
from potluck.simulation import build_algorithm, build_data, build_task, rounds

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parents[1] / "experiments"
SEEDS = (1, 2, 3)
LAST = 10  # rounds, over which accuracy is averaged


def simulate(file: Path, overrides: list[str]) -> list[Any]:
    """All rounds of the simulation."""
    experiment = load_experiment(file, overrides)
    task = build_task(experiment, build_data(experiment))
    run = experiment.run
    made = rounds(
        build_algorithm(experiment), task, num_rounds=run.rounds, cohort=run.cohort, seed=run.seed
    )
    return list(made)


def deploy(file: Path, overrides: list[str], devices: int) -> dict[str, Any]:
    """The same with processes: accuracy and weights after each round, and who took part."""
    accuracy: dict[int, float] = {}
    taken: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"server.population={devices}", "server.pace_seconds=1.0"]
        begun = time.monotonic()
        with LocalFederation(file, Path(folder), overrides=[*overrides, *settings]) as federation:
            for device in range(devices):
                federation.start(device, invited=True)
            enrolled = time.monotonic()
            over = False
            status: dict[str, Any] = {"round": 0}
            while federation.running or len(accuracy) <= status["round"]:
                for news in federation.news(0.5):
                    if news["is"] == "event" and news["what"] == "accepted":
                        taken.append((news["round"], news["device"]))
                    if news["is"] == "event" and news["what"] == "failed":
                        raise RuntimeError(f"no device was to fail: {news}")
                if not over:
                    ended = time.monotonic()
                status = federation.operator.get("status")
                over = status["state"] == "finished"
                for told in status["evaluations"]:
                    accuracy[told["round"]] = told["metrics"]["accuracy"]
            models = [
                load(federation.operator.fetch("export", version=number))
                for number in range(status["round"] + 1)
            ]
    return {
        "accuracy": [accuracy[number] for number in sorted(accuracy)],
        "models": models,
        "taken": taken,
        "seconds_to_enrol": round(enrolled - begun, 1),
        "seconds": round(ended - enrolled, 1),
    }


def same(quick: bool) -> dict[str, Any]:
    """Weights and cohorts, round by round."""
    name = "digits-quickstart" if quick else "mnist-2nn-iid-e1-b10-c0.1"
    count, num_rounds = (6, 3) if quick else (20, 10)
    file = EXPERIMENTS / f"{name}.toml"
    overrides = [f"partition.clients={count}", "partition.kind=iid", f"run.rounds={num_rounds}"]
    overrides += ["run.cohort=0.25", "run.seed=7"]
    expected = simulate(file, overrides)
    served = ["server.selection=sampled", "server.over_selection=1.0"]
    found = deploy(file, [*overrides, *served], count)
    differences = []
    names = names_of(file, overrides)
    for made, model in zip(expected, found["models"], strict=True):
        weights = np.concatenate([model[name].ravel() for name in names])
        differences.append(float(np.abs(weights - made.weights).max()))
    drawn = [
        (number, int(client))
        for number in range(1, num_rounds + 1)
        for client in sample_cohort(count, 0.25, seed=7, round=number)
    ]
    return {
        "experiment": name,
        "devices": count,
        "rounds": num_rounds,
        "same_cohorts": sorted(found["taken"]) == sorted(drawn),
        "largest_difference_of_weights": max(differences),
        "accuracy": [round(value, 4) for value in found["accuracy"]],
        "accuracy_simulated": [round(r.metrics["accuracy"], 4) for r in expected],
        "seconds_to_enrol": found["seconds_to_enrol"],
        "seconds": found["seconds"],
    }


def names_of(file: Path, overrides: list[str]) -> tuple[str, ...]:
    """The tensors of the model, in the order of the vector."""
    from potluck.engine.task import spec_of

    experiment = load_experiment(file, overrides)
    return spec_of(build_task(experiment, build_data(experiment)).model()).names


def noise(quick: bool) -> dict[str, Any]:
    """Accuracy over seeds: simulated, served, and served with over-selection."""
    name = "digits-quickstart" if quick else "mnist-2nn-two-shard-e1-b10-c0.1"
    count, num_rounds, seeds = (10, 12, (1, 2)) if quick else (100, 100, SEEDS)
    file = EXPERIMENTS / f"{name}.toml"
    goal = count // 10 if not quick else 3
    result: dict[str, Any] = {"experiment": name, "devices": count, "rounds": num_rounds}
    cells: dict[str, list[dict[str, Any]]] = {"simulated": [], "served ×1.0": [], "served ×1.3": []}
    for seed in seeds:
        overrides = [f"partition.clients={count}", f"run.rounds={num_rounds}", f"run.seed={seed}"]
        overrides.append(f"run.cohort={goal}")
        simulated = [made.metrics["accuracy"] for made in simulate(file, overrides)]
        cells["simulated"].append({"seed": seed, "accuracy": simulated})
        for over in (1.0, 1.3):
            served = [f"server.goal={goal}", f"server.over_selection={over}"]
            found = deploy(file, [*overrides, *served], count)
            times = Counter(device for _, device in found["taken"])
            each = [times[device] for device in range(count)]
            cells[f"served ×{over}"].append(
                {
                    "seed": seed,
                    "accuracy": found["accuracy"],
                    "reports_of_a_device": {"least": min(each), "most": max(each)},
                    "seconds_to_enrol": found["seconds_to_enrol"],
                    "seconds": found["seconds"],
                }
            )
            print(
                name, seed, over, round(statistics.mean(found["accuracy"][-LAST:]), 4), flush=True
            )
    for label, runs in cells.items():
        last = [statistics.mean(run["accuracy"][-LAST:]) for run in runs]
        for run in runs:
            run["accuracy"] = [round(value, 4) for value in run["accuracy"]]
        mean, std = statistics.mean(last), statistics.stdev(last)
        result[label] = {"mean": round(mean, 4), "std": round(std, 4), "runs": runs}
        print(f"{label:12} {100 * mean:.2f} ± {100 * std:.2f} %", flush=True)
    return result


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, on digits; writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    result = {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "same": same(quick),
    }
    print(to_json(result["same"], indent=1))
    result["noise"] = noise(quick)
    if not quick:
        path = HERE / "results-deployed.json"
        path.write_text(to_json(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
