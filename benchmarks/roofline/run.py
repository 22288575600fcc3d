"""What share of this machine's arithmetic and memory the engine reaches, and where the rest goes.

    python benchmarks/roofline/run.py               # results.json and the tables of README.md
    python benchmarks/roofline/run.py --parts B,C --rounds 5
    python benchmarks/roofline/run.py --quick --out /somewhere/else   # a try in half a minute
    python benchmarks/roofline/run.py --report      # the tables of the results that are there

First the machine: float32 matrix products by both libraries that PyTorch has, and a large copy, on
one core and on all at once, a process each. Then rounds of A to D, with a process per core, against
counted operations and bytes (`work.py`). Then one process under PyTorch's profiler: which operators
take the time, and how much of it is taken by none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from work import WORK, Work, clients_of

from potluck import FedAvg, Loop, Vmap, Workers
from potluck.core.plain_json import to_json
from potluck.simulation import RoundWork, available_cores
from potluck.simulation.runs.run_manifest import commit, machine

HERE = Path(__file__).parent
SEED = 1
ALGORITHM = FedAvg(client_lr=0.05)
KINDS = {
    "linear layers": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear"),
    "convolutions": ("convolution", "mkldnn_convolution", "convolution_backward"),
    "LSTM": (
        *("_LayerStep", "_LayerStepBackward"),  # what potluck.engine.native.lstm compiles
        *("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "lstm"),
    ),
    "pooling": ("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "max_pool2d"),
}
OTHER, NONE = "other operators", "no operator"


def best_seconds(function: Callable[[], Any], seconds: float) -> float:
    """Of the fastest call within about so many seconds."""
    function()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        before = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - before)
    return best


def one_core(seconds: float, start: Any, results: Any) -> None:
    """In a process of its own: what one core does while the others do the same."""
    torch.set_num_threads(1)
    n = 1024
    left, right = torch.randn(n, n), torch.randn(n, n)
    images, filters = torch.randn(10, 32, 14, 14), torch.randn(64, 32, 5, 5)
    source, target = torch.randn(32 * 2**20), torch.empty(32 * 2**20)  # 128 MiB each
    start.wait()
    mkl = 2 * n**3 / best_seconds(lambda: torch.mm(left, right), seconds)
    start.wait()
    convolution = 2 * 10 * 196 * 64 * 800 / best_seconds(
        lambda: functional.conv2d(images, filters, padding=2), seconds
    )  # fmt: skip
    start.wait()
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), seconds)
    results.put({"mkl": mkl, "onednn": convolution, "copy": copy})


def machine_rates(cores: int, seconds: float) -> dict[str, float]:
    """Of so many cores at once: operations a second by each library, bytes a second copied."""
    context = mp.get_context("spawn")
    start, results = context.Barrier(cores), context.Queue()
    processes = [
        context.Process(target=one_core, args=(seconds, start, results)) for _ in range(cores)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {name: sum(one[name] for one in found) for name in found[0]}


def train(executor: Any, weights: Any, cohort: Any, number: int) -> float:
    """Seconds of one round."""
    before = time.perf_counter()
    result = executor.train(RoundWork(ALGORITHM, weights, cohort, seed=SEED, round=number))
    assert not result.failures, result.failures
    return time.perf_counter() - before


def measure(work: Work, num_rounds: int, small: bool, rates: dict[str, Any]) -> dict[str, Any]:
    """One of A to D."""
    task = work.task(small)
    weights, cohort = task.initial_weights(SEED), clients_of(work, task)
    chunk = Vmap(task).chunk if work.processes_train == "side by side" else None
    cores = available_cores()
    workers = Workers(task, cores, chunk=chunk)
    seconds = [train(workers, weights, cohort, n) for n in range(num_rounds + 1)][1:]
    workers.close()
    flops = work.flops(task, cohort.tolist())
    moved = work.bytes(task, cohort.tolist())
    fastest = min(seconds)  # what the engine reaches when nothing disturbs it
    peak = max(rates["all cores"]["mkl"], rates["all cores"]["onednn"])
    return {
        "title": work.title,
        "processes": cores,
        "trained": work.processes_train,
        "seconds_a_round": round(statistics.median(seconds), 5),
        "fastest_round": round(fastest, 5),
        "gigaflops": round(flops / 1e9, 3),
        "gigabytes": round(moved / 1e9, 3),
        "share_of_arithmetic": round(flops / fastest / peak, 4),
        "share_of_bandwidth": round(moved / fastest / rates["all cores"]["copy"], 4),
        "time": operators(task, weights, cohort, chunk),
    }


def operators(task: Any, weights: Any, cohort: Any, chunk: int | None) -> dict[str, float]:
    """The shares of one process's time by kind of operator, on a part of the cohort."""
    torch.set_num_threads(1)
    few = cohort[: chunk or 1]
    executor: Any = Loop(task) if chunk is None else Vmap(task, chunk)
    train(executor, weights, few, 1)
    whole = min(train(executor, weights, few, 2) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        train(executor, weights, few, 2)
    shares = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::").removeprefix("mkldnn::")
        kind = next((k for k, names in KINDS.items() if name in names), OTHER)
        if event.key.startswith("mkldnn::_linear"):
            kind = "linear layers"
        if event.key.startswith(("aten::", "mkldnn::")) or event.key in KINDS["LSTM"]:
            shares[kind] += event.self_cpu_time_total / 1e6
    # The profiler slows what is between operators, so the whole is taken from rounds without it.
    whole = max(whole, sum(shares.values()))
    shares[NONE] = whole - sum(shares.values())
    return {kind: round(seconds / whole, 4) for kind, seconds in shares.items()}


def tables(results: dict[str, Any]) -> str:
    """The results in words and tables, for README.md."""
    one, every = results["rates"]["one core"], results["rates"]["all cores"]
    lines = [
        f"{results['date']}, commit {results['commit']}, {results['machine']}, "
        f"torch {results['versions']['torch']}, seed {results['seed']}, "
        f"{results['rounds']} rounds of each.",
        "",
        f"| the machine | one core | {results['cores']} cores at once |",
        "|---|---|---|",
        *(
            f"| {title} | {one[key] / 1e9:.0f} | {every[key] / 1e9:.0f} |"
            for key, title in (
                ("mkl", "matrix product 1024³ (MKL), GFLOP/s"),
                ("onednn", "convolution of A's second layer (oneDNN), GFLOP/s"),
                ("copy", "copy of 128 MiB, GB/s"),
            )
        ),
        "",
        "| | seconds a round | fastest | GFLOP | GB | of the arithmetic | of the bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in results["parts"].items():
        lines.append(
            f"| {name}: {part['title']}, {part['trained']} | {part['seconds_a_round']:.4g} | "
            f"{part['fastest_round']:.4g} | {part['gigaflops']:.4g} | {part['gigabytes']:.3g} | "
            f"{part['share_of_arithmetic']:.0%} | {part['share_of_bandwidth']:.0%} |"
        )
    kinds = [*KINDS, OTHER, NONE]
    lines += [
        "",
        "| time of a process | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | " + " | ".join(f"{part['time'][k]:.0%}" for k in kinds) + " |")
    return "\n".join(lines)


def report(results: dict[str, Any], readme: Path) -> None:
    """Put the tables between their two marks in README.md."""
    before, mark, rest = readme.read_text().partition("<!-- results -->")
    _, end, after = rest.partition("<!-- end -->")
    readme.write_text(f"{before}{mark}\n{tables(results)}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="A,B,C,D")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE, help="a folder")
    arguments = parser.parse_args()
    path = arguments.out / "results.json"
    if arguments.report:
        report(json.loads(path.read_text()), HERE / "README.md")
        return
    seconds = 0.1 if arguments.quick else 2.0
    cores = available_cores()
    one = machine_rates(1, seconds)
    rates = {"one core": one, "all cores": machine_rates(cores, seconds) if cores > 1 else one}
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "cores": cores,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "seed": SEED,
        "rounds": arguments.rounds,
        "rates": rates,
        "parts": {},
    }
    for name in arguments.parts.split(","):
        results["parts"][name] = measure(WORK[name], arguments.rounds, arguments.quick, rates)
        print(name, to_json(results["parts"][name]), flush=True)
    path.write_text(to_json(results, indent=1) + "\n")
    if arguments.out == HERE:
        report(results, HERE / "README.md")


if __name__ == "__main__":
    main()
