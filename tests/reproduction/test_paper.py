"""The paper's cells and their miniatures: each has an experiment, and its setting is the cell's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from potluck.reproduction import paper, quick
from potluck.reproduction.grid import Grid, load_cell
from potluck.reproduction.paper import Cell
from potluck.simulation import build_algorithm

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WHATS = [what for what in paper.TITLES if what != "figure1"]
PAPER = {cell.name: cell for what in WHATS for cell in paper.cells(what)}
QUICK = {cell.name: cell for what in WHATS for cell in quick.cells(what)}
KINDS = {"iid": {"iid"}, "two-shard": {"shards"}, "role": {"role"}, "module": {"module"}}


def check(cell: Cell) -> None:
    experiment = load_cell(Grid(cells=[cell], experiments=EXPERIMENTS), cell)
    algorithm = build_algorithm(experiment)
    assert experiment.name == cell.name
    assert experiment.task.model in (cell.model.lower(), f"char-{cell.model.lower()}")
    assert experiment.partition.kind in KINDS[cell.division]
    assert (algorithm.local_epochs, algorithm.batch_size) == (cell.epochs, cell.batch)
    assert experiment.run.cohort == cell.fraction
    assert isinstance(experiment.run.cohort, float)  # 1.0 is all clients, 1 is one
    assert experiment.run.target == cell.target
    if cell.paper is not None:
        assert experiment.run.rounds >= cell.paper
    if cell.name.endswith("train-loss"):
        assert experiment.run.evaluate_train
        assert not experiment.run.stop_at_target


@pytest.mark.parametrize("cell", PAPER.values(), ids=PAPER)
def test_a_cell_of_the_paper_has_the_experiment_of_its_setting(cell):
    check(cell)


@pytest.mark.parametrize("cell", QUICK.values(), ids=QUICK)
def test_a_cell_of_a_miniature_has_the_experiment_of_its_setting(cell):
    check(cell)


@pytest.mark.parametrize("what", WHATS)
def test_a_file_names_the_number_that_it_answers(what):
    for cell in paper.cells(what):
        if what.startswith("table") and not cell.overrides:
            text = (EXPERIMENTS / f"{cell.file}.toml").read_text()
            comment = " ".join(re.findall(r"^# (.*)", text, re.MULTILINE))
            assert f"{cell.paper} (table {what[-1]})" in comment


def test_some_numbers_by_hand():
    def number(what: str, name: str) -> int | None:
        return next(cell.paper for cell in paper.cells(what) if cell.name == name)

    assert number("table1", "mnist-2nn-iid-e1-b10-c0.1") == 87
    assert number("table4", "mnist-2nn-iid-e1-b10-c0.1") == 92
    assert number("table1", "mnist-cnn-two-shard-e5-b10-c1.0") == 97
    assert number("table1", "mnist-2nn-two-shard-fedsgd-c0.5") is None
    assert number("table2", "mnist-cnn-two-shard-e20-b10-c0.1") == 173
    assert number("table2", "shakespeare-lstm-role-e5-b10-c0.1") == 41
    assert number("table2", "shakespeare-lstm-iid-e5-b10-c0.1") == 192
    assert number("table2", "shakespeare-lstm-role-fedsgd-c0.1") == 3906


def test_the_tables_are_whole():
    counts = {what: len(paper.cells(what)) for what in WHATS}
    assert counts == {
        "table1": 8 * 5,
        "table2": 2 * 9 + 2 * 6,
        "table4": 2 * 4,
        "figure2": 2 * 9 + 2 * 6,
        "figure3": 2 * 8,
        "figure8": 2 * 8,
        "beyond": 2 * 2,
    }
    assert paper.cells("figure2") == paper.cells("table2")


def test_what_goes_beyond_the_paper_differs_in_the_optimizer_alone():
    cells = paper.cells("beyond")
    for plain, other in zip(cells[::2], cells[1::2], strict=True):
        assert plain in paper.cells("table2")
        assert other.name.startswith(f"{plain.name}-")
        assert other.setting == f"{plain.setting}, {other.optimizer}"
        contents = [
            load_cell(Grid(cells=[cell], experiments=EXPERIMENTS), cell).model_dump()
            for cell in (plain, other)
        ]
        for content in contents:
            del content["name"]
            for key in ("client_lr", "client_schedule", "server", "server_schedule"):
                del content["algorithm"][key]
        assert contents[0] == contents[1]


def test_cells_of_one_figure_differ_in_local_epochs_alone():
    mine = [cell for cell in paper.cells("figure8") if cell.division == "iid"]
    assert [cell.epochs for cell in mine] == [1, 5, 10, 20, 50, 100, 200, 400]
    grid = Grid(cells=mine, experiments=EXPERIMENTS)
    contents = [load_cell(grid, cell).model_dump() for cell in mine]
    for content in contents:
        del content["name"], content["algorithm"]["local_epochs"]
    assert all(content == contents[0] for content in contents)


def test_a_miniature_needs_no_download():
    for cell in QUICK.values():
        experiment = load_cell(Grid(cells=[cell], experiments=EXPERIMENTS), cell)
        assert experiment.task.data in ("digits", "pythonlib")


def test_what_is_no_table_is_refused():
    with pytest.raises(ValueError, match=r"got what='table3'.* table1, table2"):
        paper.cells("table3")
