"""How far it is from `potluck train` to the first local step.

    python benchmarks/house/walk.py            writes walk.json beside this file

Counts frames of ours on the stack when the first local step is entered, and our modules that the
training process has loaded by then: digits, a 2NN, 20 clients, on a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).parent
EXECUTORS = ("loop", "workers")
STEP = "TorchRuntime.step"
EXPERIMENT = """
name = "walk"
task = { data = "digits", model = "2nn" }
partition = { kind = "iid", clients = 20 }
algorithm = { client_lr = 0.1 }
run = { rounds = 1, cohort = 0.1, workers = 2, executor = "EXECUTOR" }
"""


def main() -> None:
    rows = [measure(executor) for executor in EXECUTORS]
    (HERE / "walk.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    print("| executor | frames | in files | modules loaded |\n|---|--:|--:|--:|")
    for row in rows:
        print(f"| {row['executor']} | {len(row['stack'])} | {row['files']} | {row['modules']} |")


def measure(executor: str) -> dict[str, Any]:
    """What a process of its own finds."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, __file__, "--walk", executor, folder]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        return json.loads((Path(folder) / "found.json").read_text())


def walk(executor: str, folder: Path) -> None:
    """Train under a profiler that writes down the first local step. Forked workers have it too."""
    import potluck
    from potluck.cli.main import main as potluck_main

    home = str(Path(potluck.__file__).parent)
    found = folder / "found.json"

    def entered(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code.co_qualname != STEP:
            return
        sys.setprofile(None)
        stack: list[str] = []
        files: set[str] = set()
        outer: FrameType | None = frame
        while outer is not None:
            if outer.f_code.co_filename.startswith(home):
                files.add(outer.f_code.co_filename)
                place = os.path.relpath(outer.f_code.co_filename, home)
                stack.append(f"{place}: {outer.f_code.co_qualname}")
            outer = outer.f_back
        modules = sum(name.partition(".")[0] == "potluck" for name in sys.modules)
        row = {"executor": executor, "stack": stack[::-1], "files": len(files)}
        found.write_text(json.dumps(row | {"modules": modules}, allow_nan=False))

    file = folder / "walk.toml"
    file.write_text(EXPERIMENT.replace("EXECUTOR", executor))
    sys.argv = ["potluck", "train", str(file), "--out", str(folder / "runs")]
    sys.setprofile(entered)
    potluck_main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--walk"]:
        walk(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
