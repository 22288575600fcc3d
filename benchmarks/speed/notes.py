"""What a contender notes of its run: when rounds ended, what was done, and the last weights.

notes = Notes()          # reads the command line that run.py gives
for …:
    …
    notes.round_ended()
notes.finish(weights, examples=…, steps=…, setting="…")
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from work import Given, read


class Notes:
    """The command line of a contender, and what it writes."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--work", type=Path, required=True, help="folder of the workload")
        parser.add_argument("--out", type=Path, required=True, help="folder for what is noted")
        parser.add_argument("--variant", default="", help="how this contender is set up")
        arguments = parser.parse_args()
        self.folder: Path = arguments.work
        self.out: Path = arguments.out
        self.variant: str = arguments.variant
        self.given: Given = read(self.folder)
        self.ended: list[float] = []  # on the clock that all processes share

    def round_ended(self) -> None:
        self.ended.append(time.monotonic())

    def finish(
        self, weights: np.ndarray, *, examples: int, steps: int, packages: tuple[str, ...]
    ) -> None:
        """Write everything down.

        Args:
            examples, steps: trained on and made, over all rounds, as the contender counted them.
            packages: whose versions are to be told.
        """
        versions = {"python": platform.python_version()}
        versions |= {name: metadata.version(name) for name in ("numpy", *packages)}
        noted = {"ended": self.ended, "examples": examples, "steps": steps, "versions": versions}
        np.save(self.out / "weights.npy", np.asarray(weights, np.float32))
        (self.out / "noted.json").write_text(json.dumps(noted, allow_nan=False))
