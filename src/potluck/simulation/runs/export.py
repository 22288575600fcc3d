"""The model of a run directory, for plain PyTorch."""

from __future__ import annotations

from pathlib import Path

from potluck.config.build import build_data, build_task
from potluck.config.experiment import check_experiment
from potluck.simulation.runs.directory import read_run, read_tensors, read_weights
from potluck.simulation.runs.state_file import is_model_file, model_file


def export_run(directory: Path) -> bytes:
    """The newest model of a run as safetensors, with the names of its module's own tensors.

    Of a finished run that is its `final.safetensors`. The model of another one is made from the
    experiment in its manifest, for which the data must be where they were.

    Raises:
        RunError: the directory is none of a run.
    """
    final = directory / "final.safetensors"
    if final.exists() and is_model_file(read_tensors(final)[1]):
        return final.read_bytes()
    manifest = read_run(directory).manifest
    experiment = check_experiment(dict(manifest["experiment"]), str(directory))
    task = build_task(experiment, build_data(experiment))
    _, about = read_tensors(directory / "checkpoint.safetensors")
    seed, number = int(manifest["seed"]), int(about["round"])
    return model_file(task, read_weights(directory), seed=seed, round=number)
