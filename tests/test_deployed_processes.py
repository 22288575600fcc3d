"""Twenty device processes and a server process: MNIST, bit for bit as in the simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load

from potluck.core import sample_cohort
from potluck.experiment import load_experiment
from potluck.loopback import LocalFederation
from potluck.simulation import build_algorithm, build_data, build_task, rounds
from potluck.tasks.task import spec_of

FILE = Path(__file__).parents[1] / "experiments/mnist-2nn-iid-e1-b10-c0.1.toml"
COUNT, ROUNDS, SEED = 20, 10, 7


def test_twenty_device_processes_train_mnist_as_the_simulation_does(published, tmp_path):
    published("mnist")
    overrides = [f"partition.clients={COUNT}", f"run.rounds={ROUNDS}", "run.cohort=0.25"]
    overrides += [f"run.seed={SEED}", "run.evaluate_every=10"]
    served = ["server.selection=sampled", f"server.population={COUNT}", "server.pace_seconds=0.5"]
    taken: set[tuple[int, int]] = set()
    with LocalFederation(FILE, tmp_path / "state", overrides=[*overrides, *served]) as federation:
        for device in range(COUNT):
            federation.start(device, invited=True)
        codes = []
        while len(codes) < COUNT:
            for news in federation.news(0.5):
                if news["is"] == "ended":
                    codes.append(news["code"])
                elif news["is"] == "event" and news["what"] == "accepted":
                    taken.add((news["round"], news["device"]))
        models = [
            load(federation.operator.fetch("export", version=number))
            for number in range(ROUNDS + 1)
        ]
    assert codes == [0] * COUNT
    assert taken == {
        (number, int(client))
        for number in range(1, ROUNDS + 1)
        for client in sample_cohort(COUNT, 0.25, seed=SEED, round=number)
    }
    experiment = load_experiment(FILE, overrides)
    task = build_task(experiment, build_data(experiment))
    algorithm = build_algorithm(experiment)
    made = rounds(algorithm, task, num_rounds=ROUNDS, cohort=0.25, seed=SEED, evaluate_every=ROUNDS)
    names = spec_of(task.model()).names
    for expected, model in zip(made, models, strict=True):
        weights = np.concatenate([model[name].ravel() for name in names])
        np.testing.assert_allclose(weights, expected.weights, rtol=0, atol=1e-6)
