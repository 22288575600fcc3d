"""A user's mistake on the command line is one line: expected, got, and what to do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from potluck.cli import main
from potluck.cli.options import command

EXPERIMENT = """
name = "e"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 5
[algorithm]
client_lr = 0.1
[run]
rounds = 1
cohort = 0.2
executor = "loop"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an experiment, a run of it, an empty folder, and files that are none."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "e.toml").write_text(EXPERIMENT)
    (folder / "folder").mkdir()
    (folder / "bytes.toml").write_bytes(b"name = '\xe9'\n")
    (folder / "random").write_bytes(bytes(range(256)))
    (folder / "empty").write_text("")
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert CliRunner().invoke(main.app, ["train", "e.toml"]).exit_code == 0
        yield folder
    finally:
        os.chdir(here)


MISTAKES = [
    ("train nothing.toml", "must be a readable file"),
    ("train folder", "Is a directory"),
    ("train bytes.toml", "UTF-8"),
    ("train random", "text"),
    ("train empty", "name is missing"),
    ("train e.toml --set run.rounds", "must look like run.rounds=20"),
    ("train e.toml --set run.rounds.x=1", "must be a table"),
    ("train e.toml --set run.rounds=many", "must be an integer"),
    ("train e.toml --set name=../x", "letters, digits"),
    ("train e.toml --set run.target=97 --out other", "write 0.97"),
    ("train e.toml --set run.target.at_most=1.0", "run.target.metric is missing"),
    ("train e.toml --set algorithm.client_lr=inf", "finite"),
    ("train e.toml --set task.model=2nn", "holds another run"),
    ("train e.toml --out e.toml", "Not a directory"),
    ("train e.toml --out /proc/nothing", "must be writable"),
    ("report nothing", "must be a run directory"),
    ("report folder", "must be a run directory"),
    ("report e.toml", "must be a run directory"),
    ("report runs --metric f1", "must be one of accuracy, loss"),
    ("report runs --target 97", "write 0.97"),
    ("report runs --metric loss --target nan", "finite"),
    ("report runs --x hours --out c", "simulated devices"),
    ("report runs --out /proc/nothing/c", "must exist"),
    ("report runs --out e.toml/c", "a folder must be named, and no file"),
    ("report runs --out .", "--out must name files"),
    ("init e.toml", "must not exist yet"),
    ("init folder --force", "a file must be named"),
    ("init /proc/nothing.toml", "must exist"),
    ("data get nothing", "must be one of"),
    ("data describe nothing.toml", "must be a readable file"),
    ("data describe e.toml --out picture.xyz", ".png, .svg or .pdf"),
    ("data describe e.toml --out folder", ".png, .svg or .pdf"),
    ("data describe e.toml --out /proc/x.png", "must exist"),
    ("demo --out e.toml", "must be writable"),
    ("reproduce table9", "must be one of"),
    ("reproduce table4 --rates 2", "odd number"),
    ("reproduce table4 --cells nothing", "must match one of"),
    ("export folder", "must be a run directory"),
    ("export runs/e/seed-0 --to folder", "a file must be named"),
    ("export runs", "Name one of these: runs/e/seed-0"),
    ("status", "server must be running"),
    ("status --home e.toml", "server must be running"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(place, line, words):
    result = CliRunner().invoke(main.app, line.split(), prog_name="potluck")
    assert result.exit_code == 1, result.output
    (told,) = result.stderr.splitlines()
    assert told.startswith("error: ")
    assert words in told
    assert "Traceback" not in result.output
    assert told.endswith((".", "table2", "--debug"))


@pytest.mark.parametrize("file", ["manifest.json", "rounds.jsonl", "timings.jsonl"])
@pytest.mark.parametrize("content", [b"", b"null\n", b"{}\n", b"\xff\xfe\n", b'{"round": "x"}\n'])
def test_a_damaged_run_is_told_in_one_line_or_read(place, tmp_path, file, content):
    run = tmp_path / "runs" / "e" / "seed-0"
    run.mkdir(parents=True)
    for path in (place / "runs" / "e" / "seed-0").iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    (run / file).write_bytes(content)
    for words in (["report", str(tmp_path)], ["train", "e.toml", "--out", str(tmp_path / "runs")]):
        result = CliRunner().invoke(main.app, words)
        assert result.exit_code in (0, 1)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert len(result.stderr.splitlines()) <= 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "room on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Change its permissions"),
        (OSError(errno.EIO, "Input/output error"), "got 'Input/output error'"),
        (MemoryError(), "smaller cohort"),
        (KeyError("x"), "KeyError: 'x'. This was not expected to happen. --debug shows"),
        (RecursionError("too deep"), "RecursionError: too deep."),
    ],
    ids=str,
)
def test_what_nobody_thought_of_is_one_line_too_and_a_traceback_for_who_asks(error, words):
    app = typer.Typer()

    @app.command()
    @command
    def fail(debug: bool = False) -> None:
        raise error

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert CliRunner().invoke(app, ["--debug"]).exception is error


def potluck(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "potluck", *words], capture_output=True, text=True, **options
    )


def test_an_encoding_without_the_signs_of_a_table_stops_no_report(place):
    done = potluck("report", "runs", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "no target" in done.stdout


@pytest.mark.parametrize("line", ["potluck report runs", "potluck data list", "potluck --help"])
def test_a_reader_that_has_seen_enough_is_no_error(place, line):
    line = line.replace("potluck", f"{sys.executable} -m potluck")
    done = subprocess.run(
        ["bash", "-c", f"{line} | true"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_a_full_disk_behind_the_output_is_told(place):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "potluck", "report", "runs"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "room on the disk" in done.stderr


def test_every_file_of_a_run_is_json(place):
    run = place / "runs" / "e" / "seed-0"
    for path in (*run.glob("*.jsonl"), run / "manifest.json"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line, parse_constant=pytest.fail)
