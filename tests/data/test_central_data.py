"""A served run whose operator has no client data: a schema, a test file, and the devices' own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from federation import Federation
from potluck import rounds
from potluck.config.experiment import load_experiment
from potluck.config.plan import plan_of, read_plan, write_plan
from potluck.core import ConfigError, DataError
from potluck.data import own_data
from potluck.device import TorchTrainer, check_own, read_own
from potluck.server.evaluator import RunEvaluator, evaluated_on, is_evaluated
from potluck.simulation import build_algorithm, build_data, build_task

HEADER = "age,pressure,color,diagnosis"
EXPERIMENT = """
name = "wards"
[task]
data = "devices"
path = "schema.json"
model = "logistic"
[partition]
kind = "own"
[algorithm]
client_lr = 0.3
[run]
rounds = 2
cohort = 1.0
[server]
population = 2
pace_seconds = 0.1
test = "test.csv"
"""


def table(seed: int, rows: int = 30) -> list[str]:
    draws = np.random.default_rng(seed)
    made = [HEADER]
    for age, pressure in draws.normal(size=(rows, 2)).round(3):
        color = draws.choice(["red", "blue"])
        made.append(f"{age},{pressure},{color},{'ill' if age > 0 else 'well'}")
    return made


def reordered(lines: list[str], order: list[int]) -> list[str]:
    return [",".join(np.array(line.split(","))[order]) for line in lines]


@pytest.fixture
def wards(tmp_path):
    """Two wards' files, a schema made of both, a test file, and the experiment of the operator."""
    (tmp_path / "wards").mkdir()
    for k in range(2):
        (tmp_path / "wards" / f"{k}.csv").write_text("\n".join(table(k)))
    (tmp_path / "test.csv").write_text("\n".join(reordered(table(9, 17), [3, 2, 0, 1])))
    data = own_data.from_folder(
        tmp_path / "wards", target_column="diagnosis", categories="one-hot", scale="standard"
    )
    (tmp_path / "schema.json").write_text(json.dumps(data.schema.to_json()))
    (tmp_path / "wards.toml").write_text(EXPERIMENT)
    return tmp_path


