"""Device processes and a server process: MNIST, bit for bit as in the simulation.

They run in `make soak`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from potluck.config.experiment import load_experiment
from potluck.core import sample_cohort
from potluck.demo.federation import LocalFederation
from potluck.engine.task import spec_of
from potluck.simulation import build_algorithm, build_data, build_task, rounds

FILE = Path(__file__).parents[2] / "experiments/mnist-2nn-iid-e1-b10-c0.1.toml"
SEED = 7


@pytest.mark.soak
@pytest.mark.parametrize(("count", "num_rounds"), [(6, 3), (20, 10)])
def test_device_processes_train_mnist_as_the_simulation_does(
    published, tmp_path, count, num_rounds
):
    published("mnist")
    overrides = [f"partition.clients={count}", f"run.rounds={num_rounds}", "run.cohort=0.5"]
    overrides += [f"run.seed={SEED}", f"run.evaluate_every={num_rounds}"]
    served = ["server.selection=sampled", f"server.population={count}", "server.pace_seconds=0.5"]
    taken: set[tuple[int, int]] = set()
    with LocalFederation(FILE, tmp_path / "state", overrides=[*overrides, *served]) as federation:
        for device in range(count):
            federation.start(device, invited=True)
        codes = []
        while len(codes) < count:
            for news in federation.news(0.5):
                if news["is"] == "ended":
                    codes.append(news["code"])
                elif news["is"] == "event" and news["what"] == "accepted":
                    taken.add((news["round"], news["device"]))
        models = [
            load(federation.operator.fetch("export", version=number))
            for number in range(num_rounds + 1)
        ]
    assert codes == [0] * count
    assert taken == {
        (number, int(client))
        for number in range(1, num_rounds + 1)
        for client in sample_cohort(count, 0.5, seed=SEED, round=number)
    }
    experiment = load_experiment(FILE, overrides)
    task = build_task(experiment, build_data(experiment))
    algorithm = build_algorithm(experiment)
    made = rounds(
        algorithm, task, num_rounds=num_rounds, cohort=0.5, seed=SEED, evaluate_every=num_rounds
    )
    names = spec_of(task.model()).names
    for expected, model in zip(made, models, strict=True):
        weights = np.concatenate([model[name].ravel() for name in names])
        np.testing.assert_allclose(weights, expected.weights, rtol=0, atol=1e-6)
