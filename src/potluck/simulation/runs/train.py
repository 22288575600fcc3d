"""Trains a run in a directory that holds its experiment, its rounds and its checkpoint.

    manifest.json            experiment, seed, versions, machine, kernels, commit, checksums
    rounds.jsonl             a line a round, from round 0; never a clock time, but virtual time
    timings.jsonl            the wall time of every round, and what trained it if that was chosen
    checkpoint.safetensors   the server state after some round, and what the clients keep;
                             replaced as a whole
    final.safetensors        the model after the last round, once there is one: the tensors of the
                             module by name, as `load_state_dict` takes them
    per-client.jsonl         what the final model is worth to each client, if that was asked

A line of `rounds.jsonl` follows from the experiment and the seed alone. A run that was killed is
continued from its checkpoint: the lines after it are dropped and made again, the same.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import save

from potluck.algorithms import ServerState
from potluck.algorithms.scaffold import CONTROL
from potluck.config.algorithm_section import build_algorithm
from potluck.config.build import build_data, build_task
from potluck.config.experiment import Experiment, TargetSection
from potluck.core import ConfigError, RunError, Target, Vector
from potluck.core.atomic_files import write_whole
from potluck.core.plain_json import to_json
from potluck.core.validate import as_seed
from potluck.data import FederatedData
from potluck.engine import Task
from potluck.simulation.executors.choose import make_executor
from potluck.simulation.executors.executor import Executor
from potluck.simulation.executors.train_loss import WithTrainLoss
from potluck.simulation.handed import own_states
from potluck.simulation.rounds import ClientStates, Round, handed_out, rounds
from potluck.simulation.runs.directory import disk_errors, locked, read_tensors, whole_lines
from potluck.simulation.runs.run_manifest import difference, make_manifest
from potluck.simulation.runs.state_file import model_file

_LOG = logging.getLogger("potluck")
_CHECKPOINT_SECONDS = 15.0  # between checkpoints, or more: writing them takes a tenth of the time
_OPTIMIZER, _ALGORITHM = "optimizer.", "algorithm."
_CLIENT = "client."


def train(
    experiment: Experiment,
    directory: Path | str,
    *,
    seed: int | None = None,
    data: FederatedData | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Round]:
    """Starts or continues a run in a directory, and yields every round that is new.

    However the caller or the process stops, the same call continues, and the directory ends with
    the same bytes in `rounds.jsonl` and `final.safetensors` as if it had never stopped.

    Args:
        seed: instead of the experiment's.
        data: the partition, if the caller has built it already.
        progress: is called within a round with the number of clients done and of all, by executors
            that count them: "ray".

    Raises:
        RunError: the directory cannot be written, is in use, or holds another experiment.
        AbandonedError, DivergedError, TrainingError: as `rounds`; the checkpoint is then of the
            last good round.
    """
    seed = experiment.run.seed if seed is None else as_seed(seed)
    data = build_data(experiment) if data is None else data
    task = build_task(experiment, data)
    algorithm = build_algorithm(experiment)
    virtual = None
    if experiment.devices is not None:
        from potluck.simulation.virtual_time.from_experiment import build_virtual_time

        virtual = build_virtual_time(experiment, data.num_clients, seed)
    target = _target(experiment, task)
    digest = None if virtual is None else virtual.fleet.digest()
    run = _Run(Path(directory), make_manifest(experiment, seed, task, digest))
    settings = experiment.run
    with locked(run.directory):
        start = run.open()
        if start is not None and (start.number >= settings.rounds or run.has_reached(target)):
            run.finish(task)
            run.close()
            return
        (run.directory / "final.safetensors").unlink(missing_ok=True)
        executor = _executor_of(experiment, task, progress)
        try:
            for round in rounds(
                algorithm,
                task,
                cohort=settings.cohort,
                num_rounds=settings.rounds,
                seed=seed,
                codec=settings.codec or "float32",
                executor=executor,
                evaluate_every=settings.evaluate_every,
                skip_failures=settings.skip_failures,
                resume=start,
                virtual=virtual,
            ):
                run.keep(round)
                yield handed_out(round)  # the checkpoint is made of this one
                if target and round.metrics and target.is_reached(round.metrics[target.metric]):
                    break
            run.finish(task)
        finally:
            executor.close()
            run.close()


def _executor_of(
    experiment: Experiment, task: Task, progress: Callable[[int, int], None] | None
) -> Executor:
    settings = experiment.run
    executor = make_executor(
        settings.executor,
        task,
        settings.workers,
        address=settings.ray_address,
        device=settings.device,
        precision=settings.precision or "float32",
        local=settings.ray_local,
        gpus=settings.ray_gpus,
        progress=progress,
    )
    if settings.evaluate_train is None:
        return executor
    return WithTrainLoss(executor, task, settings.evaluate_train)


class _Position(NamedTuple):
    """The state from which `rounds` resumes a run."""

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
        self._last: _Position | None = None
        self._unsaved = False
        self._due = time.monotonic() + _CHECKPOINT_SECONDS

    def has_reached(self, target: Target | None) -> bool:
        """True if one of the rounds before reached the target."""
        if target is None:
            return False
        lines = whole_lines(self.directory / "rounds.jsonl")
        metrics: list[dict[str, Any]] = [json.loads(line)["metrics"] or {} for line in lines]
        return any(target.is_reached(scores.get(target.metric)) for scores in metrics)

    def open(self) -> _Position | None:
        """Checks the manifest and opens the logs where the checkpoint ends; returns its
        position."""
        path = self.directory / "manifest.json"
        with disk_errors(self.directory):
            if path.exists():
                self._compare(path)
            else:
                write_whole(path, to_json(self._manifest, indent=1).encode() + b"\n")
            start = self._read_checkpoint()
            kept = 0 if start is None else start.number + 1
            log = self.directory / "rounds.jsonl"
            lines = whole_lines(log)
            if len(lines) < kept:
                raise RunError(
                    f"{log} must hold the {kept} rounds before its checkpoint, "
                    f"got {len(lines)}. Remove the directory and start again."
                )
            write_whole(log, "".join(line + "\n" for line in lines[:kept]).encode())
            # Without buffers: what was not written for want of space is not tried again at close.
            self._rounds = FileIO(log, "a")
            self._timings = FileIO(self.directory / "timings.jsonl", "a")
        self._last = start
        return start

    def keep(self, round: Round) -> None:
        """Logs a round, and writes a checkpoint if one is due."""
        self._append(round)
        self._last = _Position(round.number, round.state, round.client_states)
        self._unsaved = True
        if round.number == 0 or time.monotonic() > self._due:
            self._checkpoint(self._last)

    def finish(self, task: Task) -> None:
        """Saves the last round and its model."""
        last = self._last
        assert last is not None
        if self._unsaved:
            self._checkpoint(last)
        content = model_file(
            task, last.state.weights, seed=self._manifest["seed"], round=last.number
        )
        with disk_errors(self.directory):
            write_whole(self.directory / "final.safetensors", content)

    def close(self) -> None:
        """Saves what is not saved yet, and closes the logs."""
        try:
            if self._unsaved and self._last is not None:
                self._checkpoint(self._last)
        finally:
            for file in (self._rounds, self._timings):
                if file is not None:
                    file.close()

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
        was, now = old.get("kernels", self._manifest["kernels"]), self._manifest["kernels"]
        if was != now:
            _LOG.warning(
                "%s began with other compiled code (%s) than it goes on with (%s): its numbers may "
                "differ in their last bits from those of a run that did not stop.",
                self.directory,
                was,
                now,
            )
        if old["experiment"] != self._manifest["experiment"]:  # more rounds, another target
            old["experiment"] = self._manifest["experiment"]
            write_whole(path, to_json(old, indent=1).encode() + b"\n")

    def _read_checkpoint(self) -> _Position | None:
        path = self.directory / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, info = read_tensors(path)
        if (old := f"{_OPTIMIZER}{CONTROL}") in tensors:  # as SCAFFOLD's was written at first
            tensors[f"{_ALGORITHM}{CONTROL}"] = tensors.pop(old)
        optimizer, algorithm = _named(tensors, _OPTIMIZER), _named(tensors, _ALGORITHM)
        state = ServerState(tensors["weights"], optimizer, algorithm)
        clients = {int(number): vector for number, vector in _named(tensors, _CLIENT).items()}
        return _Position(int(info["round"]), state, clients)

    def _append(self, round: Round) -> None:
        summary = {
            "round": round.number,
            "loss": round.loss,
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
        with disk_errors(self.directory):
            for file, content in (
                (self._rounds, summary),
                (self._timings, timing),
            ):
                assert file is not None
                line = to_json(content).encode() + b"\n"
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _checkpoint(self, last: _Position) -> None:
        started = time.monotonic()
        tensors = {"weights": last.state.weights}
        tensors |= {_OPTIMIZER + name: value for name, value in last.state.optimizer.items()}
        tensors |= {_ALGORITHM + name: value for name, value in last.state.algorithm.items()}
        states = own_states(last.client_states)
        tensors |= {f"{_CLIENT}{client}": value for client, value in states.items()}
        content = save(tensors, {"round": str(last.number)})
        assert self._rounds is not None
        with disk_errors(self.directory):
            os.fsync(self._rounds.fileno())  # a checkpoint never runs ahead of its log
            write_whole(self.directory / "checkpoint.safetensors", content)
        now = time.monotonic()
        self._due, self._unsaved = now + max(_CHECKPOINT_SECONDS, 9.0 * (now - started)), False


def _target(experiment: Experiment, task: Task) -> Target | None:
    """Returns the target at which a run stops; None where only its last round ends it.

    Raises:
        ConfigError: the target is of a metric that the run does not have, or is no accuracy.
    """
    run = experiment.run
    known = [*task.metrics, "loss", *(["train_loss"] if run.evaluate_train is not None else [])]
    content = run.target
    try:
        target = Target.read(
            content.model_dump() if isinstance(content, TargetSection) else content, known
        )
    except ValueError as error:
        raise ConfigError(f"run.{error}") from None
    if target is not None and target.metric not in known:
        raise ConfigError(
            f"run.target must be of one of {', '.join(known)}, got "
            f"metric = {target.metric!r}. Take one of these."
        )
    return target if run.stop_at_target else None


def _virtual(round: Round) -> dict[str, Any]:
    """Returns the entries of simulated devices in a line of the log."""
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


def _named(tensors: Mapping[str, Vector], prefix: str) -> dict[str, Vector]:
    """The tensors whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): vector
        for name, vector in tensors.items()
        if name.startswith(prefix)
    }
