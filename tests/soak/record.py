"""What a full-size test found, as a file that is committed: benchmarks/server/<name>.json."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
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
    path = _path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")


def record_part(
    name: str,
    must_show: str,
    part: str,
    parts: Sequence[str],
    found: dict[str, Any],
    *,
    passed: bool,
) -> None:
    """Write one of the parts of a result beside those that the same commit has: it passes with the
    last of them. So a result may be had in pieces of minutes on a machine that is shared."""
    path = _path(name)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = old["found"] if old.get("commit") == _commit() else {}
    kept |= {part: found | {"passed": passed}}
    there = {one: kept[one] for one in parts if one in kept}
    seconds = sum(one["seconds"] for one in there.values())
    whole = len(there) == len(parts) and all(one["passed"] for one in there.values())
    record(name, must_show, there | {"seconds": seconds}, passed=whole)


def _path(name: str) -> Path:
    return ROOT / "benchmarks" / "server" / f"{name}.json"


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
