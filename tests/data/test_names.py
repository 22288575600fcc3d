"""Names come from the user's data, and are shown and logged as they are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from potluck import FedAvg, Task, own_data, rounds
from potluck.cli.main import app
from potluck.cli.progress import Bar
from potluck.cli.table_output import show_pairs, show_table
from potluck.core import DivergedError
from potluck.core.formats import markdown, printable
from potluck.simulation import read_run

NAMES = [
    *(
        "[red]",
        "[/]",
        "[bold]b[/bold]",
        "a,b",
        "a|b",
        "x\ny",
        "\x1b[31mred",
        "",
        " ",
        "\u202eabc",
        "ü",
    ),
    *(
        "NA",
        "nan",
        "None",
        "1e5",
        "007",
        "=1+1",
        "' OR 1=1",
        "{0}",
        "%s",
        "a" * 500,
        "\0",
        "\U0001f600",
    ),
]
DIVERGES = "[bold]\x1b[0m\nbreaks[/bold]"


def clients() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6)
    labels = np.array([0, 1, 2, 1, 0])
    return dict.fromkeys(NAMES, (rows, labels)) | {DIVERGES: (rows * 1e30, labels)}


def test_clients_of_any_name_train_and_fail_by_name() -> None:
    data = own_data.from_clients(clients())
    task = Task(model=lambda: nn.Linear(6, 3), data=data)
    assert list(data.clients) == [*NAMES, DIVERGES]
    with pytest.raises(DivergedError) as caught:
        list(rounds(FedAvg(client_lr=10.0), task, cohort=1.0, num_rounds=1))
    assert f"client {DIVERGES!r} (number {len(NAMES)})" in str(caught.value)
    skipping = rounds(FedAvg(client_lr=10.0), task, cohort=1.0, num_rounds=1, skip_failures=True)
    assert [failure.name for failure in list(skipping)[-1].failures] == [DIVERGES]


def test_a_run_of_odd_names_is_shown_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        (name, 3e38 if name == DIVERGES else k / 7, k, f"[{name}]" if k % 2 else "None")
        for name in ("[/]", "x\ny", "\x1b[31mred", "NA", DIVERGES)
        for k in range(6)
    ]
    table = pd.DataFrame(rows, columns=["client", "[a]", "b\x1b", "target"])
    table.to_parquet("t.parquet", index=False)
    Path("e.toml").write_text(
        'name = "e"\n[task]\ndata = "table"\nmodel = "logistic"\npath = "t.parquet"\n'
        '[partition]\nkind = "own"\n[algorithm]\nclient_lr = 10.0\n'
        '[run]\nrounds = 1\ncohort = 1.0\nexecutor = "loop"\n'
    )
    for words in (
        ("data", "describe", "e.toml"),
        ("train", "e.toml"),
        ("train", "e.toml", "--fresh", "--set", "run.skip_failures=true", "--per-client"),
    ):
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == (words == ("train", "e.toml"))
        assert all(line.isprintable() for line in result.output.splitlines()), result.output
        if result.exit_code:
            assert result.output.splitlines()[-1].startswith(
                f"error: client {DIVERGES!r} (number 4)"
            )
    lines = read_run("runs/e/seed-0").rounds
    assert [failure["name"] for line in lines for failure in line["failures"]] == [DIVERGES]


@settings(deadline=None)
@given(st.text(max_size=20))
def test_what_is_printable_is_one_line_and_can_be_told_back(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_cells_with_markup_and_bars_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_table(["name", "value"], [["[red]", "a|b"], ["x\ny", "\x1b[31m"]])
    show_pairs([("[/]", "\u202eabc"), ("x\ny", "1")])
    shown = capsys.readouterr().out
    assert "| [red] | a\\|b |" in shown
    assert "| x\\ny | \\x1b[31m |" in shown
    assert "[/]   \\u202eabc\nx\\ny  1\n" in shown
    assert markdown(["a"], [["b|c"]]).endswith("| b\\|c |\n")


def test_a_metric_of_any_name_is_shown_under_the_bar() -> None:
    task = Task(
        model=lambda: nn.Linear(6, 3),
        data=own_data.from_clients({"a": clients()["NA"]}, num_classes=3),
        metrics={"[/red]": lambda outputs, targets: (outputs.argmax(1) == targets).float()},
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Bar(2, [], console) as shown:
        done = list(rounds(FedAvg(client_lr=0.1), task, num_rounds=2))
        for round in done:
            shown.show(round)
    assert json.dumps(done[-1].metrics)
