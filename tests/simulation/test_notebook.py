"""What a notebook shows of an object, and what `--per-client` prints and keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from potluck import (
    FedAvg,
    LogisticRegression,
    Loop,
    Task,
    datasets,
    federated_evaluation,
    partitions,
    rounds,
)
from potluck.cli.main import app
from potluck.simulation import RoundWork, read_run
from potluck.simulation.runs.cost import measure

EXPERIMENT = """
name = "e"
[task]
data = "folder"
model = "logistic"
path = "data"
[partition]
kind = "own"
[algorithm]
client_lr = 0.1
[run]
rounds = 2
cohort = 1.0
executor = "loop"
"""


def model():
    return LogisticRegression(input_shape=(1, 8, 8))


def test_what_is_shown_of_an_object_has_at_most_three_lines():
    data = partitions.iid(datasets.digits(), clients=100, seed=0)
    task = Task(model=model, data=data)
    executor = Loop(task)
    seen = list(rounds(FedAvg(client_lr=0.1), task, cohort=3, num_rounds=1, executor=executor))
    shown = [
        data,
        datasets.digits(),
        data.train,
        task,
        *seen,
        executor,
        federated_evaluation(task, seen[-1].weights)["accuracy"],
    ]
    received = task.initial_weights(0)
    shown.append(
        executor.train(RoundWork(FedAvg(client_lr=0.1), received, np.arange(2), seed=0, round=1))
    )
    for thing in shown:
        assert len(repr(thing)) <= 400
        assert repr(thing).count("\n") <= 2
        assert "array(" not in repr(thing)
    assert repr(task).startswith("Task(model=model, data=('digits', 100 clients, classes)")
    assert repr(seen[0]).startswith("Round 0: loss 2.")
    assert "3 clients" in repr(seen[1])


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run over four clients of unequal size, one of them named as terminals do not like."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for k, name in enumerate(["north", "south", "[red]", "a,b"]):
        inputs = generator.standard_normal((10 + 10 * k, 4)).astype(np.float32)
        np.savez(tmp_path / "data" / f"{name}.npz", inputs=inputs, targets=inputs[:, 0] > 0)
    (tmp_path / "e.toml").write_text(EXPERIMENT)
    return CliRunner().invoke(app, ["train", "e.toml", "--per-client"])


def test_every_client_is_printed_and_kept(trained, tmp_path):
    assert trained.exit_code == 0, trained.output
    lines = (tmp_path / "runs/e/seed-0/per-client.jsonl").read_text().splitlines()
    kept = {row["client"]: row for row in map(json.loads, lines)}
    assert set(kept) == {"north", "south", "[red]", "a,b"}
    for name, row in kept.items():
        assert row["train_examples"] + row["judged_examples"] in (10, 20, 30, 40)
        assert f"| {name} | {row['train_examples']} | {row['judged_examples']} |" in trained.stdout
        assert 0.0 <= row["accuracy"] <= 1.0
    weighted = sum(r["accuracy"] * r["judged_examples"] for r in kept.values())
    weighted /= sum(r["judged_examples"] for r in kept.values())
    record = read_run(tmp_path / "runs/e/seed-0")
    assert weighted == pytest.approx(record.rounds[-1]["metrics"]["accuracy"])
    for thing in (record, measure(record)):
        assert len(repr(thing).splitlines()) == 1


def test_a_run_that_starts_afresh_keeps_no_older_clients(trained, tmp_path):
    assert CliRunner().invoke(app, ["train", "e.toml", "--fresh"]).exit_code == 0
    assert not (tmp_path / "runs/e/seed-0/per-client.jsonl").exists()
