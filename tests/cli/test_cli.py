"""The commands, run as a person runs them, on digits with tiny settings."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel
from rich.console import Console
from typer.testing import CliRunner, Result

from potluck.cli.main import app
from potluck.cli.progress import Bar, Clients, ProgressLines
from potluck.config.experiment import Experiment, load_experiment
from potluck.config.template import TEMPLATE
from potluck.simulation import Round, read_run

TINY = """\
name = "tiny"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 10
[algorithm]
client_lr = 0.5
[run]
rounds = 4
cohort = 2
target = 0.5
stop_at_target = false
executor = "loop"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with an experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def potluck(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), prog_name="potluck")


def process(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from potluck.cli.main import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a job in the background ignores, its children would ignore too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_importing_the_cli_loads_nothing_heavy():
    heavy = ("torch", "matplotlib", "pandas", "sklearn", "potluck.config.experiment")
    code = f"import sys, potluck.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_train_describes_the_partition_then_trains_then_sums_up(folder):
    result = potluck("train", "tiny.toml")
    assert result.exit_code == 0, result.output
    partition, rounds, summary = (
        result.output.index(word) for word in ("training examples", "round 4/4", "rounds to 0.5")
    )
    assert partition < rounds < summary
    assert "uplink" in result.output
    run = folder / "runs" / "tiny" / "seed-0"
    assert str(run.relative_to(folder)) in result.output
    assert (run / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert [line["round"] for line in read_run(run).rounds] == [0, 1, 2, 3, 4]


def test_a_finished_run_is_left_alone(folder):
    potluck("train", "tiny.toml")
    before = (folder / "runs/tiny/seed-0/rounds.jsonl").read_bytes()
    result = potluck("train", "tiny.toml")
    assert result.exit_code == 0
    assert "nothing to do" in result.output
    assert "rounds to 0.5" in result.output
    assert (folder / "runs/tiny/seed-0/rounds.jsonl").read_bytes() == before


def test_more_rounds_continue_the_run(folder):
    potluck("train", "tiny.toml", "--set", "run.rounds=2")
    result = potluck("train", "tiny.toml")
    assert result.exit_code == 0
    assert "continuing" in result.output
    assert [line["round"] for line in read_run(folder / "runs/tiny/seed-0").rounds] == [*range(5)]
    straight = potluck("train", "tiny.toml", "--out", "other")
    assert straight.exit_code == 0
    names = [Path(out) / "tiny/seed-0/rounds.jsonl" for out in ("runs", "other")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_seeds_make_a_run_each_and_a_table(folder):
    result = potluck("train", "tiny.toml", "--seeds", "2", "--set", "run.seed=5")
    assert result.exit_code == 0
    assert sorted(path.name for path in (folder / "runs/tiny").iterdir()) == ["seed-5", "seed-6"]
    assert "| tiny | mean of 2 |" in result.output
    weights = [(folder / f"runs/tiny/seed-{s}/final.safetensors").read_bytes() for s in (5, 6)]
    assert weights[0] != weights[1]


def test_the_final_model_is_judged_on_every_clients_own_examples(folder):
    result = potluck("train", "tiny.toml", "--per-client")
    assert result.exit_code == 0
    assert re.search(
        r"accuracy per client +mean 0\.\d{4}, weighted mean 0\.\d{4}, worst decile 0\.\d{4}",
        result.output,
    )


def test_fresh_starts_again_and_keeps_foreign_files(folder):
    potluck("train", "tiny.toml", "--set", "run.rounds=2")
    run = folder / "runs/tiny/seed-0"
    (run / "notes.txt").write_text("mine")
    assert potluck("train", "tiny.toml", "--set", "algorithm.client_lr=0.1").exit_code == 1
    result = potluck("train", "tiny.toml", "--set", "algorithm.client_lr=0.1", "--fresh")
    assert result.exit_code == 0, result.output
    assert "training with seed 0" in result.output
    assert read_run(run).manifest["experiment"]["algorithm"]["client_lr"] == 0.1
    assert (run / "notes.txt").read_text() == "mine"


def test_fresh_refuses_a_run_that_somebody_is_writing(folder):
    potluck("train", "tiny.toml")
    run = folder / "runs/tiny/seed-0"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = potluck("train", "tiny.toml", "--fresh")
    assert result.exit_code == 1
    assert "in use" in result.stderr
    assert read_run(run).is_finished


def test_ctrl_c_leaves_a_run_that_the_printed_command_continues(folder):
    words = ["train", "tiny.toml", "--set", "run.rounds=100000"]
    running = process(*words, "--fresh")
    assert running.stdout is not None
    while not re.match(r"round +[1-9]", seen := running.stdout.readline()):
        assert seen, "the run ended early"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    again = shlex.split(errors.strip().splitlines()[-1])
    assert again == ["potluck", *words]
    record = read_run("runs/tiny/seed-0")
    last = record.rounds[-1]["round"]
    assert not record.is_finished
    assert last >= 1
    again[-1] = f"run.rounds={last + 2}"
    assert potluck(*again[1:]).exit_code == 0
    assert potluck("train", "tiny.toml", "--set", again[-1], "--out", "straight").exit_code == 0
    paths = [Path(out) / "tiny/seed-0/rounds.jsonl" for out in ("runs", "straight")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_report_counts_and_draws(folder):
    potluck("train", "tiny.toml", "--seeds", "2")
    result = potluck("report", "runs", "--target", "0.4", "--out", "out/tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| experiment | seed | target |")
    assert "| tiny | mean of 2 | 0.4 |" in result.stdout
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "tiny.md",
        "tiny.png",
        "tiny.svg",
    ]
    assert (folder / "out/tiny.md").read_text().strip() == result.stdout.strip()
    alone = potluck("report", "runs/tiny/seed-1", "runs/tiny/seed-1")
    assert len(alone.stdout.splitlines()) == 3  # the header, the rule, and one run once


def test_report_takes_the_name_of_a_file_as_a_prefix(folder):
    potluck("train", "tiny.toml")
    assert potluck("report", "runs", "--out", "tiny.png").exit_code == 0
    assert {"tiny.md", "tiny.png", "tiny.svg"} <= {path.name for path in folder.iterdir()}


def test_report_leaves_out_a_run_that_has_only_begun(folder):
    potluck("train", "tiny.toml", "--seeds", "2")
    (folder / "runs/tiny/seed-1/rounds.jsonl").write_text("")
    result = potluck("report", "runs")
    assert result.exit_code == 0
    assert "seed-1" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_data_list_names_every_data_set():
    result = potluck("data", "list")
    assert result.exit_code == 0
    assert all(f"| {name} |" in result.output for name in ("digits", "mnist", "wisdm"))


def test_data_get_of_an_installed_data_set_downloads_nothing():
    result = potluck("data", "get", "digits")
    assert result.exit_code == 0
    assert "nothing to download" in result.output


def test_data_describe_tells_and_draws_without_training(folder):
    result = potluck(
        "data", "describe", "tiny.toml", "--set", "partition.clients=7", "--out", "p.png"
    )
    assert result.exit_code == 0
    assert re.search(r"^clients +7$", result.output, re.MULTILINE)
    assert (folder / "p.png").exists()
    assert not (folder / "runs").exists()


def test_init_writes_an_experiment_that_is_valid(folder):
    result = potluck("init", "my experiment.toml")
    assert result.exit_code == 0
    assert load_experiment(folder / "my experiment.toml").name == "my-experiment"
    assert "potluck train 'my experiment.toml'" in result.output
    assert potluck("init", "my experiment.toml").exit_code == 1
    assert potluck("init", "my experiment.toml", "--force").exit_code == 0


def sections(annotation: Any) -> list[Any]:
    """The tables that may stand where an annotation is: one, or one for each name."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in get_args(annotation) for found in sections(part)]


def test_the_template_shows_every_key_and_comments_out_only_defaults():
    opened = re.sub(r"^# (?=\[|[a-z_0-9]+ = )", "", TEMPLATE, flags=re.MULTILINE)
    no_default = {"batches", "gradient_clip", "evaluate_train", "hidden", "loss", "path"}
    no_default |= {"kind", "missing", "scale", "categories", "split", "test_fraction"}
    no_default |= {"text_column", "symbols", "steps"}
    no_default |= {"codec", "device", "precision", "ray_address", "variant", "workers"}
    no_default |= {"profile", "trace", "examples_per_second"}  # of [devices]
    no_default |= {"goal", "lease_seconds", "test"}  # of [server]: they follow from others

    def compare(tables: list[Any], values: dict[str, Any], active: dict[str, Any]) -> None:
        known = {key for table in tables for key in table.model_fields}
        assert set(values) <= known
        assert all(key in TEMPLATE for key in known - set(values))  # of other names: in a comment
        for key, value in values.items():
            fields = [t.model_fields[key] for t in tables if key in t.model_fields]
            if isinstance(value, dict):
                compare(sections(fields[0].annotation), value, active.get(key, {}))
            elif key not in active and key not in no_default:
                defaults = [field.default for field in fields if not field.is_required()]
                assert not defaults or value in defaults, key

    compare([Experiment], tomllib.loads(opened), tomllib.loads(TEMPLATE))


def test_every_table_that_the_template_comments_out_is_valid(folder):
    for start in re.findall(r"^# \[algorithm\.\w+\]", TEMPLATE, flags=re.MULTILINE):
        head, tail = TEMPLATE.split(start, 1)
        table, rest = tail.split("\n\n", 1)
        # What stands below belongs to other names.
        table = table.split("# momentum")[0].rstrip()
        shown = start + table
        opened = "\n".join(line.removeprefix("# ") for line in shown.splitlines())
        (folder / "opened.toml").write_text(f"{head}{opened}\n\n{rest}")
        load_experiment(folder / "opened.toml")


def test_train_says_what_the_algorithm_is_made_of(folder):
    overrides = [
        "algorithm.name=fedprox",
        "algorithm.mu=0.5",
        "algorithm.gradient_clip=2",
        "algorithm.server={name='adam', server_lr=0.01}",
        "algorithm.client_optimizer={name='nesterov', weight_decay=0.5}",
        "algorithm.client_schedule={name='warmup', rounds=2, then={name='cosine', rounds=9}}",
        "run.rounds=1",
    ]
    words = [word for override in overrides for word in ("--set", override)]
    result = potluck("train", "tiny.toml", *words)
    assert result.exit_code == 0, result.output
    shown = dict(line.split("  ", 1) for line in result.output.splitlines()[:7])
    assert {name: value.strip() for name, value in shown.items()} == {
        "experiment": "tiny",
        "algorithm": "fedprox, client_lr 0.5, local_epochs 1, batch_size 10, gradient_clip 2, "
        "mu 0.5",
        "server": "adam, server_lr 0.01, beta1 0.9, beta2 0.99, tau 0.001",
        "client_optimizer": "nesterov, momentum 0.9, weight_decay 0.5",
        "client_schedule": "warmup, rounds 2, then cosine, rounds 9, floor 0",
        "model": "logistic",
        "partition": "iid",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "none.toml"], "potluck init"),
        (["train", "tiny.toml", "--set", "run.cohrt=0.1"], "did you mean run.cohort"),
        (["train", "tiny.toml", "--set", "run.cohort=11"], "at most the population"),
        (["train", "tiny.toml", "--set", "rounds"], "must look like"),
        (["train", "tiny.toml", "--out", "tiny.toml"], "writable"),
        (["train", "tiny.toml", "--set", "algorithm.client_lr=1e30"], "round 1"),
        (["report", "."], "potluck train"),
        (["report", "none"], "potluck train"),
        (["data", "get", "none"], "potluck data list"),
        (["data", "describe", "tiny.toml", "--out", "p.none"], ".png, .svg or .pdf"),
        (["data", "describe", "tiny.toml", "--out", "no/p.png"], "no/p.png"),
        (["init", "tiny.toml"], "--force"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_1(words, message):
    result = potluck(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_debug_shows_the_traceback():
    result = potluck("train", "none.toml", "--debug")
    assert result.exit_code == 1
    assert result.exception is not None
    assert type(result.exception).__name__ == "ConfigError"


@pytest.mark.parametrize("words", [["train"], ["train", "tiny.toml", "--seeds", "0"], ["fly"]])
def test_a_command_that_is_not_understood_has_exit_status_2(words):
    assert potluck(*words).exit_code == 2


def test_the_version_is_told():
    assert re.fullmatch(r"potluck \d+\.\d+\S*\n", potluck("--version").output)


def test_a_source_tree_that_is_not_installed_trains(monkeypatch):
    installed = metadata.version

    def version(name: str) -> str:
        if name == "potluck":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    assert potluck("--version").output == "potluck unknown\n"
    result = potluck("train", "tiny.toml")
    assert result.exit_code == 0, result.output
    assert read_run(Path("runs/tiny/seed-0")).manifest["versions"]["potluck"] == "unknown"


def made_round(number: int, accuracy: float | None) -> Round:
    return Round(
        number=number,
        weights=np.zeros(1, np.float32),
        cohort=np.zeros(1, np.int64),
        loss=float("nan") if number == 0 else 0.5,
        metrics=None if accuracy is None else {"loss": 1.0, "accuracy": accuracy},
        num_examples=1,
        uplink_bytes=1000 * (number > 0),
        downlink_bytes=1000,
        seconds=2.0,
        failures=(),
        state=None,
    )


def line(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "loss": 0.6,
        "metrics": {"accuracy": 0.3},
        "uplink_bytes": 1000,
        "failures": [],
    }


def lines_of(rounds: list[Round], times: list[float], history: list[dict[str, Any]]) -> list[str]:
    out, clock = io.StringIO(), iter(times)
    with ProgressLines(10, history, out, lambda: next(clock)) as shown:
        for round in rounds:
            shown.show(round)
    return out.getvalue().splitlines()


def test_plain_lines_come_once_a_second_and_at_both_ends():
    rounds = [made_round(n, n / 10) for n in range(5)]
    shown = lines_of(rounds, [0.0, 0.4, 1.1, 1.2, 1.3], [])
    assert [text[:11] for text in shown] == ["round  0/10", "round  2/10", "round  4/10"]
    # Two seconds a round and eight rounds to go.
    assert shown[1] == "round  2/10  loss 0.5000  accuracy 0.2000  up 2 kB  about 16 s left"


def test_rounds_that_are_not_evaluated_have_no_line():
    rounds = [made_round(0, 0.1), made_round(1, None), made_round(2, 0.2), made_round(3, None)]
    shown = lines_of(rounds, [0.0, 5.0, 10.0, 15.0], [])
    assert [text[:11] for text in shown] == ["round  0/10", "round  2/10"]


def test_bytes_of_a_continued_run_count_from_its_beginning():
    # Rounds 1 to 3 lie on disk, but the run goes on from round 2: round 3 is made again.
    shown = lines_of([made_round(3, 0.4)], [0.0], [line(1), line(2), line(3)])
    assert shown == ["round  3/10  loss 0.5000  accuracy 0.4000  up 3 kB  about 14 s left"]


def test_the_bar_shows_round_accuracy_and_bytes():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    rounds = [made_round(n, n / 10) for n in range(4)]
    with Bar(3, [], console) as shown:
        for round in rounds:
            shown.show(round)
    last = [text for text in out.getvalue().splitlines() if "round" in text][-1]
    assert "round 3/3" in last
    assert "loss 0.5000  accuracy 0.3000  up 3 kB" in last


def test_the_bar_counts_the_clients_of_a_round_where_the_executor_tells():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    clients = Clients()
    clients(0, 10)  # nobody looks yet

    with Bar(1, [], console, clients) as shown:
        shown.show(made_round(0, 0.1))
        clients(7, 10)
        shown.show(made_round(1, 0.2))
    assert "7/10 clients" in out.getvalue()


def test_in_a_terminal_a_wide_table_is_split_and_nothing_is_lost(monkeypatch):
    potluck("train", "tiny.toml")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "70")
    shown = potluck("report", "runs").output
    assert "|" not in shown
    assert "…" not in shown
    assert shown.count("experiment") > 1
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())) <= 70


def test_a_closed_pipe_is_no_error():
    command = (
        f"{shlex.quote(sys.executable)} -c 'from potluck.cli.main import main; main()' data list"
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} | true"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stderr
