"""NVFlare's simulator with its FedAvg recipe for arrays.

Variant "2 threads": two processes at a time train the clients, each with single-threaded kernels.
The simulator has as many clients as the cohort, so that no idle ones cost it anything; place i of
the cohort is its client i. Round ends are read from the times in the server's log, to the
millisecond.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
from notes import Notes
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

HERE = Path(__file__).parent


def main() -> None:
    notes = Notes()
    workload = notes.given.workload
    os.environ["PYTHONPATH"] = str(HERE)
    counts = notes.out / "counts"
    recipe = NumpyFedAvgRecipe(
        name="speed",
        initial_ckpt=str((notes.folder / "weights.npy").resolve()),
        min_clients=workload.cohort,
        num_rounds=workload.rounds,
        train_script=str(HERE / "nvflare_client.py"),
        train_args=f"{notes.folder.resolve()} {counts.resolve()} "
        f"{'trimmed' if 'trimmed' in notes.variant else 'padded'}",
    )
    with tempfile.TemporaryDirectory() as root:
        recipe.execute(SimEnv(num_clients=workload.cohort, num_threads=2, workspace_root=root))
        ended, last = found(Path(root))
    notes.ended = ended
    lines = [line.split() for line in counts.read_text().splitlines()]
    examples, steps = (sum(int(line[i]) for line in lines) for i in (0, 1))
    notes.finish(last, examples=examples, steps=steps, packages=("nvflare", "torch"))


def found(root: Path) -> tuple[list[float], np.ndarray]:
    """When rounds ended, on the clock that all processes share, and the last model."""
    offset = time.time() - time.monotonic()
    stamp = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
    event = re.compile(r"Round \d+ started|Finished FedAvg")
    times: list[float] = []
    for log in root.rglob("log.txt"):
        last = ""  # a message of several lines has its time in the first
        for line in log.read_text().splitlines():
            found_stamp = stamp.search(line)
            last = found_stamp[0] if found_stamp else last
            if event.search(line):
                moment = datetime.datetime.strptime(last, "%Y-%m-%d %H:%M:%S,%f")
                times.append(moment.timestamp() - offset)
        if times:
            break
    return times[1:], np.load(next(root.rglob("server.npy")))


if __name__ == "__main__":
    main()
