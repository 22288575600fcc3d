"""Every example runs as a user runs it, without a network, and reaches what it promises."""

from __future__ import annotations

import ast
import difflib
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from potluck import FedAvg, Task, TwoNN, datasets, partitions, rounds
from potluck.core import derive_seed, stream

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
TESTED = [
    *("by_writer.py", "centralized.py", "federated.py", "hostile_model.py", "own_data.py"),
    "own_model.py",
]
NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there: no download can succeed


def run(name: str, folder: Path, data: str | None = None) -> str:
    """What an example prints, from an empty folder and with no data but those in `data`."""
    environment = {key: value for key, value in os.environ.items() if key != "POTLUCK_DATA"}
    environment |= {"POTLUCK_CACHE": str(folder / "cache")}
    environment |= {"http_proxy": NOWHERE, "https_proxy": NOWHERE}
    environment |= {"OMP_NUM_THREADS": "1"}  # tests share the cores, and threads would wait
    if data is not None:
        environment["POTLUCK_DATA"] = data
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(folder.iterdir()) == [], "an example leaves files behind"
    return done.stdout


def accuracies(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"accuracy (\d\.\d+)", output)]


def test_every_example_is_tested_here():
    assert NAMES == TESTED


def test_centralized(tmp_path):
    lines = run("centralized.py", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"round {n:2}" for n in range(0, 31, 10)]
    assert accuracies(lines[-1])[0] >= 0.96


def test_federated_averaging_with_one_client_is_sgd_as_centralized_says():
    data = partitions.iid(datasets.digits(), clients=1, seed=0)
    task = Task(model=lambda: TwoNN((1, 8, 8)), data=data)
    *_, last = rounds(FedAvg(client_lr=0.3, batch_size=10), task, cohort=1, num_rounds=2)
    torch.manual_seed(derive_seed(0, "weights"))
    model = TwoNN((1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    inputs, targets = map(torch.from_numpy, data.train)
    for epoch in (1, 2):
        order = torch.from_numpy(stream(0, "batches", epoch).permutation(len(inputs)))
        for batch in order.split(10):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(torch.from_numpy(last.weights), expected, rtol=0, atol=1e-5)


def test_federated(tmp_path):
    lines = run("federated.py", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"round {n:2}" for n in range(0, 31, 10)]
    assert accuracies(lines[-1])[0] >= 0.88


def test_hostile_model(tmp_path):
    """Its numbers are those of docs/what-leaves.md, but for how a processor rounds."""
    lines = run("hostile_model.py", tmp_path).splitlines()
    step, bounded, ordinary, clipped, noisy = (line.split(": ")[1] for line in lines)
    assert int(step.split()[0]) == pytest.approx(53, abs=3)
    assert bounded == "refused"
    assert int(ordinary.split()[0]) == pytest.approx(47, abs=12)
    assert clipped == step
    assert noisy == "0 of 80 rows read"


def test_own_data(tmp_path):
    output = run("own_data.py", tmp_path)
    assert "the three are equal: True" in output
    *clinics, mean = accuracies(output)
    assert len(clinics) == 6
    assert mean == pytest.approx(sum(clinics) / 6, abs=1e-3)
    assert mean >= 0.85


def test_own_model(tmp_path):
    output = run("own_model.py", tmp_path)
    top_two = [float(value) for value in re.findall(r"top two (\d\.\d+)", output)]
    assert accuracies(output)[-1] >= 0.94
    assert top_two[-1] >= accuracies(output)[-1]


def test_by_writer_without_mnist_says_so_and_takes_the_forms_of_digits(tmp_path):
    output = run("by_writer.py", tmp_path)
    assert output.startswith("MNIST and QMNIST are not here: ")
    assert "14 clients with 92 to 112 training images each" in output
    assert accuracies(output)[-1] >= 0.88
    assert re.search(r"per client: mean 0\.\d+, worst tenth 0\.\d+", output)


def test_by_writer_with_mnist(tmp_path: Path, published: Callable[[str], list[Path]]):
    published("mnist")
    published("qmnist")
    output = run("by_writer.py", tmp_path, os.environ["POTLUCK_DATA"])
    assert "539 clients with 19 to 131 training images each" in output
    assert accuracies(output)[-1] >= 0.80


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_there_are_few(name):
    assert len(NAMES) <= 8
    assert len((EXAMPLES / name).read_text().splitlines()) <= 80


def test_the_federated_program_is_twelve_lines_and_six_concepts():
    source = (EXAMPLES / "federated.py").read_text()
    assert len(lines_of_code(source)) <= 12
    assert len(imported(source)) <= 6


def test_the_pair_differs_only_by_what_federated_learning_is():
    central, federated = (
        lines_of_code((EXAMPLES / name).read_text()) for name in ("centralized.py", "federated.py")
    )
    changes = [line for line in difflib.ndiff(central, federated) if line.startswith(("- ", "+ "))]
    words = ("data = ", "algorithm = ", "for round in ")  # who has what; local work; the cohort
    assert [line[2:].startswith(words) for line in changes] == [True] * 6


def lines_of_code(source: str) -> list[str]:
    """The lines that are neither blank, comment nor docstring."""
    tree = ast.parse(source)
    docstring = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    rows = {t.start[0] for t in tokens if t.type not in (*skipped, tokenize.ENDMARKER)}
    text = source.splitlines()
    return [text[row - 1] for row in sorted(rows) if row > (docstring or 0)]


def imported(source: str) -> list[str]:
    """Every name that an `import` binds."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    return [alias.asname or alias.name for node in nodes for alias in node.names]
