"""The files of a run directory: read, replaced as a whole, and held by one writer."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from potluck.core import RunError, Vector
from potluck.core.atomic_files import lock_file

PER_CLIENT = "per-client.jsonl"
_FILES = (
    "manifest.json",
    "rounds.jsonl",
    "timings.jsonl",
    "checkpoint.safetensors",
    "final.safetensors",
    "partition.png",  # drawn by the command line
    PER_CLIENT,
)


_OF_A_LINE = ("round", "loss", "metrics", "uplink_bytes", "downlink_bytes", "failures")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The content of a run directory, for reports."""

    directory: Path
    manifest: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    seconds: list[float]  # of every round; of the latest attempt where one was repeated
    is_finished: bool

    def __repr__(self) -> str:
        state = "finished" if self.is_finished else "unfinished"
        return f"RunRecord({str(self.directory)!r}: {len(self.rounds)} rounds, {state})"


def read_run(directory: Path | str) -> RunRecord:
    """Reads a run directory, finished or not.

    Raises:
        RunError: it is none.
    """
    path = Path(directory)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        lines = [json.loads(line) for line in whole_lines(path / "rounds.jsonl")]
        timings = [json.loads(line) for line in whole_lines(path / "timings.jsonl")]
        missing = [key for key in ("name", "seed", "experiment") if key not in manifest]
        missing += [key for line in lines[:1] for key in _OF_A_LINE if key not in line]
        if missing or "run" not in manifest["experiment"]:
            raise ValueError(f"without {', '.join(missing) or 'experiment.run'}")
        seconds = {int(t["round"]): float(t["seconds"]) for t in timings}
    except OSError as error:
        raise _no_run(path, str(error.strerror)) from None
    except (ValueError, TypeError, KeyError) as error:
        is_json = isinstance(error, json.JSONDecodeError)
        raise _no_run(path, f"damaged: {error}" if is_json else "damaged") from None
    return RunRecord(
        directory=path,
        manifest=manifest,
        rounds=lines,
        seconds=[seconds.get(int(line["round"]), 0.0) for line in lines],
        is_finished=(path / "final.safetensors").exists(),
    )


def _no_run(path: Path, reason: str) -> RunError:
    return RunError(
        f"a run directory must hold manifest.json and rounds.jsonl, got {str(path)!r} ({reason}). "
        "Name a directory that `potluck train` made, or start again (--fresh)."
    )


def read_weights(directory: Path | str) -> Vector:
    """The weights after the last round that was kept: [dim]."""
    path = Path(directory)
    checkpoint = path / "checkpoint.safetensors"
    older = path / "final.safetensors"  # was flat too before it had the names of a module's tensors
    tensors, _ = read_tensors(checkpoint if checkpoint.exists() else older)
    if "weights" not in tensors or tensors["weights"].ndim != 1:
        raise RunError(
            f"a run directory must hold checkpoint.safetensors, got {str(path)!r} without it. "
            "Copy it too, or load final.safetensors into the model."
        )
    return tensors["weights"]


def discard_run(directory: Path | str) -> None:
    """Removes the files of a run, and nothing else, so that it can be started again.

    Raises:
        RunError: another process is writing it.
    """
    path = Path(directory)
    if (path / "manifest.json").exists():
        with locked(path), disk_errors(path):
            for name in _FILES:
                (path / name).unlink(missing_ok=True)


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a log; a last line cut short by a kill is not one."""
    if not path.exists():
        return []
    return path.read_text().split("\n")[:-1]


def read_tensors(path: Path) -> tuple[dict[str, Vector], dict[str, str]]:
    try:
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            tensors: dict[str, Vector] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} must be a safetensors file: {error}. Remove it.") from None


@contextlib.contextmanager
def locked(directory: Path) -> Generator[None]:
    """Locks a run directory for this process."""
    told = (
        f"a run directory must have one writer, got {str(directory)!r} in use. "
        "Wait for the other process, or name another directory (--out)."
    )
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_file(directory / ".lock", told, 0o666)
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def disk_errors(directory: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunError(
                f"a run directory must be writable, got no space left in {str(directory)!r}. "
                "Make room, then run the same command: it continues from the last checkpoint."
            ) from None
        raise RunError(
            f"a run directory must be writable, got {error.strerror!r} in {str(directory)!r}. "
            "Name another directory (--out), or change its permissions."
        ) from None
