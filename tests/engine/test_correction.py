"""Corrected local steps: against the pure gradient, and the same with in-place layers."""

import numpy as np
import pytest
import torch
from torch import nn

from potluck import FedAvg, Task, datasets, partitions, rounds
from potluck.core import Correction
from potluck.engine import TorchRuntime
from potluck.engine.runtime import pure_loss
from slope import slope_task


def wide():
    """A layer large enough to take its plain step while gradients flow."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1100), nn.ReLU(), nn.Linear(1100, 10))


class Normed(nn.Module):
    """Averaged buffers behind the parameters, a frozen layer and one that is never used."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.frozen = nn.Linear(64, 32).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, inputs):
        return self.head(torch.relu(self.frozen(self.norm(inputs.flatten(1)))))


@pytest.fixture(scope="module")
def data():
    return partitions.iid(datasets.digits(), clients=20, seed=0)


def steps(runtime, task, correction, num=3, lr=0.1):
    start = task.initial_weights(0)
    runtime.take(task.data.client(0))
    runtime.begin(start, np.arange(60), 0, correction)
    for i in range(num):
        runtime.step(slice(10 * i, 10 * i + 10), lr)
    return runtime.end()[0].copy()


CORRECTIONS = {
    "clipped": Correction(gradient_clip=0.3),
    "clipped to nothing less": Correction(gradient_clip=1e6),
    "proximal": Correction(proximal=2.0),
    "drift": Correction(drift=np.float32(0.01)),
    "all": Correction(gradient_clip=0.3, proximal=2.0, drift=np.float32(-0.02)),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrected_steps_are_those_of_the_formula(data, name):
    task = Task(model=wide, data=data)
    correction = CORRECTIONS[name]
    start = task.initial_weights(0)
    if correction.drift is not None:
        drift = correction.drift * np.random.default_rng(0).normal(size=len(start))
        correction = correction._replace(drift=drift.astype(np.float32))
    ours = steps(TorchRuntime(task), task, correction)
    gradient = torch.func.grad(pure_loss(task))
    inputs, targets = (torch.from_numpy(array.copy()) for array in data.client(0))
    weights = torch.from_numpy(start.copy())
    for i in range(3):
        rows = slice(10 * i, 10 * i + 10)
        g = gradient(weights, inputs[rows], targets[rows])
        if correction.gradient_clip is not None:
            g = g * min(1.0, correction.gradient_clip / float(g.norm()))
        g = g + correction.proximal * (weights - torch.from_numpy(start))
        if correction.drift is not None:
            g = g + torch.from_numpy(correction.drift)
        weights = weights - 0.1 * g
    np.testing.assert_allclose(ours, weights.numpy(), rtol=0, atol=2e-6)
    assert np.abs(ours - start).max() > 1e-3


def test_a_correction_lasts_until_the_next_client(data):
    task = Task(model=wide, data=data)
    fresh = steps(TorchRuntime(task), task, Correction())
    runtime = TorchRuntime(task)
    steps(runtime, task, Correction(gradient_clip=0.1, proximal=1.0))
    assert steps(runtime, task, Correction()).tobytes() == fresh.tobytes()


def test_what_has_no_gradient_is_not_corrected(data):
    task = Task(model=Normed, data=data)
    runtime = TorchRuntime(task)
    drift = np.ones(runtime.spec.dim, np.float32)
    plain = runtime.spec.unflatten(steps(runtime, task, Correction(), num=1))
    both = Correction(proximal=1.0, drift=drift)
    corrected = runtime.spec.unflatten(steps(runtime, task, both, num=1))
    for name in plain:
        buffer = name.startswith("norm.running")
        if buffer or name.startswith("frozen"):
            assert np.array_equal(corrected[name], plain[name]), name
        else:  # the first step of the proximal term is 0, and the drift's is −lr
            np.testing.assert_allclose(corrected[name], plain[name] - 0.1, atol=1e-6)


def test_clipping_by_hand():
    # (1, 3): ∂/∂w (w − 3)² = 2 (1 − 3) = −4, of norm 4: clipped to 1, w = 1 + 0.1·1 = 1.1
    # then 2 (1.1 − 3) = −3.8, clipped to 1: w = 1.2
    algorithm = FedAvg(client_lr=0.1, local_epochs=2, gradient_clip=1.0)
    *_, final = rounds(algorithm, slope_task([(1, 3)]), cohort=1.0, num_rounds=1)
    assert final.weights[0] == pytest.approx(1.2, rel=1e-6)


def test_a_gradient_of_zero_is_not_divided_by_its_norm():
    *_, final = rounds(
        FedAvg(client_lr=0.1, gradient_clip=1.0), slope_task([(1, 1)]), cohort=1.0, num_rounds=1
    )
    assert final.weights[0] == 1.0
