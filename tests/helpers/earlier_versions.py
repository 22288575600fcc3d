"""Runs that earlier commits began, as files: `tests/helpers/earlier/<commit>.zip`.

python tests/helpers/earlier_versions.py [COMMIT …]      makes them, with the history of this
repository

Each holds what a killed server and its two devices left behind: experiment.toml, home, device-0 and
device-1. The server was killed in the middle of a round, after three that were committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("earlier")
COMMITS = ("9d9b376", "65922c4", "a9ea92b", "e19dde6", "1ce5ec8", "598fab7")
"""Schema 0001, two of each later number, and defaults that changed between them."""
TEXT = """name = "earlier"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 2
[algorithm]
client_lr = 0.1
[algorithm.server]
name = "momentum"
momentum = 0.5
[run]
rounds = 1000
cohort = 2
evaluate_every = 1000
[server]
minimum = 0.5
population = 2
pace_seconds = 0.1
long_poll_seconds = 1.0
"""
_LEFT_OUT = ("*/lock", "*/admin.sock", "device-*/models/*", "device-*/sent/*")


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="potluck-earlier-"))
    tree, here = folder / commit, Path(__file__).parent
    subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, commit], cwd=here, check=True)
    try:
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=here, check=True)
        shutil.rmtree(folder, ignore_errors=True)


def program(tree: Path, *words: object, **options) -> subprocess.Popen[str]:
    """`potluck …` as it was in that tree."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "potluck", *map(str, words)],
        env=environment, stdout=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def served(process: subprocess.Popen[str]) -> str:
    """The address of a server that was started, once it has said all that it says."""
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        name, _, value = line.partition(" ")
        address = value.strip() if name == "address" else address
        if name == "admin":
            return address
    raise RuntimeError("the server ended before it served")


def make(commit: str, into: Path) -> None:
    """Serve three rounds at a commit, and keep what is left after kill -9."""
    with tree_of(commit) as tree, tempfile.TemporaryDirectory(prefix="p-") as name:
        folder = Path(name)
        (folder / "experiment.toml").write_text(TEXT)
        words = ("serve", "experiment.toml", "--home", "home", "--port", 0)
        processes = [program(tree, *words, cwd=folder)]
        try:
            address = served(processes[0])
            asked = program(tree, "enroll", "--count", 2, "--home", "home", cwd=folder)
            for k, token in enumerate(asked.communicate(timeout=60)[0].split()):
                words = ("join", address, "--token", token, "--experiment", "experiment.toml")
                more = ("--client", k, "--home", f"device-{k}")
                processes.append(program(tree, *words, *more, cwd=folder))
            while _round(folder / "home" / "potluck.db") < 3:
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        with contextlib.closing(sqlite3.connect(folder / "home" / "potluck.db")) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        into.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(into, "w", zipfile.ZIP_LZMA) as archive:
            for path in sorted(folder.rglob("*")):
                place = path.relative_to(folder)
                if path.is_file() and not any(map(place.match, _LEFT_OUT)):
                    archive.write(path, place)


def _round(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT round FROM runs").fetchone()
    return 0 if row is None else row[0]


def main() -> None:
    for commit in sys.argv[1:] or COMMITS:
        make(commit, FOLDER / f"{commit}.zip")
        print(commit, (FOLDER / f"{commit}.zip").stat().st_size)


if __name__ == "__main__":
    main()
