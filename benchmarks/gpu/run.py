"""Potluck on a GPU beside the same GPU looped over clients in eager PyTorch, and the paper's LSTM.

    python benchmarks/gpu/run.py [--device cuda] [--precision float32] [--parts 2nn cnn lstm …]
    python benchmarks/gpu/run.py --device cpu --quick        # the same lines, tiny, on a CPU

2nn, cnn: 100 clients × 600 images of noise, C = 0.1, E = 1, B = 10. lstm: 100 clients × 40 lines
of noise. First our round of ten batches a client must equal that of `loop` on the CPU: over the 60
of a whole round on noise, the rounding of float32 grows to a hundredth of the way that the weights
go, between any two implementations. Then ours and the loop on the GPU take turns, round by round,
in one precision. Rounds in which graphs are captured come before and are not timed; a shape that
turns up later costs ours what it costs. The CNN is also stepped with PyTorch's own rule, grouped
convolutions.

shakespeare: 41 rounds of the natural split, C = 0.1, E = 5, B = 10, evaluated after every round;
fedsgd: 3,906 rounds with E = 1, B = ∞, evaluated every 50. Both time everything but the loading of
the data. Without the published file (`POTLUCK_DATA`, or a network) they are left out, and say so.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potluck import FedAvg, Loop, Task, Vmap, fed_sgd, rounds
from potluck.config.experiment import load_experiment
from potluck.core import Correction, DataError, sample_cohort
from potluck.core.plain_json import to_json
from potluck.engine.devices import device_of, synchronise
from potluck.engine.gpu.chunk_trainer import DeviceCohort
from potluck.engine.local_run import LocalRun
from potluck.engine.precision import Precision, products
from potluck.simulation import RoundWork, build_data, build_task
from potluck.simulation.runs.run_manifest import commit, machine

sys.path.insert(0, str(Path(__file__).parent))
from work import ALGORITHM, FULL, LR, QUICK, SEED, Engine, Looped, Size, plain_model, roles, tasks

PARTS = ("2nn", "cnn", "lstm", "shakespeare", "fedsgd")
SPEEDS = {"2nn": 20.0, "cnn": 4.0, "lstm": 5.0}  # times the loop on the same GPU
SECONDS = {"shakespeare": 120.0, "fedsgd": 900.0}
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "bf16": 0.2}  # of the movement in `FEW` batches
FEW = 10
WARM_UP = 8  # rounds in a row in which nothing is captured, before those that are timed
ROLES = Path(__file__).parents[2] / "experiments" / "shakespeare-lstm-role-e5-b10-c0.1.toml"


def cohort_of(task: Task, number: int) -> np.ndarray:
    return sample_cohort(task.data.num_clients, 0.1, seed=SEED, round=number)


def difference(one: np.ndarray, other: np.ndarray, start: np.ndarray) -> float:
    """Of two models, in units of how far one has moved."""
    return float(np.abs(one - other).max() / np.abs(other - start).max())


def compared_with_cpu(task: Task, executor: Vmap) -> float:
    """One round of ours beside one of the loop on the CPU."""
    start, cohort = task.initial_weights(SEED), cohort_of(task, 1)
    loop = Loop(task, num_threads=torch.get_num_threads())
    ours, theirs = (
        some.train(RoundWork(ALGORITHM, start, cohort, seed=SEED, round=1))
        for some in (executor, loop)
    )
    assert not ours.failures, ours.failures
    return difference(ours.aggregate, theirs.aggregate, np.zeros_like(start))


def in_turns(task: Task, contenders: dict[str, Any], device: torch.device, num_rounds: int) -> Any:
    """Seconds of every round after the warm-up, of every contender."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    number = captured = settled = 0
    while settled < WARM_UP + num_rounds:
        number += 1
        for name, contender in contenders.items():
            synchronise(device)
            before = time.perf_counter()
            contender.round(number, cohort_of(task, number))
            synchronise(device)
            if settled >= WARM_UP:
                seconds[name].append(time.perf_counter() - before)
        now = contenders["vmap"].num_captured
        settled = settled + 1 if now == captured or settled >= WARM_UP else 0
        captured = now
    return seconds