def test_devices_with_columns_in_another_order_train_as_the_simulation_does(wards):
    (wards / "other.csv").write_text("\n".join(reordered(table(1), [2, 3, 1, 0])))
    with Federation.of(wards / "wards.toml") as federation:
        for k, file in enumerate(["wards/0.csv", "other.csv"]):
            trainer = TorchTrainer(lambda schema, file=file: read_own(wards / file, schema=schema))
            federation.join(k, trainer)
        federation.until(lambda: len(federation.service.evaluations(federation.run)) == 3)
        for device in federation.devices:
            device.end()
            assert device.died is None
        served = federation.weights()
        judged = federation.service.evaluations(federation.run)[-1]["metrics"]
    experiment = load_experiment(wards / "wards.toml")
    schema = own_data.read_schema(wards / "schema.json")
    data = own_data.from_folder(wards / "wards", schema=schema)
    data = own_data.with_test_file(data, wards / "test.csv")
    assert data.test.num_examples == 17  # nothing of it is held out
    task = build_task(experiment, data)
    made = rounds(build_algorithm(experiment), task, cohort=1.0, num_rounds=2)
    *_, last = made
    np.testing.assert_allclose(served, last.weights, rtol=0, atol=1e-6)
    assert judged["accuracy"] == pytest.approx(last.metrics["accuracy"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: reordered(lines, [0, 2, 3]), ["pressure"]),
        (lambda lines: [f"{line},1" for line in lines], ["1"]),
        (lambda lines: [*lines, "1,2,green,ill"], ["color", "green", "line 32 "]),
        (lambda lines: [*lines, "1,2,red,dead"], ["'ill'", "'well'", "dead", "line 32 "]),
        (lambda lines: [*lines, "1,,red,ill"], ["pressure", "line 32 "]),
        (lambda lines: [*lines, "1,much,red,ill"], ["pressure", "much"]),
        (lambda lines: lines[:1], ["at least one"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_words(wards, change, words):
    file = wards / "mine.csv"
    file.write_text("\n".join(change(table(3))))
    with pytest.raises(DataError) as refused:
        read_own(file, schema=own_data.read_schema(wards / "schema.json"))
    told = str(refused.value)
    assert all(word in told for word in [*words, "mine.csv", "got"]), told
    assert not any(word in told for word in ("Traceback", "own_data", "from_", "()"))


def test_a_speech_is_data_of_a_device(tmp_path):
    speech = tmp_path / "speech.txt"
    speech.write_text("Friends\nRomans, countrymen, lend me your ears\n")
    check_own(speech)  # its commas make no columns
    speech.write_bytes(b"Fri\xfcends\n")
    with pytest.raises(DataError, match="must be text in UTF-8"):
        check_own(speech)


def test_what_is_no_file_of_data_is_told_before_anybody_is_asked(wards):
    check_own(wards / "wards" / "0.csv")  # text labels are the run's to read
    (wards / "none.npz").write_bytes(b"no archive")
    for file, word in (("none.npz", "none.npz"), ("wards", "got 2"), ("away.csv", "away.csv")):
        with pytest.raises(DataError, match=word):
            check_own(wards / file)
    schema = own_data.read_schema(wards / "schema.json")
    with pytest.raises(DataError, match="column 'diagnosis', got target_column='age'"):
        read_own(wards / "wards" / "0.csv", target_column="age", schema=schema)


def test_a_server_says_what_it_evaluates_on(wards):
    experiment = load_experiment(wards / "wards.toml")
    assert evaluated_on(experiment) == f"on all examples of {wards / 'test.csv'}"
    assert len(RunEvaluator(experiment).begin(()).plan["data"]["features"]) == 3
    (wards / "bare.toml").write_text(EXPERIMENT.replace('test = "test.csv"', "federated_every = 1"))
    bare = load_experiment(wards / "bare.toml")
    assert not is_evaluated(bare)
    assert "nothing here" in evaluated_on(bare)
    assert "the devices' own" in evaluated_on(bare)
    begun = RunEvaluator(bare).begin(())
    assert begun.spec.shapes == ((2, 4), (2,))
    with pytest.raises(ConfigError, match="potluck serve"):
        build_data(bare)
    for override in ("task.path=test.csv", "task.path=away.json"):
        with pytest.raises(DataError, match=r"test\.csv|away\.json"):
            RunEvaluator(load_experiment(wards / "bare.toml", [override])).begin(())
    text = EXPERIMENT.replace('"devices"\npath = "schema.json"', '"digits"')
    (wards / "digits.toml").write_text(text.replace('"own"', '"iid"\nclients = 4'))
    with pytest.raises(ConfigError, match=r"server\.test is for own data"):
        RunEvaluator(load_experiment(wards / "digits.toml")).begin(())


def test_a_schema_that_does_not_fit_into_a_plan_is_refused_at_the_start(wards):
    (wards / "wards.toml").write_text(EXPERIMENT.replace('test = "test.csv"', ""))
    experiment = load_experiment(wards / "wards.toml")
    many = [{"name": f"column {k} {'x' * 150}"} for k in range(2000)]
    schema = {"kind": "regression", "num_classes": 0, "targets": ["y"], "input_shape": [2000]}
    (wards / "schema.json").write_text(json.dumps(schema | {"features": many}))
    with pytest.raises(ConfigError, match="at most 200000 bytes"):
        RunEvaluator(experiment).begin(())


def test_plans_of_built_in_data_have_the_bytes_they_had(tmp_path):
    text = EXPERIMENT.replace('"devices"\npath = "schema.json"', '"digits"')
    text = text.replace('"own"', '"iid"\nclients = 4').replace('test = "test.csv"', "")
    (tmp_path / "digits.toml").write_text(text)
    experiment = load_experiment(tmp_path / "digits.toml")
    plan = write_plan(plan_of(experiment, build_data(experiment)))
    assert set(plan) == {"task", "algorithm", "needs"}
    assert read_plan(plan).data is None


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_whole_numbers_are_quantities_where_the_run_says_so(tmp_path, suffix):
    """A device whose prices happen to be whole, decimals or of one value alone."""
    features = [{"name": "a"}, {"name": "b"}] if suffix == "csv" else []
    shape = {"kind": "regression", "num_classes": 0, "input_shape": [2]}
    schema = shape | ({"targets": ["price"], "features": features} if features else {})
    for number, prices in enumerate(([42, 17, -3], [0, 1, 0], [1.5, 2.0, 7.25], [7, 7, 7])):
        file = tmp_path / f"{number}.{suffix}"
        if suffix == "csv":
            lines = [f"{price},{k},{k + 0.5}" for k, price in enumerate(prices)]
            file.write_text("\n".join(["price,b,a", *lines]))
        else:
            np.savez(file, inputs=np.ones((3, 2), np.float32), targets=np.array(prices))
        data = read_own(file, schema=own_data.Schema.from_json(schema))
        assert (data.kind, data.num_classes) == ("regression", 0)
        targets = np.concatenate([data.train.targets, data.test.targets]).astype(np.float64)
        assert sorted(targets.ravel().tolist()) == sorted(map(float, prices))
