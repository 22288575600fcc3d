"""Keep what a soak found: one JSON file for each row of the table in benchmarks/server."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "server"


def record(name: str, *, must: str, seed: int | None, seconds: float, found: dict) -> None:
    """Write benchmarks/server/<name>.json; `found["holds"]` says whether it is as it must be."""
    told = {
        "row": name.upper(),
        "must_show": must,
        "holds": found.pop("holds"),
        "found": found,
        "seed": seed,
        "seconds": round(seconds),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "command": f"make soak PYTEST_ARGS='-k {name}'",
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=2) + "\n")


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[2]
    return f"{cores} cores of an {(names or ['unknown'])[0]}; load average {load:.1f} in 15 minutes"
