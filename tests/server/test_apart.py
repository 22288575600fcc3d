"""The judge in a process of its own gives the answers of the one beside it, and ends with us."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from potluck.config.experiment import load_experiment
from potluck.core import DataError, WorkerError
from potluck.server.evaluator import DistantJudge, Judge, judge_of

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


def test_a_distant_judge_says_what_the_one_beside_us_says(experiment):
    distant, beside = DistantJudge(experiment), Judge(experiment)
    far, near = distant.begin(("charging",)), beside.begin(("charging",))
    assert np.array_equal(far.weights, near.weights)
    assert (far.spec, far.plan) == (near.spec, near.plan)
    assert distant.evaluate(near.weights) == beside.evaluate(near.weights)
    distant.close()


def test_a_child_that_was_killed_is_started_again(experiment):
    distant = DistantJudge(experiment)
    weights = distant.begin(()).weights
    first = distant.evaluate(weights)
    process, _ = distant._child
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert distant.evaluate(weights) == first
    distant.close()
    assert distant._child is None


def test_an_answer_that_is_given_up_is_not_waited_for(experiment):
    distant = DistantJudge(experiment)
    weights = distant.begin(()).weights
    raised = []

    def ask():
        with pytest.raises(WorkerError, match="server ends") as caught:
            distant.evaluate(weights)
        raised.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    while distant._child is None:  # PyTorch is loaded for seconds after that
        assert asking.is_alive()
    distant.give_up()
    asking.join()
    assert raised
    assert distant._child is None
    with pytest.raises(WorkerError, match="server ends"):
        distant.evaluate(weights)


def test_what_goes_wrong_in_the_child_is_raised_here(experiment):
    bad = experiment.model_copy(
        update={"task": experiment.task.model_copy(update={"data": "folder", "path": "nowhere"})}
    )
    with pytest.raises((DataError, ValueError, OSError)):
        DistantJudge(bad).begin(())


def test_the_judge_is_beside_us_where_pytorch_is_loaded_anyway(experiment):
    assert isinstance(judge_of(experiment), Judge) == ("torch" in sys.modules)


def test_a_server_imports_no_pytorch():
    script = "import sys, potluck.cli.serve, potluck.server.process\n"
    script += "import potluck.server.evaluator, potluck.config.plan\n"
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0)
