"""Does another tree compute the same bits? Runs `work.py` with two checkouts on this machine.

    python benchmarks/golden/run.py OLD NEW

OLD and NEW are folders with a src/ of Potluck. The exit status is 1 where a run differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_WORK = Path(__file__).with_name("work.py")


def results_of(tree: Path) -> dict[str, Any]:
    """What each run gives with the package of a checkout."""
    if not (tree / "src" / "potluck").is_dir():
        sys.exit(f"a checkout must have src/potluck, got {tree}. Name its folder.")
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(_WORK)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: the runs ended with status {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("run"): line for line in lines}


def main(old: str, new: str) -> int:
    before, after = results_of(Path(old)), results_of(Path(new))
    differing = [name for name in before | after if before.get(name) != after.get(name)]
    for name in differing:
        print(f"{name}:\n  {old}: {before.get(name)}\n  {new}: {after.get(name)}")
    print(f"{len(before)} runs, {len(differing)} differ")
    return int(bool(differing))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/golden/run.py OLD NEW")
    sys.exit(main(*sys.argv[1:]))
