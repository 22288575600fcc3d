"""A run is a directory: what was asked, what every round gave, and where to go on.

    manifest.json            experiment, seed, versions, machine, commit, checksums
    rounds.jsonl             a line a round, from round 0; never a clock time, but virtual time
    timings.jsonl            the wall time of every round, and what trained it if that was chosen
    checkpoint.safetensors   the server state after some round, and what the clients keep;
                             replaced as a whole
    final.safetensors        the weights after the last round, once there is one

A line of `rounds.jsonl` follows from the experiment and the seed alone. A run that was killed is
continued from its checkpoint: the lines after it are dropped and made again, the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from potluck.algorithms import Algorithm, ServerState
from potluck.core import RunError, Vector
from potluck.core.validate import as_seed
from potluck.experiment import Experiment
from potluck.simulation.build import build_algorithm, build_data, build_task, build_virtual_time
from potluck.simulation.manifest import difference, make_manifest
from potluck.simulation.rounds import ClientStates, Round, make_executor, rounds
from potluck.simulation.train_loss import WithTrainLoss
from potluck.simulation.virtual import VirtualTime
from potluck.tasks import FederatedData, Task

_CHECKPOINT_SECONDS = 15.0  # between checkpoints, or more: writing them takes a tenth of the time
_OPTIMIZER = "optimizer."
_CLIENT = "client."
_FILES = (
    "manifest.json",
    "rounds.jsonl",
    "timings.jsonl",
    "checkpoint.safetensors",
    "final.safetensors",
    "partition.png",  # drawn by the command line
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run directory as read: for reports."""

    directory: Path
    manifest: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    seconds: list[float]  # of every round; of the latest attempt where one was repeated
    is_finished: bool


def train(
    experiment: Experiment,
    directory: Path | str,
    *,
    seed: int | None = None,
    data: FederatedData | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Round]:
    """Start or continue a run in a directory, and yield every round that is new.

    However the caller or the process stops, the same call continues, and the directory ends with
    the same bytes in `rounds.jsonl` and `final.safetensors` as if it had never stopped.

    Args:
        seed: instead of the experiment's.
        data: the partition, if the caller has built it already.
        progress: is told, within a round, how many clients are done and of how many, by the
            executors that know: "ray".

    Raises:
        RunError: the directory cannot be written, is in use, or holds another experiment.
        AbandonedError, DivergedError, TrainingError: as `rounds`; the checkpoint is then of the
            last good round.
    """
    seed = experiment.run.seed if seed is None else as_seed(seed)
    data = build_data(experiment) if data is None else data
    task = build_task(experiment, data)
    algorithm = build_algorithm(experiment)
    virtual = build_virtual_time(experiment, data.num_clients, seed)
    digest = None if virtual is None else virtual.fleet.digest()
    run = _Run(Path(directory), make_manifest(experiment, seed, task, digest))
    with _locked(run.directory):
        yield from run.train(experiment, algorithm, task, seed, virtual, progress)


def read_run(directory: Path | str) -> RunRecord:
    """Read a run directory, finished or not.

    Raises:
        RunError: it is none.
    """
    path = Path(directory)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        lines = [json.loads(line) for line in _whole_lines(path / "rounds.jsonl")]
        timings = [json.loads(line) for line in _whole_lines(path / "timings.jsonl")]
    except (OSError, ValueError) as error:
        raise RunError(
            f"a run directory must hold manifest.json and rounds.jsonl, got {str(path)!r} "
            f"({error}). Name a directory that `potluck train` made."
        ) from None
    seconds = {int(t["round"]): float(t["seconds"]) for t in timings}
    return RunRecord(
        directory=path,
        manifest=manifest,
        rounds=lines,
        seconds=[seconds.get(int(line["round"]), 0.0) for line in lines],
        is_finished=(path / "final.safetensors").exists(),
    )


def read_weights(directory: Path | str) -> Vector:
    """The final weights of a finished run, or those of its checkpoint: [dim]."""
    path = Path(directory)
    final = path / "final.safetensors"
    tensors, _ = _read_tensors(final if final.exists() else path / "checkpoint.safetensors")
    return tensors["weights"]


