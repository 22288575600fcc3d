"""The page of a table: what a row says of runs that reached the target, and of others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from potluck.models.task_metrics import AFTER_FIRST
from potluck.reproduction import comparison, curves
from potluck.reproduction.comparison import Result, gather, keep, loss_rows, page, rows
from potluck.reproduction.estimates import seconds_per_round, work
from potluck.reproduction.grid import Grid, find, place
from potluck.reproduction.paper import Cell

CELL = Cell("tiny", "2NN", 0.9, "iid", 1, 10, 0.1, 40, "tiny")
TOML = """\
name = "tiny"
[task]
data = "digits"
model = "2nn"
[partition]
kind = "iid"
[algorithm]
client_lr = 0.1
[run]
rounds = 100
target = 0.9
"""


def write(
    root: Path,
    scores: list[float],
    *,
    seed: int = 1,
    rate: float = 0.1,
    cell: Cell = CELL,
    num_rounds: int = 100,
    train_losses: list[float] | None = None,
    diverged: bool = False,
    after_first: list[float] | None = None,
) -> Path:
    """A run directory with these accuracies from round 0; two seconds a round."""
    directory = root / place(cell, rate, seed)
    directory.mkdir(parents=True)
    run = {"rounds": num_rounds, "target": cell.target, "stop_at_target": train_losses is None}
    manifest = {
        "name": cell.name,
        "seed": seed,
        "experiment": {"name": cell.name, "algorithm": {"client_lr": rate}, "run": run},
        "commit": "abc",
        "machine": "a laptop",
        "versions": {"torch": "2"},
    }
    lines = [
        {
            "round": number,
            "loss": 1.0,
            "metrics": {"accuracy": score}
            | ({} if train_losses is None else {"train_loss": train_losses[number]})
            | ({} if after_first is None else {AFTER_FIRST: after_first[number]}),
            "uplink_bytes": 1,
            "downlink_bytes": 1,
            "failures": [],
        }
        for number, score in enumerate(scores)
    ]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    write_lines(directory / "rounds.jsonl", lines)
    write_lines(
        directory / "timings.jsonl",
        [{"round": number, "seconds": 2.0} for number in range(len(scores))],
    )
    if diverged:
        (directory / "diverged.json").write_text('{"reason": "nan"}\n')
    return directory


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    (tmp_path / "tiny.toml").write_text(TOML)
    return Grid(
        cells=[CELL],
        seeds=(1, 2),
        runs=tmp_path / "runs",
        copies=tmp_path / "copies",
        experiments=tmp_path,
    )


def row(grid: Grid) -> tuple[str, ...]:
    ((_, *rest),) = rows(gather(grid))
    return tuple(rest)


def test_seeds_that_reached_the_target_give_mean_and_spread(grid):
    write(grid.runs, [0.1, 0.8, 1.0], seed=1)  # crosses 0.9 half way: 1.5
    write(grid.runs, [0.1, 0.5, 0.7, 1.0], seed=2)  # 2 + 0.2 / 0.3 = 2.7
    # Mean 2.083; deviations ±0.583, so the spread is 0.583 · √2 = 0.825; 2.083 / 40 = 0.05.
    both = "2.1 ± 0.8"
    assert row(grid) == ("0.1 (file)", "40", f"{both} (2 seeds)", both, "1.5, 2.7", "0.05")


def test_the_paper_s_grid_is_beside_it_and_marked_where_it_was_held(grid):
    write(grid.runs, [0.5] * 11 + [0.95], seed=1)  # reaches it in round 11; the grid has 10 and 20
    # 10 + 10 · 0.4 / 0.45 = 18.9, and 10 + 0.4 / 0.45 = 10.9.
    assert row(grid)[2:5] == ("10.9 (1 of 2 seeds)", "≈ 18.9", "10.9")


def test_one_seed_that_ended_without_the_target_leaves_no_mean(grid):
    write(grid.runs, [0.1, 0.8, 1.0], seed=1)
    write(grid.runs, [0.1, 0.5, 0.6], seed=2, num_rounds=2)
    ours, on_grid, each, ratio = row(grid)[2:]
    assert ours == "– (reached by 1 of 2 seeds)"
    assert each == "1.5, – (best 0.6000 in 2)"
    assert on_grid == ratio == "–"


def test_runs_are_judged_without_first_characters_where_they_were_evaluated_so(grid):
    write(grid.runs, [0.1, 0.8, 0.85], seed=1, after_first=[0.1, 0.85, 0.95])
    write(grid.runs, [0.1, 0.5], seed=2)
    (result,) = gather(grid, AFTER_FIRST)
    assert rows([result])[0][3:6] == ("1.5 (1 of 2 seeds)", "1.5", "1.5")
    assert row(grid)[4] == "– (best 0.8500 in 2, unfinished), – (best 0.5000 in 1, unfinished)"
    text = page("table2", gather(grid), "potluck reproduce table2", (), [result])
    assert "## Without first characters" in text
    assert text.index("unfinished (2 of 2 seeds begun)") < text.index("1.5 (1 of 2 seeds)")
    assert gather(grid, "loss of nothing") == []
    assert "first characters" not in page("table2", gather(grid), "potluck reproduce table2", ())


def test_a_run_that_still_goes_on_is_named_and_in_no_mean(grid):
    write(grid.runs, [0.1, 0.8, 1.0], seed=1)
    write(grid.runs, [0.1, 0.5], seed=2)
    assert row(grid)[2] == "1.5 (1 of 2 seeds)"
    assert row(grid)[4] == "1.5, – (best 0.5000 in 1, unfinished)"


def test_a_run_that_diverged_is_named_and_counts_as_not_reached(grid):
    write(grid.runs, [0.1, 0.2], seed=1, diverged=True)
    assert row(grid)[2] == "– (reached by 0 of 1 seeds)"
    assert row(grid)[4] == "– (best 0.2000 in 1, then diverged)"


def test_a_cell_that_was_not_run_says_so_with_its_cost(grid):
    # 10 clients · 600 examples · 1 epoch + 10,000 / 3 = 9,333 examples a round, 45 µs each on one
    # core, 22.5 on two: 0.21 s a round, 40 rounds, 8.4 s.
    assert work(CELL) == pytest.approx(9333.3, rel=1e-4)
    assert seconds_per_round(grid)["tiny"] == pytest.approx(0.21, rel=1e-3)
    assert gather(grid)[0].seconds_expected == pytest.approx(8.4, rel=1e-3)
    assert row(grid)[:3] == ("–", "40", "not run (under 1 min a seed)")
    for seconds, cost in ((60.0, "about 1 min"), (3599.0, "about 60 min"), (9000.0, "about 2.5 h")):
        expensive = Result(CELL, None, (), (), 2, seconds)
        assert rows([expensive])[0][3] == f"not run ({cost} a seed)"


def test_costs_are_those_of_rounds_that_were_timed(grid):
    write(grid.runs, [0.1, 0.2, 0.3])
    assert seconds_per_round(grid)["tiny"] == pytest.approx(2.0)
    more = CELL._replace(name="more", epochs=3)  # (10 · 600 · 3 + 3333) / 9333 = 2.286 as much
    both = Grid(cells=[CELL, more], runs=grid.runs, copies=grid.copies)
    assert seconds_per_round(both)["more"] == pytest.approx(2.0 * 2.286, rel=1e-3)


def test_the_rate_that_was_chosen_is_named_with_those_it_was_chosen_from(grid):
    write(grid.runs, [0.1, 0.8, 1.0], seed=0, rate=0.1)
    write(grid.runs, [0.1, 0.95], seed=0, rate=0.2154)
    write(grid.runs, [0.1, 0.3], seed=0, rate=0.4642, diverged=True)
    write(grid.runs, [0.1, 0.9], seed=1, rate=0.2154)
    write(grid.runs, [0.1, 0.2, 0.9], seed=1, rate=0.1)
    assert row(grid)[0] == "0.2154 (best of 3)"
    assert row(grid)[4] == "1.0"
    text = page("table4", gather(grid), "potluck reproduce table4 --rates 3", ["table4.png"])
    assert "0.1: 1.5; 0.2154: 0.9; 0.4642: diverged | 0.2154 |" in text
    assert "same test examples" in text


def test_until_the_chosen_rate_was_run_the_file_s_is_reported(grid):
    write(grid.runs, [0.1, 0.95], seed=0, rate=0.2154)
    write(grid.runs, [0.1, 0.8, 1.0], seed=0, rate=0.1)
    write(grid.runs, [0.1, 0.2, 0.9], seed=1, rate=0.1)
    assert row(grid)[0] == "0.1 (file)"


def test_a_best_rate_at_the_edge_is_marked(grid):
    write(grid.runs, [0.1, 0.95], seed=0, rate=0.2154)
    write(grid.runs, [0.1, 0.8, 1.0], seed=0, rate=0.1)
    write(grid.runs, [0.1, 0.9], seed=1, rate=0.2154)
    assert row(grid)[0] == "0.2154 (best of 2, at the edge)"


def test_copies_are_kept_and_a_longer_one_stays(grid):
    source = write(grid.runs, [0.1, 0.5])
    keep(grid)
    copy = grid.copies / place(CELL, 0.1, 1)
    assert sorted(path.name for path in copy.iterdir()) == [
        "manifest.json",
        "rounds.jsonl",
        "timings.jsonl",
    ]
    before = (copy / "rounds.jsonl").read_bytes()
    first = (source / "rounds.jsonl").read_text().splitlines(keepends=True)[0]
    (source / "rounds.jsonl").write_text(first)
    keep(grid)
    assert (copy / "rounds.jsonl").read_bytes() == before
    found = find(grid, CELL, 0.1, 1)
    assert found is not None
    assert found.directory == copy


def test_training_losses_have_a_table_of_their_own(grid):
    write(grid.runs, [0.1, 0.5, 0.6], seed=1, num_rounds=2, train_losses=[2.0, 1.0, 0.4])
    write(grid.runs, [0.1, 0.5, 0.7], seed=2, num_rounds=2, train_losses=[2.0, 0.2, 0.6])
    ((_, rate, numbers, last, lowest, best),) = loss_rows(gather(grid))
    assert (rate, numbers) == ("0.1 (file)", "2, 2")
    assert last == "0.5000 ± 0.1414"  # 0.4 and 0.6
    assert lowest == "0.3000 ± 0.1414"  # 0.4 and 0.2
    assert best == "0.6500 ± 0.0707"


def test_figures_are_drawn_from_what_is_there_and_again_the_same(grid, tmp_path):
    write(grid.runs, [0.1, 0.5, 0.6], seed=1, num_rounds=2, train_losses=[2.0, 1.0, 0.4])
    write(grid.runs, [0.1, 0.5, 0.7], seed=2, num_rounds=2, train_losses=[2.0, 0.2, 0.6])
    results = [*gather(grid), Result(CELL._replace(name="none"), None, (), (), 2, None)]
    for draw in (curves.draw_accuracy, curves.draw_train_loss):
        paths = [tmp_path / "figure.png", tmp_path / "figure.svg"]
        draw(results, paths)
        assert paths[0].read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
        before = paths[1].read_bytes()
        draw(results, paths)
        assert paths[1].read_bytes() == before


def test_a_run_that_has_its_initial_model_alone_is_not_drawn(grid, tmp_path):
    begun = CELL._replace(name="begun")
    write(grid.runs, [0.1, 0.5, 0.6], seed=1)
    write(grid.runs, [0.1], seed=2)
    write(grid.runs, [0.1], seed=1, cell=begun)
    results = gather(replace(grid, cells=[CELL, begun]))
    curves.draw_accuracy(results, [tmp_path / "figure.png"])
    assert rows(results)[1][3] == "unfinished (1 of 2 seeds begun)"


def test_a_title_says_model_target_and_setting():
    assert comparison.title(CELL) == "2NN, IID, 90 %: E 1, B 10, C 0.1"
    fed_sgd = CELL._replace(batch=None, division="two-shard")
    assert comparison.title(fed_sgd) == "2NN, two-shard, 90 %: FedSGD, C 0.1"
    assert fed_sgd._replace(epochs=5).setting == "E 5, B ∞, C 0.1"
