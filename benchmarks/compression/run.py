"""What a codec costs and saves: uplink bytes to the same accuracy, and accuracy after equal rounds.

    python benchmarks/compression/run.py            # the paper's CNN on two-shard MNIST: hours
    python benchmarks/compression/run.py --quick    # the 2NN on two-shard digits: a minute
    python benchmarks/compression/run.py --report   # the table of the runs that are there

It can be stopped at any moment; the same command goes on. Runs lie in `runs/`; those in float32
that `results/runs/` has already are read from there. README.md gets the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from potluck.config.experiment import load_experiment
from potluck.core import CODECS, RunError
from potluck.core.plain_json import to_json
from potluck.simulation import build_data, read_run, train
from potluck.simulation.runs.directory import RunRecord
from potluck.simulation.runs.report import best_so_far, markdown, rounds_to_target

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAST = 20  # rounds over which the accuracy after equal rounds is averaged
SAME = 0.003  # as much as a mean accuracy may differ to be the same
BARS = {"int8": 0.26, "int4": 0.14}


class Study(NamedTuple):
    """One setting: all codecs get the same number of rounds."""

    name: str
    file: str  # of experiments/
    rounds: int
    target: float
    done: str | None  # where results/runs may have float32


FULL = Study(
    "full",
    "mnist-cnn-two-shard-e5-b10-c0.1",
    60,
    0.97,
    "results/runs/mnist-cnn-two-shard-e5-b10-c0.1/lr-0.1",
)
QUICK = Study("quick", "digits-quickstart", 150, 0.90, None)
HEADER = (
    "codec",
    "uplink of a round",
    "rounds to the target, mean ± std",
    "each seed",
    "uplink to the target",
    "accuracy after equal rounds",
    "against float32, points",
)


def place(study: Study, codec: str, seed: int) -> Path:
    """The directory of a run: one that is committed, or one of this study."""
    if codec == "float32" and study.done is not None:
        committed = ROOT / study.done / f"seed-{seed}"
        if is_done(study, committed):
            return committed
    return HERE / "runs" / study.name / codec / f"seed-{seed}"


def is_done(study: Study, directory: Path) -> bool:
    """Whether a run has all rounds of the study."""
    try:
        return read_run(directory).rounds[-1]["round"] >= study.rounds
    except (RunError, IndexError):
        return False


def run(study: Study, codecs: list[str], seeds: list[int]) -> None:
    """Make the runs that are missing."""
    overrides = [f"run.rounds={study.rounds}", "run.stop_at_target=false", "run.evaluate_every=1"]
    base = load_experiment(ROOT / "experiments" / f"{study.file}.toml", overrides)
    data = build_data(base)
    for seed in seeds:
        for codec in codecs:
            directory = place(study, codec, seed)
            if is_done(study, directory):
                continue
            experiment = base.model_copy(
                update={"run": base.run.model_copy(update={"codec": codec})}
            )
            for round in train(experiment, directory, seed=seed, data=data):
                if round.number % 10 == 0:
                    accuracy = (round.metrics or {})["accuracy"]
                    print(f"{codec}, seed {seed}, round {round.number}: {accuracy:.4f}", flush=True)


def measure(study: Study, record: RunRecord, seed: int) -> dict[str, Any]:
    """The numbers of one run, of its first `study.rounds` rounds."""
    lines = record.rounds[: study.rounds + 1]
    curve = [(int(line["round"]), float(line["metrics"]["accuracy"])) for line in lines]
    needed = rounds_to_target(curve, study.target)
    return {
        "seed": seed,
        "commit": record.manifest["commit"],
        "machine": record.manifest["machine"],
        "uplink_bytes_per_round": lines[-1]["uplink_bytes"],
        "rounds_to_target": needed,
        "uplink_bytes_to_target": None if needed is None else needed * lines[-1]["uplink_bytes"],
        "accuracy": statistics.fmean(score for _, score in curve[-LAST:]),
        "best": best_so_far(curve)[-1][1],
        "seconds": sum(record.seconds[: study.rounds + 1]),
    }


def results(study: Study, codecs: list[str], seeds: list[int]) -> dict[str, Any]:
    """All runs that are complete."""
    runs = {
        codec: [
            measure(study, read_run(directory), seed)
            for seed in seeds
            if is_done(study, directory := place(study, codec, seed))
        ]
        for codec in codecs
    }
    return {
        "study": study._asdict(),
        "runs": runs,
    }


def table(study: Study, found: dict[str, Any]) -> str:
    """The results in Markdown; a codec beside the same seeds of float32."""
    plain = {r["seed"]: r for r in found["runs"]["float32"]}
    rows: list[tuple[str, ...]] = []
    verdicts: list[str] = []
    for codec, all_runs in found["runs"].items():
        mine = [r for r in all_runs if r["seed"] in plain]
        if not mine:
            continue
        theirs = [plain[r["seed"]] for r in mine]
        points = mean(mine, "accuracy") - mean(theirs, "accuracy")
        share = mine[0]["uplink_bytes_per_round"] / theirs[0]["uplink_bytes_per_round"]
        needed = [r["rounds_to_target"] for r in mine]
        pairs = [*needed, *(r["rounds_to_target"] for r in theirs)]
        ratio = None
        if None not in pairs:
            to_target = "uplink_bytes_to_target"
            ratio = mean(mine, to_target) / mean(theirs, to_target)
        rows.append(
            (
                codec,
                f"{mine[0]['uplink_bytes_per_round'] / 1e6:.3g} MB ({share:.4f}×)",
                "–" if None in needed else spread(needed),
                ", ".join("–" if n is None else f"{n:.1f}" for n in needed),
                "–" if ratio is None else f"{ratio:.3f}×",
                f"{100 * mean(mine, 'accuracy'):.2f} %",
                f"{100 * points:+.2f}",
            )
        )
        if codec in BARS:
            bar, met = BARS[codec], share <= BARS[codec] and abs(points) <= SAME
            verdicts.append(
                f"{codec}: after {study.rounds} rounds each, {share:.4f}× of the bytes for "
                f"{100 * points:+.2f} points (bar: ≤ {bar}× within ± 0.3): "
                f"{'met' if met else 'missed'}, with {len(mine)} of {len(plain)} seeds. "
                f"To {100 * study.target:g} %: "
                + ("not reached." if ratio is None else f"{ratio:.3f}×.")
            )
    made = {(r["commit"], r["machine"]) for runs in found["runs"].values() for r in runs}
    verdicts += [f"commit {commit}, {machine}" for commit, machine in sorted(made)]
    return "\n".join([markdown(HEADER, rows), *(f"- {line}" for line in verdicts)])


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """The mean over runs."""
    return statistics.fmean(r[key] for r in runs)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {deviation:.1f}"


def write_table(study: Study, text: str) -> None:
    """Put a table between its two marks in README.md."""
    path = HERE / "README.md"
    start, end = f"<!-- {study.name} -->\n", f"<!-- end of {study.name} -->"
    head, rest = path.read_text(encoding="utf-8").split(start)
    _, tail = rest.split(end)
    path.write_text(f"{head}{start}{text}\n{end}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits instead of MNIST")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    # The bars first: bfloat16 is asked for least.
    order = ["float32", "int8", "int4", "bfloat16"]
    parser.add_argument("--codecs", nargs="+", default=order, choices=CODECS)
    given = parser.parse_args()
    study = QUICK if given.quick else FULL
    if not given.report:
        run(study, given.codecs, given.seeds)
    found = results(study, order, given.seeds)
    file = HERE / ("results-quick.json" if given.quick else "results.json")
    file.write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
    text = table(study, found)
    write_table(study, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
