"""Make more than 150 mistakes and write down what a user reads: `python benchmarks/errors/run.py`.

Writes `audit.md` beside this file. Ends with status 1 if a mistake is not refused, or refused in
words that are not for users.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import commands  # noqa: E402
import library  # noqa: E402
import own  # noqa: E402
import served  # noqa: E402
from watched import Mistake, Seen, see  # noqa: E402

AREAS = (
    commands.mistakes,
    commands.settings,
    own.mistakes,
    library.models,
    library.judges,
    library.algorithms,
    served.operators,
    served.devices,
)


def made(words: list[str]) -> Iterator[tuple[Mistake, Seen]]:
    """Every mistake whose area or name holds one of the words, or all."""
    for area in AREAS:
        for mistake in area.all:
            if not words or any(word in f"{mistake.area}: {mistake.what}" for word in words):
                with tempfile.TemporaryDirectory(prefix="potluck-") as folder:
                    yield mistake, see(mistake, Path(folder))


def main(words: list[str]) -> int:
    """Print what is at fault, and write the page if all mistakes were made."""
    pages: dict[str, list[str]] = {}
    faults = count = 0
    for mistake, seen in made(words):
        count += 1
        pages.setdefault(mistake.area, []).append(f"- **{mistake.what}**: {seen.line}")
        if words or seen.faults:
            print(f"{mistake.area}: {mistake.what}\n  {seen.line}", flush=True)
        if seen.faults:
            faults += 1
            print(f"  FAULT: {'; '.join(seen.faults)}", flush=True)
    print(f"{count} mistakes, {faults} of them not answered as they should be")
    if not words:
        head = (
            f"# What {count} mistakes are answered\n\n"
            "Written by `python benchmarks/errors/run.py`. "
            "DIR is a temporary folder, SERVER that of a server, CLONE this repository.\n"
        )
        body = [f"\n## {area}\n\n" + "\n".join(lines) + "\n" for area, lines in pages.items()]
        (FOLDER / "audit.md").write_text(head + "".join(body), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
