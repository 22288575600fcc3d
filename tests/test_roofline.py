"""The benchmark against the machine: what it counts, and that it runs."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "roofline"


@pytest.fixture(scope="module")
def work():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "work.py"))
    finally:
        sys.path[:] = before
        for name in ("run", "bare"):  # of benchmarks/engine
            sys.modules.pop(name, None)


def test_operations_and_bytes_are_counted_by_layer(work):
    logistic = work["WORK"]["C"]
    task = logistic.task(True)  # 20 examples a client: 2 steps
    assert logistic.flops(task, [0, 1]) == 2 * 20 * 2 * (2 * 784 * 10)
    weights = 3 * 4 * 7840 * 2 * 2  # read, read and written, twice for each of two clients
    batches, updates = 2 * 20 * 784 * 4, 2 * 7840 * 40
    assert logistic.bytes(task, [0, 1]) == weights + batches + updates
    cnn = work["WORK"]["A"]
    forward = 2 * (25 * 32 * 784 + 800 * 64 * 196 + 3136 * 512 + 5120)
    assert cnn.flops(task, [0]) == 20 * (3 * forward - 2 * 25 * 32 * 784)


@pytest.mark.soak
def test_the_benchmark_runs(tmp_path):
    arguments = ["--quick", "--parts", "C", "--rounds", "2", "--out", str(tmp_path)]
    subprocess.run([sys.executable, FOLDER / "run.py", *arguments], check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    part = results["parts"]["C"]
    assert part["seconds_a_round"] > 0.0
    assert 0.0 < part["share_of_arithmetic"] < 1.0
    assert sum(part["time"].values()) == pytest.approx(1.0, abs=0.01)
    assert results["rates"]["one core"]["copy"] > 1e8


def test_the_tables_are_those_of_the_committed_results():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        tables = runpy.run_path(str(FOLDER / "run.py"))["tables"]
    finally:
        sys.path[:] = before
        for name in ("work", "run", "bare"):
            sys.modules.pop(name, None)
    written = (FOLDER / "README.md").read_text()
    assert tables(json.loads((FOLDER / "results.json").read_text())) in written