def discard_run(directory: Path | str) -> None:
    """Remove the files of a run, and nothing else, so that it can be started again.

    Raises:
        RunError: another process is writing it.
    """
    path = Path(directory)
    if (path / "manifest.json").exists():
        with _locked(path), _disk_errors(path):
            for name in _FILES:
                (path / name).unlink(missing_ok=True)


class _Position(NamedTuple):
    """Where a run goes on: what `rounds` resumes from."""

    number: int
    state: ServerState
    client_states: ClientStates


class _Run:
    """An open run directory: the one writer of its files."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self._manifest = manifest
        self._rounds: FileIO | None = None
        self._timings: FileIO | None = None

    def train(
        self,
        experiment: Experiment,
        algorithm: Algorithm,
        task: Task,
        seed: int,
        virtual: VirtualTime | None,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Round]:
        run = experiment.run
        start = self._open()
        best = self._best_so_far()
        if start is not None and (start.number >= run.rounds or self._reached(run, best)):
            self._finish(start)
            self._close()
            return
        (self.directory / "final.safetensors").unlink(missing_ok=True)
        executor = make_executor(
            run.executor,
            task,
            run.workers,
            address=run.ray_address,
            device=run.device,
            precision=run.precision or "float32",
            local=run.ray_local,
            gpus=run.ray_gpus,
            progress=progress,
        )
        if run.evaluate_train is not None:
            executor = WithTrainLoss(executor, task, run.evaluate_train)
        last: _Position | None = start
        due = time.monotonic() + _CHECKPOINT_SECONDS
        unsaved = False
        try:
            for round in rounds(
                algorithm,
                task,
                cohort=run.cohort,
                num_rounds=run.rounds,
                seed=seed,
                codec=run.codec or "float32",
                executor=executor,
                evaluate_every=run.evaluate_every,
                skip_failures=run.skip_failures,
                resume=start,
                virtual=virtual,
            ):
                self._append(round)
                last = _Position(round.number, round.state, round.client_states)
                unsaved = True
                if round.number == 0 or time.monotonic() > due:
                    due = self._checkpoint(last)
                    unsaved = False
                yield round
                best = max(best, (round.metrics or {}).get("accuracy", 0.0))
                if self._reached(run, best):
                    break
            assert last is not None
            self._checkpoint(last)
            unsaved = False
            self._finish(last)
        finally:
            executor.close()
            try:
                if unsaved and last is not None:
                    self._checkpoint(last)
            finally:
                self._close()

    @staticmethod
    def _reached(run: Any, best: float) -> bool:
        return run.stop_at_target and run.target is not None and best >= run.target

    def _best_so_far(self) -> float:
        lines = _whole_lines(self.directory / "rounds.jsonl")
        metrics: list[dict[str, float]] = [json.loads(line)["metrics"] or {} for line in lines]
        return max([m.get("accuracy", 0.0) for m in metrics], default=0.0)

    def _open(self) -> _Position | None:
        """Check the manifest and open the logs where the checkpoint ends."""
        path = self.directory / "manifest.json"
        with _disk_errors(self.directory):
            if path.exists():
                self._compare(path)
            else:
                _write_whole(path, json.dumps(self._manifest, indent=1).encode() + b"\n")
            start = self._read_checkpoint()
            kept = 0 if start is None else start.number + 1
            log = self.directory / "rounds.jsonl"
            lines = _whole_lines(log)
            if len(lines) < kept:
                raise RunError(
                    f"{log} must hold the {kept} rounds before its checkpoint, "
                    f"got {len(lines)}. Remove the directory and start again."
                )
            _write_whole(log, "".join(line + "\n" for line in lines[:kept]).encode())
            # Without buffers: what was not written for want of space is not tried again at close.
            self._rounds = FileIO(log, "a")
            self._timings = FileIO(self.directory / "timings.jsonl", "a")
        return start

    def _compare(self, path: Path) -> None:
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is not readable: {error}. Remove the directory.") from None
        found = difference(old, self._manifest)
        if found is not None:
            name, was, now = found
            raise RunError(
                f"{self.directory} holds another run: {name} was {was!r} there and is {now!r} "
                "here. Name another directory (--out), give the experiment another name, or start "
                "again (--fresh)."
            )
        if old["experiment"] != self._manifest["experiment"]:  # more rounds, another target
            old["experiment"] = self._manifest["experiment"]
            _write_whole(path, json.dumps(old, indent=1).encode() + b"\n")

    def _read_checkpoint(self) -> _Position | None:
        path = self.directory / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, info = _read_tensors(path)
        state = ServerState(tensors["weights"], _named(tensors, _OPTIMIZER))
        clients = {int(number): vector for number, vector in _named(tensors, _CLIENT).items()}
        return _Position(int(info["round"]), state, clients)

    def _append(self, round: Round) -> None:
        summary = {
            "round": round.number,
            "loss": round.loss if math.isfinite(round.loss) else None,  # JSON has no NaN
            "metrics": round.metrics,
            "num_clients": len(round.cohort),
            "num_examples": round.num_examples,
            "uplink_bytes": round.uplink_bytes,
            "downlink_bytes": round.downlink_bytes,
            "failures": [failure._asdict() for failure in round.failures],
        }
        if self._manifest["devices_digest"] is not None:
            summary |= _virtual(round)
        timing: dict[str, Any] = {"round": round.number, "seconds": round.seconds}
        if round.executor:
            timing["executor"] = round.executor
        with _disk_errors(self.directory):
            for file, content in (
                (self._rounds, summary),
                (self._timings, timing),
            ):
                assert file is not None
                line = json.dumps(content).encode() + b"\n"
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _checkpoint(self, last: _Position) -> float:
        """Save, and tell when to save again."""
        started = time.monotonic()
        tensors = {"weights": last.state.weights}
        tensors |= {_OPTIMIZER + name: value for name, value in last.state.optimizer.items()}
        tensors |= {f"{_CLIENT}{client}": value for client, value in last.client_states.items()}
        content = save(tensors, {"round": str(last.number)})
        assert self._rounds is not None
        with _disk_errors(self.directory):
            os.fsync(self._rounds.fileno())  # a checkpoint never runs ahead of its log
            _write_whole(self.directory / "checkpoint.safetensors", content)
        now = time.monotonic()
        return now + max(_CHECKPOINT_SECONDS, 9.0 * (now - started))

    def _finish(self, last: _Position) -> None:
        content = save({"weights": last.state.weights}, {"round": str(last.number)})
        with _disk_errors(self.directory):
            _write_whole(self.directory / "final.safetensors", content)

    def _close(self) -> None:
        for file in (self._rounds, self._timings):
            if file is not None:
                file.close()


def _virtual(round: Round) -> dict[str, Any]:
    """What simulated devices add to a line of the log."""
    timing = round.virtual
    if timing is None:  # the initial model
        return {"virtual_seconds": 0.0}
    return {
        "virtual_seconds": timing.seconds,
        "assigned": timing.assigned,
        "accepted": len(timing.accepted),
        "dropped": timing.dropped,
        "late": timing.late,
        "abandoned": timing.abandoned,
    }


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a log; a last line cut short by a kill is not one."""
    if not path.exists():
        return []
    return path.read_text().split("\n")[:-1]


def _named(tensors: Mapping[str, Vector], prefix: str) -> dict[str, Vector]:
    """The tensors whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): vector
        for name, vector in tensors.items()
        if name.startswith(prefix)
    }


def _read_tensors(path: Path) -> tuple[dict[str, Vector], dict[str, str]]:
    try:
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            tensors: dict[str, Vector] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} must be a safetensors file: {error}. Remove it.") from None


def _write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader or a crash sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Hold a run directory for this process alone."""
    with _disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"a run directory must have one writer, got {str(directory)!r} in use. "
                "Wait for the other process, or name another directory (--out)."
            ) from None
        yield


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Generator[None]:
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
