"""Figure 1 on digits: its shape, its numbers by hand, and that it goes on where it stopped."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from potluck.data import datasets, partitions
from potluck.engine import Task, evaluate
from potluck.models import LogisticRegression
from potluck.reproduction import interpolation
from potluck.reproduction.interpolation import QUICK, Line, lines, load, save

COARSE = (-0.2, 0.0, 0.25, 0.5, 0.75, 1.0, 1.2)


@pytest.fixture(scope="module")
def found() -> list[Line]:
    return list(lines(QUICK, (1, 2), thetas=COARSE))


def test_from_different_initial_weights_the_average_is_worse_than_both(found):
    for line in (line for line in found if line.start == "different"):
        assert line.middle > 2 * max(line.parents)


def test_from_shared_initial_weights_the_lowest_is_below_both(found):
    for line in (line for line in found if line.start == "shared"):
        assert line.lowest < min(line.parents)
        assert line.middle < min(line.parents)


def test_at_0_and_1_the_line_meets_the_two_models(found):
    for line in found:
        assert line.losses[COARSE.index(0.0)] == line.parents[0]
        assert line.losses[COARSE.index(1.0)] == line.parents[1]
        assert line.losses[COARSE.index(0.5)] == line.middle


def test_the_shared_start_differs_from_the_other_in_one_initialisation_alone(found):
    different, shared = found[:2]
    assert different.parents[0] != different.parents[1]
    # w, at θ = 1, is trained from the same weights on the same sample in both.
    assert different.parents[1] == shared.parents[1]


def test_the_steps_are_the_papers():
    assert interpolation.PAPER.num_steps == 240
    assert QUICK.num_steps == 240
    assert len(interpolation.THETAS) == 50
    assert (interpolation.THETAS[0], interpolation.THETAS[-1]) == (-0.2, 1.2)


def test_the_loss_is_over_all_training_examples():
    dataset = datasets.digits()
    data = partitions.iid(dataset, clients=5, seed=0)
    task = Task(model=lambda: LogisticRegression((1, 8, 8)), data=data)
    zeros = np.zeros(650, np.float32)
    assert evaluate(task, zeros, dataset.train)["loss"] == pytest.approx(np.log(10))


def test_what_was_saved_is_not_made_again(found, tmp_path):
    path = tmp_path / "lines.json"
    save(QUICK, found[:3], path)
    kept = load(path, QUICK)
    assert kept == found[:3]
    more = list(lines(QUICK, (1, 2), kept, thetas=COARSE))
    assert [(line.seed, line.start) for line in more] == [(2, "shared")]
    assert more == found[3:]
    with pytest.raises(ValueError, match=r"--out"):
        load(path, interpolation.PAPER)


def test_the_page_by_hand(tmp_path):
    made = Line("shared", 1, (0.0, 0.5, 1.0), (0.4, 0.25, 0.6), (0.4, 0.6), 0.25)
    other = made._replace(seed=2, losses=(0.4, 0.35, 0.6), middle=0.35)
    ((start, seeds, parents, middle, lowest, _),) = interpolation.rows([made, other])
    assert (start, seeds) == ("the same initial weights", "2")
    # Parents 0.4, 0.6, 0.4, 0.6: mean 0.5, squares 4 · 0.01 over 3, root 0.115.
    assert parents == "0.500 ± 0.115"
    # 0.25 and 0.35: mean 0.3, squares 2 · 0.0025 over 1, root 0.071.
    assert middle == lowest == "0.300 ± 0.071"
    pictures = [tmp_path / "figure1.png", tmp_path / "figure1.svg"]
    interpolation.draw([made, made._replace(start="different")], pictures)
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(pictures[1]).getroot().tag.endswith("svg")
    assert "240 steps" in interpolation.page(QUICK, [made], "potluck reproduce figure1 --quick")
