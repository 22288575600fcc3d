"""A user's own text: what becomes of it, that it comes back, and that a model of it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.config.experiment import check_experiment, load_experiment
from potluck.core import ConfigError, DataError
from potluck.data.describe import describe
from potluck.data.federated import FederatedData
from potluck.data.own_data import from_file, from_text, with_test_file, without_clients
from potluck.data.tables.schema import Schema
from potluck.data.tables.symbols import Symbols
from potluck.simulation import build_data, build_task, train

SPEECHES = {
    "anna": "Fourscore and seven\nyears ago\n\nour fathers\nbrought forth\nhere\n",
    "björn": "Vi ska kämpa på stränderna\nvi ska kämpa\npå fälten\n",
}


def lines_of(data: FederatedData, symbols: Symbols, client: int) -> list[str]:
    parts = (data.client(client), data.client_test(client))
    return sorted("".join(symbols.decode(part.targets) for part in parts).splitlines())


@pytest.mark.parametrize("symbols", ["bytes", "characters"])
@pytest.mark.parametrize("steps", [5, 80])
def test_every_line_comes_back_and_a_fifth_is_held_out(symbols: Any, steps: int) -> None:
    data = from_text(SPEECHES, symbols=symbols, steps=steps)
    assert data.schema is not None
    rules = data.schema.symbols
    assert rules is not None
    for client, text in enumerate(SPEECHES.values()):
        assert lines_of(data, rules, client) == sorted(filter(None, text.split("\n")))
    assert (data.kind, data.padding, data.num_classes) == ("text", rules.padding, rules.size)
    assert data.train.inputs.shape[1] == steps
    assert data.test_offsets is not None
    assert (np.diff(data.test_offsets) > 0).all()
    assert Schema.from_json(data.schema.to_json()) == data.schema
    if symbols == "bytes":
        assert (rules.size, rules.padding) == (258, 257)


@given(lines=st.lists(st.text(max_size=12), max_size=6), steps=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_symbols_give_back_what_they_were_given(lines: list[str], steps: int) -> None:
    clean = [
        "".join(c for c in line if c != "\n" and not "\ud800" <= c < "\ue000") for line in lines
    ]
    whole = "".join(line + "\n" for line in clean)
    for symbols in (Symbols(steps=steps), Symbols.of(clean, steps, None)):
        inputs, targets = symbols.encode(clean)
        assert inputs.shape == targets.shape == (len(inputs), steps)
        assert symbols.decode(targets) == whole
        assert (inputs == symbols.start).sum() == len(clean)
        assert targets.max(initial=0) <= symbols.padding == symbols.size - 1


def test_a_device_has_the_alphabet_of_its_run(tmp_path: Path) -> None:
    data = from_text({"a": "ab\nba\nab", "b": "bb\naa\n"}, symbols="characters", steps=4)
    schema = data.schema
    assert schema is not None
    assert schema.symbols is not None
    assert schema.symbols.alphabet == "\nab\ufffd"
    path = tmp_path / "mine.txt"
    path.write_bytes("ab\r\nax\r\n".encode("utf-16"))  # as Windows writes it
    own = from_file(path, schema=schema)
    assert (own.num_classes, own.padding) == (data.num_classes, data.padding)
    assert lines_of(own, schema.symbols, 0) == ["ab", "a\ufffd"]
    path.write_text("ab")
    assert from_file(path, schema=schema).test.num_examples == 0


def test_a_simulation_over_the_folder_reads_a_file_as_its_device_does(tmp_path: Path) -> None:
    for name, text in SPEECHES.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    data = from_text(tmp_path, symbols="characters", seed=4)
    assert data.clients == ("anna", "björn")
    for client, name in enumerate(data.clients):
        own = from_file(tmp_path / f"{name}.txt", schema=data.schema)
        np.testing.assert_array_equal(own.client(0).targets, data.client(client).targets)
        np.testing.assert_array_equal(own.client_test(0).inputs, data.client_test(client).inputs)


def test_a_table_is_split_by_rows_so_that_a_message_stays_whole(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": ["a"] * 5 + ["b"] * 5, "said": [f"x{k}\ny{k}" for k in range(10)]})
    frame["when"] = 0  # other columns are not read
    frame.to_csv(tmp_path / "chat.csv", index=False)
    for source in (frame, tmp_path / "chat.csv"):
        data = from_text(source, client_column="who", text_column="said", steps=5)
        assert data.sizes.tolist() == [8, 8]
        assert data.schema is not None
        assert data.schema.symbols is not None
        held = data.schema.symbols.decode(data.client_test(0).targets)
        assert held[1] == held[4]
    assert data.schema is not None
    frame[frame.who == "a"].drop(columns="who").to_csv(tmp_path / "a.csv", index=False)
    own = from_file(tmp_path / "a.csv", schema=data.schema)
    np.testing.assert_array_equal(own.train.targets, data.client(0).targets)


def test_a_server_without_text_knows_its_symbols_and_takes_a_test_file_whole(
    tmp_path: Path,
) -> None:
    schema = from_text(SPEECHES, symbols="characters", steps=20).schema
    assert schema is not None
    assert schema.symbols is not None
    (tmp_path / "test.txt").write_text("our fathers\nvi ska\n", encoding="utf-8")
    data = with_test_file(without_clients(schema, name="none"), tmp_path / "test.txt")
    assert (data.padding, data.num_classes) == (schema.symbols.padding, schema.num_classes)
    assert schema.symbols.decode(data.test.targets) == "our fathers\nvi ska\n"
    assert data.test.inputs.dtype == data.train.inputs.dtype == np.int16


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({}, {}, "at least one client, got none"),
        ({"a": "\n\n"}, {}, "client 'a' must have a line of text, got none"),
        ({"a": "one"}, {}, "a line for the test, got none"),
        ({"a": 3}, {}, "the text of client 'a' must be a str or a list of lines, got int"),
        ({"a": b"x"}, {}, "client 'a' must be a str .*, got bytes. Decode it"),
        ({"a": "x\ny"}, {"split": "time:t"}, "split by lines or rows, got split='time:t'"),
        (pd.DataFrame({"client": ["a"], "text": [1]}), {}, "got 1 in column 'text', row 0 of"),
        (pd.DataFrame({"client": ["a"], "text": [None]}), {}, "a text, got none in column 'text'"),
        (pd.DataFrame({"client": ["a"], "body": ["x"]}), {}, "must have one column 'text'"),
    ],
)
def test_text_that_cannot_be_used_is_named(source: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_text(source, **options)


def test_a_folder_of_text_holds_text_files_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a \.txt file for each client, got no files"):
        from_text(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\x00\xff\x01\x02")
    with pytest.raises(DataError, match=r"a\.txt must be"):
        from_text(tmp_path)
    (tmp_path / "b.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"only \.txt files, got b\.csv"):
        from_text(tmp_path)


def test_an_experiment_trains_a_character_model_on_a_folder_of_text(tmp_path: Path) -> None:
    (tmp_path / "speeches").mkdir()
    for name, text in SPEECHES.items():
        (tmp_path / "speeches" / f"{name}.txt").write_text(text * 3, encoding="utf-8")
    toml = (
        'name = "speeches"\n[task]\ndata = "text"\npath = "speeches"\nmodel = "char-lstm"\n'
        'hidden = 4\nsymbols = "characters"\nsteps = 20\n[partition]\nkind = "own"\n'
        '[algorithm]\nclient_lr = 0.1\n[run]\nrounds = 1\ncohort = 1.0\nexecutor = "loop"\n'
    )
    (tmp_path / "e.toml").write_text(toml)
    experiment = load_experiment(tmp_path / "e.toml")
    data = build_data(experiment)
    rows = dict(describe(data).rows())
    assert rows["input"] == "20 int16"
    assert rows["training characters"] != "0"
    *_, last = train(experiment, tmp_path / "run")
    assert np.isfinite(last.weights).all()
    with pytest.raises(ConfigError, match="must be one of 'char-lstm'"):
        build_task(load_experiment(tmp_path / "e.toml", ["task.model=2nn"]), data)
    content: dict[str, Any] = experiment.model_dump(exclude_unset=True)
    content["task"] |= {"data": "folder", "model": "2nn", "hidden": None}
    with pytest.raises(ConfigError, match=r"task\.symbols must be left out unless task.data is 't"):
        build_data(check_experiment(content, "here"))


def test_a_devices_table_of_text_may_hold_numbers_alone(tmp_path: Path) -> None:
    table = pd.DataFrame({"client": list("aabb"), "text": ["12", "007", "see you", "at 7"]})
    schema = from_text(table, symbols="characters", steps=5).schema
    path = tmp_path / "mine.csv"
    path.write_text("text\n007\n12\n007\n")
    data = from_file(path, schema=schema)
    assert data.train.num_examples == 2
