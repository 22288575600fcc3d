"""Counting rounds and bytes to a target: the arithmetic is in the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from potluck.simulation import RunRecord
from potluck.simulation.runs.report import (
    HEADER,
    best_so_far,
    draw,
    format_bytes,
    format_rounds,
    format_seconds,
    group,
    markdown,
    mean_of_best,
    measure,
    notes,
    on_paper_grid,
    rounds_to_target,
    table,
)


def record(
    scores: dict[int, float],
    *,
    name: str = "digits",
    seed: int = 0,
    target: float | None = 0.9,
    metric: str = "accuracy",
    num_rounds: int | None = None,
    client_lr: float = 0.1,
    is_finished: bool = True,
) -> RunRecord:
    """A run of 10 clients of 100 uplink bytes each; round 0 sends nothing."""
    last = max(scores) if num_rounds is None else num_rounds
    return RunRecord(
        directory=Path("runs") / name / f"seed-{seed}",
        manifest={
            "name": name,
            "seed": seed,
            "experiment": {
                "name": name,
                "algorithm": {"client_lr": client_lr},
                "run": {"rounds": last, "seed": 0, "target": target, "cohort": 0.1},
            },
        },
        rounds=[
            {
                "round": number,
                "loss": None if number == 0 else 1.0,
                "metrics": {metric: scores[number]} if number in scores else None,
                "uplink_bytes": 1000 * (number > 0),
                "downlink_bytes": 1200 * (number > 0),
                "failures": [],
            }
            for number in range(last + 1)
        ],
        seconds=[0.5] * (last + 1),
        is_finished=is_finished,
    )


def test_the_crossing_is_interpolated():
    # From 0.8 in round 4 to 0.9 in round 5: 0.85 is half way.
    assert rounds_to_target([(3, 0.5), (4, 0.8), (5, 0.9)], 0.85) == pytest.approx(4.5)
    # Over a wider gap, 20 rounds: 20 + 20 · (0.85 − 0.8) / (0.9 − 0.8).
    assert rounds_to_target([(20, 0.8), (40, 0.9)], 0.85) == pytest.approx(30.0)


def test_the_curve_is_made_monotone_first():
    curve = [(1, 0.5), (2, 0.8), (3, 0.6), (4, 0.9)]
    assert best_so_far(curve) == [(1, 0.5), (2, 0.8), (3, 0.8), (4, 0.9)]
    # From 0.8 (not 0.6) in round 3 to 0.9 in round 4.
    assert rounds_to_target(curve, 0.85) == pytest.approx(3.5)


def test_a_target_met_exactly_is_reached_in_that_round():
    assert rounds_to_target([(1, 0.5), (2, 0.8), (3, 0.9)], 0.8) == 2.0


def test_a_target_met_at_the_start_is_reached_at_the_start():
    assert rounds_to_target([(1, 0.95), (2, 0.99)], 0.9) == 1.0


@pytest.mark.parametrize("curve", [[], [(1, 0.5)], [(1, 0.5), (2, 0.8), (3, 0.7)]])
def test_a_target_that_is_never_met_has_no_number(curve):
    assert rounds_to_target(curve, 0.9) is None


def test_the_papers_grid_is_every_round_then_every_tenth_then_every_hundredth():
    kept = [number for number, _ in on_paper_grid([(n, 0.0) for n in range(401)])]
    assert kept == [*range(1, 11), *range(20, 101, 10), 200, 300, 400]


def test_the_papers_grid_is_coarser():
    # 0.80 in round 20, then 0.01 a round: 0.85 is reached in round 25, and the line from round 20
    # (0.80) to round 30 (0.90) says the same; a jump in round 21 is seen only in round 30.
    steady = [(n, 0.60 + 0.01 * n) for n in range(1, 31)]
    assert rounds_to_target(on_paper_grid(steady), 0.85) == pytest.approx(25.0)
    jump = [(n, 0.80 if n <= 20 else 0.90) for n in range(1, 31)]
    assert rounds_to_target(jump, 0.85) == pytest.approx(20.5)
    assert rounds_to_target(on_paper_grid(jump), 0.85) == pytest.approx(25.0)


def test_a_peak_between_two_rounds_of_the_grid_is_not_seen():
    peak = [(n, 0.95 if n == 15 else 0.5) for n in range(1, 31)]
    assert rounds_to_target(peak, 0.9) is not None
    assert rounds_to_target(on_paper_grid(peak), 0.9) is None


def test_a_curve_that_stopped_off_the_grid_is_held_to_its_next_round():
    assert on_paper_grid([(10, 0.80), (13, 0.90)]) == [(10, 0.80), (20, 0.90)]
    cost = measure(record({10: 0.80, 13: 0.90}, target=0.85))
    assert cost.to_target == pytest.approx(11.5)
    assert cost.on_grid == pytest.approx(15.0)  # half way from 10 to 20
    assert cost.held
    assert notes([cost])[0].startswith("≈")


def test_a_crossing_before_the_held_part_is_not_marked():
    cost = measure(record({10: 0.80, 20: 0.90, 23: 0.95}, target=0.85))
    assert cost.on_grid == pytest.approx(15.0)
    assert not cost.held
    assert notes([cost]) == []


def test_the_initial_model_is_not_on_the_papers_grid():
    assert on_paper_grid([(0, 0.1)]) == []
    assert on_paper_grid([(0, 0.1), (1, 0.2)]) == [(1, 0.2)]


def test_bytes_to_the_target_are_those_of_whole_rounds():
    # The target is met at 11.5: rounds 1 to 12 are paid for.
    cost = measure(record({10: 0.80, 13: 0.90}, target=0.85))
    assert cost.bytes_to_target == (12 * 1000, 12 * 1200)
    assert cost.bytes == (13 * 1000, 13 * 1200)
    # Met exactly at round 10: ten rounds, not eleven.
    assert measure(record({5: 0.5, 10: 0.9}, target=0.9)).bytes_to_target == (10_000, 12_000)


def test_wall_time_is_that_of_all_rounds():
    assert measure(record({0: 0.1, 3: 0.9})).seconds == pytest.approx(4 * 0.5)


def test_a_run_that_never_reached_the_target_says_how_near_it_came():
    cost = measure(record({100: 0.953, 200: 0.94}, target=0.97))
    assert format_rounds(cost) == "– (best 0.953 in 200)"
    assert cost.bytes_to_target is None
    assert (cost.best, cost.best_round, cost.final) == (0.953, 100, 0.94)


def test_a_given_target_replaces_the_runs_own():
    assert measure(record({1: 0.5, 2: 0.9}, target=0.9), 0.7).to_target == pytest.approx(1.5)


def test_a_run_can_be_judged_by_another_of_its_metrics(tmp_path):
    run = record({0: 0.1, 1: 0.5, 2: 0.6})
    for line in run.rounds:
        line["metrics"]["accuracy_after_first"] = line["metrics"]["accuracy"] + 0.2
        line["metrics"]["loss"] = 1.0 - line["metrics"]["accuracy"]
    assert measure(run, 0.6).to_target == pytest.approx(2.0)
    cost = measure(run, 0.6, metric="accuracy_after_first")  # 0.3, 0.7: three quarters of the way
    assert cost.to_target == pytest.approx(0.75)
    assert measure(run, 0.6, metric="loss").to_target == pytest.approx(0.75)
    draw([cost], [tmp_path / "a.svg"])
    assert "test accuracy_after_first" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_a_metric_that_was_not_always_evaluated_counts_where_it_was():
    run = record({0: 0.1, 1: 0.5, 2: 0.6})
    run.rounds[1]["metrics"]["train_loss"] = 1.0
    run.rounds[2]["metrics"]["train_loss"] = 0.8
    assert measure(run, 0.9, metric="train_loss").to_target == pytest.approx(1.5)


def test_a_metric_that_a_run_has_not_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"one of accuracy for .* got metric='train_loss'"):
        measure(record({0: 0.1, 1: 0.5}), metric="train_loss")


def test_without_a_target_there_is_nothing_to_reach():
    assert format_rounds(measure(record({1: 0.5}, target=None))) == "no target"


@pytest.mark.parametrize("target", [97.0, 0.0, 1.0])
def test_a_target_that_is_no_accuracy_is_refused(target):
    with pytest.raises(ValueError, match=r"write 0\.97"):
        measure(record({1: 0.5}), target)


def test_a_run_without_an_evaluation_is_refused():
    with pytest.raises(ValueError, match="evaluated"):
        measure(record({}, num_rounds=0))


def test_the_loss_of_a_regression_reaches_its_target_from_above():
    # Best so far: 4, 2, 2, 1. From 2 in round 3 to 1 in round 4, 1.5 is half way.
    cost = measure(record({1: 4.0, 2: 2.0, 3: 3.0, 4: 1.0}, metric="loss", target=None), 1.5)
    assert cost.metric == "loss"
    assert cost.to_target == pytest.approx(3.5)
    assert cost.on_grid == pytest.approx(3.5)
    assert (cost.best, cost.best_round) == (1.0, 4)


def test_runs_that_differ_in_the_seed_are_one_experiment():
    runs = [
        measure(record({1: 0.95}, seed=1)),
        measure(record({1: 0.95}, client_lr=0.2)),
        measure(record({1: 0.95}, seed=0, num_rounds=7)),
    ]
    groups = group(runs)
    assert [[(cost.seed, cost.rounds) for cost in runs] for runs in groups] == [
        [(0, 7), (1, 1)],
        [(0, 1)],
    ]


def cells(rows: list[tuple[str, ...]], column: str) -> list[str]:
    return [row[HEADER.index(column)] for row in rows]


def test_the_table_has_a_mean_over_seeds():
    # Rounds to target 1.5, 2.5 and 3.5: mean 2.5, standard deviation of a sample 1.
    runs = [measure(record({1 + k: 0.8, 2 + k: 1.0}, seed=k)) for k in range(3)]
    rows = table(runs)
    assert cells(rows, "seed") == ["0", "1", "2", "mean of 3"]
    assert cells(rows, "rounds to target") == ["1.5", "2.5", "3.5", "2.5 ± 1.0"]
    # Paid rounds 2, 3 and 4: 3 rounds of 1000 and 1200 bytes on average.
    assert cells(rows, "up / down to target")[-1] == "3 / 3.6 kB"


def test_there_is_no_mean_where_a_seed_never_reached_the_target():
    runs = [measure(record({1: 0.8, 2: last}, seed=k)) for k, last in enumerate((1.0, 0.85))]
    rows = table(runs)
    assert cells(rows, "rounds to target") == [
        "1.5",
        "– (best 0.85 in 2)",
        "– (reached by 1 of 2)",
    ]
    assert cells(rows, "up / down to target")[-1] == "–"


def test_a_single_run_has_no_mean_and_an_unfinished_one_says_so():
    rows = table([measure(record({1: 0.5, 2: 0.6}, is_finished=False))])
    assert cells(rows, "rounds") == ["2 (unfinished)"]


def test_experiments_of_one_name_are_told_apart_by_their_folder():
    runs = [measure(record({1: 0.95}, client_lr=lr)) for lr in (0.1, 0.2)]
    assert cells(table(runs), "experiment") == ["digits (runs/digits)"] * 2
    assert cells(table(runs[:1]), "experiment") == ["digits"]


def test_every_row_has_a_cell_for_every_column():
    runs = [measure(record({1: 0.5}, seed=k, target=None)) for k in range(2)]
    assert all(len(row) == len(HEADER) for row in table(runs))


def test_markdown():
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (796_840, "797 kB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")],
)
def test_bytes_are_decimal(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.24, "4.2 s"), (59.97, "1 min 00 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")],
)
def test_wall_times_are_readable(seconds, text):
    assert format_seconds(seconds) == text


def test_the_mean_curve_goes_on_with_the_best_of_a_run_that_reached_its_target():
    reached = measure(record({1: 0.8, 2: 1.0}))
    longer = measure(record({1: 0.6, 2: 0.5, 3: 0.9}, seed=1))
    # Round 2: (1.0 + 0.6) / 2, the best so far; round 3: (1.0 + 0.9) / 2.
    means = mean_of_best([reached, longer])
    assert [number for number, _ in means] == [1, 2, 3]
    assert [score for _, score in means] == pytest.approx([0.7, 0.8, 0.95])


def test_the_mean_curve_ends_with_a_run_that_did_not_reach_its_target():
    short = measure(record({1: 0.8, 2: 0.7}))
    longer = measure(record({1: 0.6, 2: 0.5, 3: 0.9}, seed=1))
    assert mean_of_best([short, longer]) == [(1, pytest.approx(0.7)), (2, pytest.approx(0.7))]


def test_the_mean_curve_has_the_rounds_in_which_every_run_was_evaluated():
    each = measure(record({0: 0.1, 1: 0.2, 2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7}))
    seldom = measure(record({0: 0.3, 2: 0.8, 4: 0.9}, seed=1))
    # Round 5: (0.7 + 0.9) / 2, for the other has reached its target and ended.
    means = mean_of_best([each, seldom])
    assert [number for number, _ in means] == [0, 2, 4, 5]
    assert [score for _, score in means] == pytest.approx([0.2, 0.6, 0.75, 0.8])


def test_the_same_runs_draw_the_same_bytes(tmp_path):
    runs = [measure(record({0: 0.1, 1: 0.5, 3: 0.8, 4: 0.95 - 0.1 * k}, seed=k)) for k in range(2)]
    runs.append(measure(record({1: 0.2, 2: 0.3}, name="other", target=None)))
    for name in ("a", "b"):
        draw(runs, [tmp_path / f"{name}.png", tmp_path / f"{name}.svg"])
    for suffix in ("png", "svg"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_a_regression_can_be_drawn(tmp_path):
    draw([measure(record({1: 4.0, 2: 2.0}, metric="loss"), 3.0)], [tmp_path / "loss.png"])
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_run_that_is_older_than_a_key_is_of_the_same_experiment():
    old, new = record({0: 0.1}, seed=1), record({0: 0.1}, seed=2)
    new.manifest["experiment"]["algorithm"]["clip"] = None
    new.manifest["experiment"]["run"]["evaluate_train"] = 5000  # changes no other number
    assert len(group([measure(old), measure(new)])) == 1
    new.manifest["experiment"]["algorithm"]["clip"] = 1.0
    assert len(group([measure(old), measure(new)])) == 2


def test_classes_are_named():
    run = record({1: 0.5})
    named = replace(run, manifest={**run.manifest, "classes": ["ill", "well"]})
    assert notes([measure(named), measure(named)]) == ["classes of digits: 0 ill, 1 well"]


def test_runs_of_one_experiment_that_different_code_trained_are_named():
    first, second = (measure(record({10: 0.80, 20: 0.90}, target=0.85)) for _ in range(2))
    old, compiled, none = (first._replace(kernels=k) for k in (None, "lstm-1a", "none"))
    (note,) = notes([compiled, none, second])
    assert "(lstm-1a; none)" in note
    assert notes([compiled, compiled, old]) == []
