"""Grids of runs: what is missing, rates chosen on the way, kill -9, and the command."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from potluck.cli.main import app
from potluck.core import ConfigError
from potluck.reproduction import grid as reproduce
from potluck.reproduction import paper
from potluck.reproduction.comparison import gather, page
from potluck.reproduction.estimates import left
from potluck.reproduction.grid import Grid, Job, choice, find, is_complete, jobs, run, select
from potluck.reproduction.paper import Cell
from potluck.simulation import build_data, read_run

ROOT = Path(__file__).parents[2]

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
rounds = 5
cohort = 0.2
target = 0.8
executor = "loop"
"""


def cell(name: str, *overrides: str) -> Cell:
    changes = (f"name={name}", *overrides)
    return Cell(name, "2NN", 0.8, "iid", 1, 10, 0.2, None, "tiny", changes)


@pytest.fixture
def grid(tmp_path: Path) -> Callable[..., Grid]:
    """Make grids over an experiment of a few milliseconds."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/tiny.toml").write_text(TINY)

    def make(*cells: Cell, **settings: object) -> Grid:
        fields = {
            "runs": tmp_path / "runs",
            "copies": tmp_path / "out",
            "experiments": tmp_path / "experiments",
            **settings,
        }
        return Grid(cells=cells, **fields)  # type: ignore[arg-type]

    return make


def do(job: Job) -> list[int]:
    return [round.number for round in run(job, build_data(job.experiment))]


def names(found: list[Job]) -> list[tuple[str, float, int]]:
    return [(job.cell.name, job.experiment.algorithm.client_lr, job.seed) for job in found]


def finish(grid: Grid) -> list[Job]:
    """Do all that is missing."""
    found: list[Job] = []
    for job in jobs(grid):
        do(job)
        found.append(job)
    return found


def logs(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("rounds.jsonl")}


def potluck(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["reproduce", *map(str, words)], prog_name="potluck")


def test_a_grid_is_cells_times_seeds_in_order_and_done_once(grid):
    mine = grid(cell("b"), cell("a"), seeds=(1, 2))
    assert names(finish(mine)) == [("b", 0.5, 1), ("b", 0.5, 2), ("a", 0.5, 1), ("a", 0.5, 2)]
    assert list(jobs(mine)) == []
    assert (mine.runs / "b/lr-0.5/seed-2/final.safetensors").exists()
    assert left(mine) == (4, 4, 0.0)


def test_a_grid_may_name_the_precision_of_its_runs(grid):
    mine = replace(grid(cell("a"), seeds=(1,)), precision="bf16")
    finish(mine)
    run = read_run(mine.runs / "a/lr-0.5/seed-1")
    assert run.manifest["experiment"]["run"]["precision"] == "bf16"
    assert "| bf16 |" in page("table4", gather(mine), "potluck reproduce table4", ())


def test_a_grid_may_name_a_device_on_which_the_cohort_is_one_program(grid):
    mine = replace(grid(cell("a"), seeds=(1,)), device="cpu")
    finish(mine)
    run = read_run(mine.runs / "a/lr-0.5/seed-1").manifest["experiment"]["run"]
    assert (run["executor"], run["device"]) == ("vmap", "cpu")


def test_cells_and_seeds_that_were_started_come_first(grid):
    mine = grid(cell("a"), cell("b"), seeds=(1, 2))
    started = list(jobs(mine))[3]
    rounds = run(started, build_data(started.experiment))
    next(rounds)
    next(rounds)
    rounds.close()
    assert names(finish(mine))[:2] == [("b", 0.5, 2), ("b", 0.5, 1)]


def test_tables_share_the_runs_of_a_cell_and_more_rounds_continue_them(grid):
    short, long = cell("a", "run.rounds=2", "run.target=0.99"), cell("a", "run.target=0.99")
    finish(grid(short, seeds=(1,)))
    (job,) = jobs(grid(long, seeds=(1,)))
    assert do(job) == [3, 4, 5]


def test_a_run_whose_copy_lies_among_the_results_is_not_made_again(grid):
    mine = grid(cell("a"), seeds=(1,))
    finish(mine)
    elsewhere = replace(mine, runs=mine.runs.with_name("other"), copies=mine.runs)
    assert list(jobs(elsewhere)) == []
    assert len(list(jobs(replace(elsewhere, copies=mine.copies)))) == 1


def test_rates_are_tried_with_seed_0_and_the_best_is_used_for_the_others(grid):
    mine = grid(cell("a", "run.rounds=30"), seeds=(1, 2), num_rates=3)
    done = names(finish(mine))
    assert done[:3] == [("a", 0.5, 0), ("a", 1.077, 0), ("a", 0.2321, 0)]
    chosen = choice(mine, mine.cells[0], 0.5)
    costs = {trial.rate: trial.cost.to_target for trial in chosen.trials if trial.cost}
    assert set(costs) == {0.2321, 0.5, 1.077}
    reached = {rate: rounds for rate, rounds in costs.items() if rounds is not None}
    assert chosen.rate == min(reached, key=lambda rate: reached[rate])
    assert done[3:] == [("a", chosen.rate, 1), ("a", chosen.rate, 2)]
    assert list(jobs(mine)) == []
    assert left(mine) == (5, 5, 0.0)


def test_a_rate_stops_where_it_can_no_longer_win_which_changes_no_choice(grid):
    # 0.05 is far too slow: it stops after the rounds that 0.5 needed, not after 60.
    slow_first = cell("a", "algorithm.client_lr=0.2321", "run.rounds=60")
    mine = grid(slow_first, seeds=(1,), num_rates=5)
    finish(mine)
    trials = choice(mine, slow_first, 0.2321).trials
    rounds = {trial.rate: trial.cost.rounds for trial in trials if trial.cost}
    reached = [trial.cost.to_target for trial in trials if trial.cost and trial.cost.to_target]
    assert rounds[0.05] <= -(-min(reached) // 1) < 60
    full = grid(slow_first, seeds=(1,), num_rates=5, runs=mine.runs.with_name("full"))
    for job in list(jobs_of_rates(full)):
        do(job._replace(limit=60))
    assert choice(full, slow_first, 0.2321).rate == choice(mine, slow_first, 0.2321).rate


def test_a_choice_that_was_interrupted_is_the_same(grid):
    tiny = cell("a", "run.rounds=30")
    mine, straight = (grid(tiny, seeds=(1,), num_rates=3, runs=grid().runs / n) for n in "ab")
    for rounds_before in (1, 3):  # stop the first rate, then go on with it and stop the second
        for job in jobs(mine):
            rounds = run(job, build_data(job.experiment))
            done = [next(rounds, None) for _ in range(rounds_before)]
            rounds.close()
            if done[-1] is not None:
                break
    finish(mine)
    finish(straight)
    assert logs(mine.runs) == logs(straight.runs)
    assert choice(mine, tiny, 0.5).rate == choice(straight, tiny, 0.5).rate


def jobs_of_rates(grid: Grid) -> list[Job]:
    (only,) = grid.cells
    return list(reproduce.tuning_jobs(grid, only, reproduce.load_cell(grid, only)))


def test_a_run_that_diverges_is_recorded_and_not_tried_again(grid):
    mine = grid(cell("a", "algorithm.client_lr=1e30"), seeds=(1,))
    (job,) = finish(mine)
    assert "client" in json.loads((job.directory / "diverged.json").read_text())["reason"]
    record = find(mine, mine.cells[0], 1e30, 1)
    assert is_complete(record, 5)
    assert list(jobs(mine)) == []


def test_a_cell_whose_rates_all_diverge_is_given_up(grid):
    mine = grid(cell("a", "algorithm.client_lr=1e30"), seeds=(1,), num_rates=3)
    assert [job.seed for job in finish(mine)] == [0, 0, 0]


def test_cells_are_selected_by_pattern():
    cells = [cell("iid-1"), cell("iid-2"), cell("role-1")]
    assert select(cells, []) == cells
    assert select(cells, ["iid-*"]) == cells[:2]
    assert select(cells, ["role-?", "iid-2"]) == cells[1:]
    with pytest.raises(ValueError, match=r"iid-1, iid-2, role-1, got cells='mnist'"):
        select(cells, ["mnist"])


@pytest.mark.parametrize("seeds", [(), (0, 1), (1, 1)])
def test_reported_seeds_are_different_and_leave_out_the_one_that_chooses(grid, seeds):
    with pytest.raises(ValueError, match="seeds must be different and leave out 0"):
        grid(cell("a"), seeds=seeds)


def test_experiments_are_found_in_the_clone_from_anywhere(grid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "experiments")
    found = replace(grid(), experiments=None)
    assert reproduce.load_cell(found, paper.cells("table4")[0]).name == "mnist-2nn-iid-fedsgd-c0.1"
    with pytest.raises(ConfigError, match=r"tiny\.toml, got .* without it.* --experiments DIR"):
        reproduce.load_cell(found, cell("a"))


KILLED = ["table4", "--quick", "--cells", "quick-2nn-iid-e1*", "--seeds", "1"]


def rows_of_the_page(folder: Path) -> list[str]:
    page = (folder / "table4/README.md").read_text()
    return re.findall(r"^\| 2NN.*", page, re.MULTILINE)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid that nothing disturbed: its runs and its page."""
    folder = tmp_path_factory.mktemp("straight")
    result = potluck(*KILLED, "--runs", folder / "runs", "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_a_grid_that_is_killed_continues_and_ends_with_the_same_bytes(straight, tmp_path):
    words = [*KILLED, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, "-m", "potluck", "reproduce", *words], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    seen = ""
    for line in running.stdout:  # in the second of its two runs
        seen += line
        if re.search(r"e10-b10.*1 of 2 runs done.*\nround +0", seen):
            break
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL, seen
    assert not (tmp_path / "table4").exists()
    again = potluck(*words)
    assert again.exit_code == 0, again.output
    assert "e1-b10" not in again.output.partition("| cell")[0]  # the first is not run again
    assert len(logs(tmp_path / "runs")) == 2
    assert logs(tmp_path / "runs") == logs(straight / "runs")
    assert len(rows_of_the_page(tmp_path)) == 6
    assert rows_of_the_page(tmp_path) == rows_of_the_page(straight)


def test_when_the_time_is_up_it_stops_cleanly_and_goes_on_later(tmp_path):
    words = ["figure8", "--quick", "--cells", "quick-cnn-iid-e1-*", "--seeds", "1"]
    words += ["--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    first = potluck(*words, "--max-hours", "0")
    assert first.exit_code == 0, first.output
    assert "the time is up" in first.output
    assert "| CNN, IID: E 5, B 10, C 0.1 | – | not run |" in first.output
    (directory,) = (tmp_path / "runs").glob("*/*/seed-1")
    assert [line["round"] for line in read_run(directory).rounds] == [0]
    second = potluck(*words)
    assert second.exit_code == 0
    assert [line["round"] for line in read_run(directory).rounds] == [*range(11)]
    assert (tmp_path / "out/figure8/figure8.svg").exists()
    third = potluck(*words)
    assert "seed 1" not in third.output  # nothing is run again


def test_report_only_reads_the_runs_that_are_committed(tmp_path):
    shutil.copytree(ROOT / "results/runs", tmp_path / "results/runs")
    shutil.rmtree(tmp_path / "results/runs/mnist-2nn-iid-fedsgd-c0.1")
    words = ["table4", "--report-only", "--device", "cpu", "--runs", tmp_path / "none"]
    result = potluck(*words, "--out", tmp_path / "results")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "results/table4/README.md").read_text()
    assert "Made by `potluck reproduce table4 --device cpu`" in page
    assert "| 2NN, IID, 97 %: E 1, B 10, C 0.1 | 0.1 (file) | 92 | 57.2 ± 3.9 (3 seeds) |" in page
    assert "55.8, 54.1, 61.5" in page
    assert "aa64806b55c9" in page
    assert "2NN, IID, 97 %: FedSGD, C 0.1 | – | 1468 | not run (about" in page
    assert not (tmp_path / "none").exists()


def test_figure_1_in_miniature(tmp_path):
    words = ["figure1", "--quick", "--seeds", "1", "--out", tmp_path]
    result = potluck(*words)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "figure1").iterdir()) == [
        "README.md",
        "figure1.png",
        "figure1.svg",
        "lines.json",
    ]
    again = potluck(*words)
    assert "in the middle" in result.output
    assert "in the middle" not in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table3"], "WHAT must be one of table1"),
        (["table4", "--seeds", "0,1"], "leave out 0"),
        (["table4", "--seeds", "one"], "Write 1,2,3"),
        (["table4", "--rates", "2"], "odd number"),
        (["table4", "--cells", "shakespeare-*"], "cells must match one of mnist-2nn-iid-fedsgd"),
        (["table4", "--experiments", "none"], "--experiments DIR"),
        (["figure1", "--report-only"], "Leave out --report-only"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_status_1(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = potluck(*words)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
