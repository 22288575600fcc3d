"""The evaluator in a child process gives the answers of the one in ours, and ends with us."""

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import wait

import numpy as np
import psutil
import pytest

from potluck.config.experiment import load_experiment
from potluck.core import DataError, WorkerError
from potluck.server.evaluator import EvaluatorProcess, RunEvaluator, evaluator_of

EXPERIMENT = """
name = "apart"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 4
[algorithm]
client_lr = 0.1
[run]
rounds = 1
cohort = 2
"""


@pytest.fixture
def experiment(tmp_path):
    file = tmp_path / "apart.toml"
    file.write_text(EXPERIMENT)
    return load_experiment(file, [])


@pytest.fixture
def process(experiment):
    evaluator = EvaluatorProcess(experiment)
    yield evaluator
    evaluator.cancel()


@pytest.fixture
def children():
    """Gives the processes that were started since the test began."""
    before = set(mp.active_children())
    return lambda: list(set(mp.active_children()) - before)


def test_a_process_gives_the_answers_of_the_evaluator_beside_us(experiment, process):
    beside = RunEvaluator(experiment)
    far, near = process.begin(("charging",)), beside.begin(("charging",))
    assert np.array_equal(far.weights, near.weights)
    assert (far.spec, far.plan) == (near.spec, near.plan)
    assert process.evaluate(near.weights) == beside.evaluate(near.weights)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGALRM])
def test_a_child_that_was_killed_or_ended_by_its_clock_is_started_again(process, children, number):
    weights = process.begin(()).weights
    first = process.evaluate(weights)
    [child] = children()
    os.kill(child.pid, number)
    assert wait([child.sentinel], 10)
    assert process.evaluate(weights) == first
    assert child not in children()


def test_an_answer_that_is_cancelled_is_not_waited_for(process, children):
    raised = []

    def ask():
        with pytest.raises(WorkerError, match="server ends") as caught:
            process.begin(())
        raised.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    while not (started := children()):  # PyTorch is loaded for seconds after that
        assert asking.is_alive()
    process.cancel()
    asking.join()
    assert raised
    assert wait([child.sentinel for child in started], 10)
    with pytest.raises(WorkerError, match="server ends"):
        process.begin(())
    assert children() == []


def test_a_child_ends_when_its_server_is_killed(tmp_path, experiment):
    script = """
import multiprocessing, sys, time
from potluck.server.evaluator import EvaluatorProcess
from potluck.config.experiment import load_experiment
if __name__ == "__main__":
    evaluator = EvaluatorProcess(load_experiment(sys.argv[1]))
    evaluator.begin(())
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    evaluator.begin(("charging",))
    time.sleep(600)
"""
    (tmp_path / "server.py").write_text(script)
    command = [sys.executable, tmp_path / "server.py", tmp_path / "apart.toml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        [child] = map(psutil.Process, map(int, server.stdout.readline().split()))
        server.kill()
        child.wait(10)


def test_what_goes_wrong_in_the_child_is_raised_here(experiment):
    bad = experiment.model_copy(
        update={"task": experiment.task.model_copy(update={"data": "folder", "path": "nowhere"})}
    )
    with pytest.raises((DataError, ValueError, OSError)):
        EvaluatorProcess(bad).begin(())


def test_the_evaluator_is_beside_us_where_pytorch_is_loaded_anyway(experiment):
    assert isinstance(evaluator_of(experiment), RunEvaluator) == ("torch" in sys.modules)


def test_a_server_imports_no_pytorch():
    script = "import sys, potluck.cli.serve, potluck.server.process\n"
    script += "import potluck.server.evaluator, potluck.config.plan\n"
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0)
