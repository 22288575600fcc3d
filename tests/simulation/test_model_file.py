"""The model comes home: files that plain PyTorch loads, and that are as good as the run was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn
from typer.testing import CliRunner

from potluck import FedAvg, Task, TwoNN, datasets, evaluate, partitions, rounds
from potluck.cli.main import app
from potluck.config.experiment import check_experiment
from potluck.simulation import read_run, read_weights, train
from potluck.simulation.runs.state_file import model_file

DATA = partitions.iid(datasets.digits(), clients=5, seed=0)


class Normed(nn.Module):
    """Batch normalization, a counter, a constant mask, a tied weight and half a precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 10)
        self.twin = nn.Linear(32, 32)
        self.twin.weight = nn.Parameter(torch.eye(32))
        self.other = self.twin
        self.register_buffer("mask", torch.arange(32) % 2 == 0)
        self.register_buffer("halved", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, inputs):
        hidden = self.norm(self.first(inputs.flatten(1))).relu()
        return self.last(self.other(self.twin(hidden * self.mask)))


def accuracy_in_plain_pytorch(module):
    inputs = torch.from_numpy(np.array(DATA.test.inputs))
    targets = torch.from_numpy(np.array(DATA.test.targets))
    with torch.no_grad():
        return float((module.eval()(inputs).argmax(1) == targets).float().mean())


def test_a_model_with_batch_normalization_is_loaded_strictly_and_judged_the_same():
    task = Task(model=Normed, data=DATA)
    *_, last = rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=3)
    assert accuracy_in_plain_pytorch(task.module(last.weights)) == pytest.approx(
        last.metrics["accuracy"], abs=1e-6
    )
    module = Normed()
    module.load_state_dict(load(model_file(task, last.weights, seed=0, round=3)), strict=True)
    assert accuracy_in_plain_pytorch(module) == pytest.approx(last.metrics["accuracy"], abs=1e-6)
    assert last.metrics["accuracy"] > 0.5
    assert evaluate(task, last.weights)["accuracy"] == pytest.approx(last.metrics["accuracy"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three rounds."""
    content = {
        "name": "e",
        "task": {"data": "digits", "model": "2nn"},
        "partition": {"kind": "iid", "clients": 5},
        "algorithm": {"client_lr": 0.1},
        "run": {"rounds": 3, "cohort": 1.0, "executor": "loop"},
    }
    directory = tmp_path_factory.mktemp("runs") / "e" / "seed-0"
    list(train(check_experiment(content, "test"), directory))
    return directory


def same_as_the_run(path, run):
    module = TwoNN(input_shape=(1, 8, 8))
    assert str(module.load_state_dict(load_file(path))) == "<All keys matched successfully>"
    final = read_run(run).rounds[-1]["metrics"]["accuracy"]
    assert accuracy_in_plain_pytorch(module) == pytest.approx(final, abs=1e-6)
    flat = torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()
    return np.array_equal(flat, read_weights(run))


def test_the_final_file_of_a_run_is_a_state_dict(run):
    assert same_as_the_run(run / "final.safetensors", run)


def test_a_run_is_exported_by_its_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["export", str(run)]).exit_code == 0
    assert same_as_the_run(tmp_path / "model.safetensors", run)
    assert CliRunner().invoke(app, ["export", str(run), "--to", "x.safetensors"]).exit_code == 0
    assert same_as_the_run(tmp_path / "x.safetensors", run)


def test_a_run_that_goes_on_is_exported_from_its_checkpoint(run, tmp_path):
    before = (run / "final.safetensors").read_bytes()
    (run / "final.safetensors").unlink()
    try:
        out = tmp_path / "model.safetensors"
        assert CliRunner().invoke(app, ["export", str(run), "--to", str(out)]).exit_code == 0
        assert same_as_the_run(out, run)
    finally:
        (run / "final.safetensors").write_bytes(before)


def test_what_is_no_run_is_refused_with_the_runs_below_it(run, tmp_path):
    for words, message in (
        ([run.parent], f"Name one of these: {run}"),
        ([tmp_path], "must be a run directory or a server's folder"),
        ([tmp_path / "nothing"], "must be a run directory or a server's folder"),
        ([run, "--version", "1"], "--version must be left out"),
        ([run, "--to", tmp_path], "Is a directory"),
    ):
        result = CliRunner().invoke(app, ["export", *map(str, words)])
        assert result.exit_code == 1
        assert message in result.stderr.replace("\n", " ")
        assert len(result.stderr.splitlines()) == 1