def measured(
    name: str, size: Size, device: torch.device, precision: Precision, num_rounds: int
) -> dict[str, Any]:
    """One model: ours against the loop on the same device."""
    few = tasks(size._replace(images=min(10 * FEW, size.images)))[name]
    from_cpu = compared_with_cpu(few, Vmap(few, device=device, precision=precision))
    if not from_cpu <= TOLERANCES[precision]:
        raise SystemExit(
            f"{name}: a round must be within {TOLERANCES[precision]} of the CPU loop's, in units "
            f"of its movement, got {from_cpu:.3g}. Nothing was timed."
        )
    task = tasks(size)[name]
    executor = Vmap(task, device=device, precision=precision)
    contenders = {
        "looped": Looped(task, plain_model(name, size), device),
        "vmap": Engine(task, executor),
    }
    with products(precision):
        seconds = in_turns(task, contenders, device, num_rounds)
    models = {key: contender.vector() for key, contender in contenders.items()}
    for contender in contenders.values():
        contender.close()
    placed = executor.placed
    assert placed is not None
    speeds = [a / b for a, b in zip(seconds["looped"], seconds["vmap"], strict=True)]
    result = {
        "seconds_a_round": {key: statistics.median(mine) for key, mine in seconds.items()},
        "speed": statistics.median(speeds),
        "bar": SPEEDS[name],
        "difference_from_cpu_loop": from_cpu,
        "difference_from_looped": difference(
            models["vmap"], models["looped"], task.initial_weights(SEED)
        ),
        "shapes_captured": placed.num_captured,
        "chunk": placed.chunk,
    }
    if name == "cnn":
        forms = {
            "products": DeviceCohort(task, device, precision),
            "grouped convolutions": DeviceCohort(task, device, precision, plain=True),
        }
        result["seconds_of_forms"] = {
            form: cohort_seconds(task, cohort, device) for form, cohort in forms.items()
        }
    return result


def cohort_seconds(task: Task, cohort: DeviceCohort, device: torch.device) -> float:
    """Of ten steps of ten clients, the best of five."""
    start, size = task.initial_weights(SEED), int(task.data.sizes[0])
    steps = [(slice(0, min(10, size)), LR)] * 10
    runs = [
        LocalRun(start, np.arange(size) + k * size, steps, k, Correction())
        for k in range(min(10, task.data.num_clients))
    ]
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        cohort.train(runs)
        synchronise(device)
        best = min(best, time.perf_counter() - before)
    return best


def role_task(quick: bool) -> Task:
    """The natural split of Shakespeare, as its experiment has it."""
    if quick:
        return roles(QUICK)
    experiment = load_experiment(ROLES)
    return build_task(experiment, build_data(experiment))


def run_of(
    task: Task, algorithm: FedAvg, device: torch.device, precision: Precision, *,
    num_rounds: int, evaluate_every: int, bar: float,
) -> dict[str, Any]:  # fmt: skip
    """A whole run, from the start of the executor to the last evaluation."""
    before = time.perf_counter()
    executor = Vmap(task, device=device, precision=precision)
    try:
        last = None
        for done in rounds(
            algorithm, task, cohort=0.1, num_rounds=num_rounds, seed=SEED, executor=executor,
            evaluate_every=evaluate_every,
        ):  # fmt: skip
            last = done
        seconds = time.perf_counter() - before
        assert last is not None
        assert executor.refused is None, executor.refused
        assert executor.placed is not None
        return {
            "rounds": num_rounds,
            "seconds": seconds,
            "bar_seconds": bar,
            "metrics": last.metrics,
            "shapes_captured": executor.placed.num_captured,
        }
    finally:
        executor.close()


def gpu(device: torch.device) -> dict[str, Any]:
    """What it was measured on."""
    if device.type != "cuda":
        return {"name": "none: these are the lines for a GPU, tried on a CPU", "count": 0}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32", "bf16"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=20, help="that are timed of 2nn, cnn, lstm")
    parser.add_argument("--quick", action="store_true", help="tiny: a trial of the lines")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    device, precision, quick = device_of(arguments.device), arguments.precision, arguments.quick
    size = QUICK if quick else FULL
    num_rounds = 1 if quick else arguments.rounds
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "gpu": gpu(device),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "seed": SEED,
        "precision": precision,
        "quick": quick,
    }

    def text(algorithm: FedAvg, count: int, every: int, bar: float) -> dict[str, Any]:
        try:
            task = role_task(quick)
        except DataError as error:
            return {"left_out": str(error)}
        return run_of(
            task, algorithm, device, precision,
            num_rounds=2 if quick else count, evaluate_every=every, bar=bar,
        )  # fmt: skip

    # The rates of the experiments of these cells.
    fedavg = FedAvg(client_lr=1.47, local_epochs=5, batch_size=10)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "2nn": lambda: measured("2nn", size, device, precision, num_rounds),
        "cnn": lambda: measured("cnn", size, device, precision, num_rounds),
        "lstm": lambda: measured("lstm", size, device, precision, num_rounds),
        "shakespeare": lambda: text(fedavg, 41, 1, SECONDS["shakespeare"]),
        "fedsgd": lambda: text(fed_sgd(client_lr=1.47), 3906, 50, SECONDS["fedsgd"]),
    }
    for part in arguments.parts:
        result[part] = parts[part]()
        print(part, to_json(result[part], indent=1), flush=True)
        arguments.out.write_text(to_json(result, indent=1) + "\n")  # what there is so far


if __name__ == "__main__":
    main()
