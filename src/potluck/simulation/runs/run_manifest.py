"""The manifest of a run: its experiment, data, code and machine."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import potluck
from potluck.config.experiment import Experiment
from potluck.engine import Task, spec_of
from potluck.engine.devices import device_of
from potluck.engine.native.kernels import kernels_of

# What may differ between the run that was started and the one that continues it.
_FREE = (
    "task.path",  # the data are known by their content: `data_digest`
    "devices.trace",  # likewise: `devices_digest`
    "run.rounds",
    "run.executor",
    "run.workers",
    "run.device",
    "run.ray_address",
    "run.ray_local",
    "run.ray_gpus",
    "run.stop_at_target",
    "run.target",
    "run.seed",
)


def make_manifest(
    experiment: Experiment, seed: int, task: Task, devices_digest: str | None = None
) -> dict[str, Any]:
    """The manifest of a run that starts now."""
    module = task.module()
    spec = spec_of(module)
    return {
        "name": experiment.name,
        "experiment": experiment.model_dump(mode="json"),
        "seed": seed,
        "num_clients": task.data.num_clients,
        "dim": spec.dim,
        "spec_digest": spec.digest(),
        "data_digest": task.data.digest(),
        "kind": task.data.kind,
        "classes": None if task.data.classes is None else list(task.data.classes),
        "schema": None if task.data.schema is None else task.data.schema.to_json(),
        "devices_digest": devices_digest,
        "data_checksums": dict(task.data.checksums),
        "versions": {
            "potluck": potluck.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": metadata.version("torch"),
        },
        "machine": machine() + _gpu(experiment.run.device),
        "kernels": kernels_of(module) if experiment.run.device is None else "none",
        "commit": commit(),
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first thing that makes two manifests different runs: name, old and new value."""
    for key in ("experiment", "seed", "data_digest", "spec_digest", "devices_digest"):
        found = _difference(key, old.get(key), new[key])
        if found is not None:
            return found
    return None


def machine() -> str:
    """The processor, its cores and the system."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {sys.platform}"


def _gpu(device: str | None) -> str:
    """Returns the name of the GPU to add to the machine of a run that uses one."""
    there = None if device is None else device_of(device)
    if there is None or there.type == "cpu":
        return ""
    return f", {torch.cuda.get_device_name(there)}"


def commit() -> str | None:
    """The commit of the source tree, with a + if it has changes; None outside one.

    Of a tree that was copied without its history, the environment variable POTLUCK_COMMIT says it.
    """
    if "POTLUCK_COMMIT" in os.environ:
        return os.environ["POTLUCK_COMMIT"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return described.stdout.strip()
    return None


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        for key in [*after, *(key for key in before if key not in after)]:
            inner = f"{name}.{key}".removeprefix("experiment.")
            found = None if inner in _FREE else _difference(inner, before.get(key), after.get(key))
            if found is not None:
                return found
        return None
    return None if old == new else (name, cast("Any", old), new)
