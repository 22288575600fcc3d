"""The same rounds in Potluck, a hand-written loop and the peers, one after another, in turns.

    python benchmarks/speed/run.py --prepare          # environments and data; needs a network
    python benchmarks/speed/run.py                    # everything that is not measured yet
    python benchmarks/speed/run.py --parts c --contenders potluck,bare --repeat 3
    python benchmarks/speed/run.py --parts a --seconds 240      # and again, until nothing is left
    python benchmarks/speed/run.py --parts c --fresh  # measure again
    python benchmarks/speed/run.py --table            # results.json and README.md from the runs
    python benchmarks/speed/run.py --tiny --folder /tmp/tiny --out /tmp/tiny    # does it still run?

Each run of a contender is a process of its own in its own environment, started when the one before
has ended. What it noted is kept in the work folder, so a run that is stopped goes on where it was.
Contenders take turns: all of them once, then all of them again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import population
import table
from contenders import ENVIRONMENTS, OURS, PEERS, Contender, contenders
from watch import watch
from work import WORKLOADS, Workload, tiny, write

from potluck.core.plain_json import to_json
from potluck.simulation import available_cores
from potluck.simulation.runs.run_manifest import commit, machine

HERE = Path(__file__).parent
PARTS = (*WORKLOADS, "population")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--contenders", default=",".join((*OURS, *PEERS)))
    parser.add_argument("--variants", help="only these, separated by semicolons")
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run later")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one run")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "benchmarks-work")
    parser.add_argument("--out", type=Path, default=HERE, help="for results.json and README.md")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a few seconds each, to see they run")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    chosen = arguments.contenders.split(",")
    parts = [p for p in arguments.parts.split(",") if p]
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f"--parts takes {', '.join(PARTS)}, got {part!r}.")
    works = {n: tiny(w) if arguments.tiny else w for n, w in WORKLOADS.items()}
    if arguments.prepare:
        prepare(folder, [works[p] for p in parts if p in works], chosen)
        return
    if not arguments.table:
        started = time.monotonic()
        for part in parts:
            if arguments.fresh:
                shutil.rmtree(folder / "runs" / part, ignore_errors=True)
            if part == "population":
                measure_population(folder / "runs" / part, arguments.tiny)
                continue
            write(works[part], folder / "data" / part)
            names = [c for c in contenders(part) if c.name in chosen]
            if arguments.variants:
                names = [c for c in names if c.variant in arguments.variants.split(";")]
            for turn in range(1, arguments.repeat + 1):
                for contender in names:
                    if time.monotonic() - started > arguments.seconds:
                        raise SystemExit("out of time: run the same command again to go on")
                    measure(folder, part, contender, turn, arguments.limit)
    table.write(folder, arguments.out)


def prepare(folder: Path, workloads: list[Workload], chosen: list[str]) -> None:
    """Make what needs a network or takes long, so that measuring needs neither."""
    for workload in workloads:
        write(workload, folder / "data" / workload.name)
    for name in (n for n in ENVIRONMENTS if n.partition("-")[0] in chosen):
        home = folder / "venvs" / name
        if not home.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        requirements = HERE / "requirements" / f"{name}.txt"
        # The files name everything; FedLab's own list also names what is not needed here.
        install = [
            home / "bin/python",
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "-r",
            requirements,
        ]
        subprocess.run(install, check=True)


def interpreter(folder: Path, contender: Contender) -> Path:
    if contender.name in OURS:
        return Path(sys.executable)
    return folder / "venvs" / contender.environment / "bin/python"


def measure(folder: Path, part: str, contender: Contender, turn: int, limit: float) -> None:
    """Run a contender once, unless that was done, and keep what it noted."""
    home = folder / "runs" / part / f"{contender} {turn}".replace(", ", " ").replace(" ", "-")
    if (home / "run.json").exists():
        return
    python = interpreter(folder, contender)
    if not python.exists():
        print(f"{part} {contender}: no environment; --prepare makes it", flush=True)
        return
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    command = [str(python), str(HERE / f"contender_{contender.name}.py")]
    command += ["--work", str(folder / "data" / part), "--out", str(home)]
    command += ["--variant", contender.variant]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS", "OMP", "MKL"))}
    done = watch(command, env=env, log=home / "log.txt", limit=limit)
    ok = done.returncode == 0 and (home / "noted.json").exists()
    noted: dict[str, Any] = json.loads((home / "noted.json").read_text()) if ok else {}
    reason = "" if ok else failure(done.returncode, limit, home / "log.txt")
    run = {
        "contender": contender.name,
        "variant": contender.variant,
        "turn": turn,
        "reason": reason,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "cores": available_cores(),
        "seconds": round(done.seconds, 3),
        "cpu_seconds": round(done.cpu_seconds, 2),
        "peak_bytes": done.peak_bytes,
        "other_cpu_seconds": round(done.other_cpu_seconds, 2),
        "waited_seconds": round(done.waited_seconds, 2),
        # Seconds from the start of the process to the end of each round.
        "ended": [round(t - done.started, 5) for t in noted.pop("ended", [])],
        **noted,
    }
    if ok:
        run.update(table.judge(folder / "data" / part, home / "weights.npy"))
    (home / "run.json").write_text(to_json(run, indent=1) + "\n")
    print(f"{part} {contender} {turn}: {reason or table.summary(run)}", flush=True)


def failure(code: int | None, limit: float, log: Path) -> str:
    if code is None:
        return f"did not end within {limit:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return f"exit status {code}: {lines[-1][:200]}"


def measure_population(home: Path, is_tiny: bool) -> None:
    """How a round's time depends on the number of clients that are not in it."""
    if (home / "run.json").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    run = population.measure((1000, 2000), 1) if is_tiny else population.measure()
    run |= {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine()}
    (home / "run.json").write_text(to_json(run, indent=1) + "\n")
    print("population", run, flush=True)


if __name__ == "__main__":
    main()
