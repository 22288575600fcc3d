"""What a full-size test found, as a file that is committed: benchmarks/server/<name>.json."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def record(name: str, must_show: str, found: dict[str, Any], *, passed: bool) -> None:
    """Write a result; `found` has the seed, where there is one."""
    content = {
        "test": name.upper(),
        "must_show": must_show,
        "passed": passed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "python": platform.python_version(),
        "found": found,
    }
    path = ROOT / "benchmarks" / "server" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {'an AMD EPYC' if 'EPYC' in model else model}"
