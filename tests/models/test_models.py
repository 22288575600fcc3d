"""The paper's models, tensors in vectors, and layers that update themselves."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from potluck import CNN, FedAvg, LogisticRegression, Task, TwoNN, rounds
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime, averaged_tensors, bind, spec_of
from potluck.engine.runtime import pure_loss


@pytest.mark.parametrize(
    ("model", "parameters"), [(TwoNN, 199_210), (CNN, 1_663_370), (LogisticRegression, 7_850)]
)
def test_parameter_counts_are_the_papers(model, parameters):
    module = model()
    assert spec_of(module).dim == parameters
    assert module(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_the_cnn_is_convolution_relu_pooling_as_written_in_textbooks():
    torch.manual_seed(0)
    module, inputs = CNN(), torch.rand(4, 1, 28, 28)
    maps = functional.max_pool2d(functional.relu(module.conv1(inputs)), 2)
    maps = functional.max_pool2d(functional.relu(module.conv2(maps)), 2)
    expected = module.output(functional.relu(module.hidden(maps.flatten(1))))
    torch.testing.assert_close(module(inputs), expected, rtol=1e-5, atol=1e-6)


def test_models_fit_other_images():
    assert CNN((3, 32, 32), 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert TwoNN((43,), 6)(torch.zeros(2, 43)).shape == (2, 6)


def test_a_bound_module_lives_in_the_vector():
    module = TwoNN((4,), 3)
    vector = torch.zeros(spec_of(module).dim)
    bind(module, vector)
    vector.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in module.parameters())
    module.output.bias.data.fill_(7.0)
    assert vector[-3:].tolist() == [7.0, 7.0, 7.0]


def test_batch_norm_statistics_ride_in_the_vector_and_counters_stay_local():
    names = [name for name, _ in averaged_tensors(nn.BatchNorm1d(3))]
    assert names == ["weight", "bias", "running_mean", "running_var"]


def test_a_parameter_that_is_not_float32_is_refused():
    with pytest.raises(TypeError, match=r"weight of dtype=torch\.float64"):
        spec_of(nn.Linear(2, 2).double())


def test_initial_weights_follow_from_the_seed_alone():
    task = task_with(lambda: Wide())
    first = task.initial_weights(1)
    torch.manual_seed(123)
    assert np.array_equal(first, task.initial_weights(1))
    assert not np.array_equal(first, task.initial_weights(2))
    module = Wide()
    given = task_with(module).initial_weights(1)
    assert np.array_equal(
        given[: module.first.weight.numel()], module.first.weight.detach().ravel()
    )


def test_initial_weights_are_the_same_while_other_threads_make_modules():
    """A server evaluates in a thread of its own, and devices in threads make theirs."""
    task = task_with(TwoNN)
    expected = task.initial_weights(1)
    ended = threading.Event()

    def others():
        while not ended.is_set():
            TorchRuntime(task)

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            np.testing.assert_array_equal(task.initial_weights(1), expected)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


class Wide(nn.Module):
    """Two layers large enough to update themselves."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 4000)
        self.second = nn.Linear(4000, 20)
        self.output = nn.Linear(20, 2)

    def forward(self, inputs):
        hidden = functional.relu(self.second(functional.relu(self.first(inputs))))
        return self.output(hidden)


class CalledTwice(Wide):
    def forward(self, inputs):
        hidden = functional.relu(self.second(functional.relu(self.first(inputs))))
        return self.output(functional.relu(self.second(functional.relu(self.first(hidden)))))


class SometimesTwice(Wide):
    def forward(self, inputs):
        hidden = super().forward(inputs)
        if inputs.shape[0] == 5:
            hidden = hidden + self.output(self.second(functional.relu(self.first(inputs * 2))))
        return hidden


class Tied(Wide):
    def __init__(self):
        super().__init__()
        self.third = nn.Linear(20, 4000)
        self.third.weight = self.first.weight

    def forward(self, inputs):
        return super().forward(inputs) + self.output(self.second(self.third(inputs).relu()))


class ReadDirectly(Wide):
    def forward(self, inputs):
        return super().forward(inputs) + functional.linear(inputs, self.first.weight).mean()


class Frozen(Wide):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


class Recurrent(Wide):
    """Three axes, no bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 14_000, bias=False)
        self.second = nn.Linear(14_000, 5)
        self.output = nn.Linear(20, 2)

    def forward(self, inputs):
        return self.output(
            self.second(functional.relu(self.first(inputs.view(-1, 4, 5)))).flatten(1)
        )


def task_with(model, loss=None):
    random = np.random.default_rng(0)
    examples = Examples(
        random.normal(size=(23, 20)).astype(np.float32), random.integers(0, 2, 23).astype(np.int64)
    )
    data = FederatedData(
        name="random",
        train=examples,
        test=examples,
        offsets=np.array([0, 23]),
        clients=("only",),
        num_classes=2,
    )
    return Task(model=model, data=data, loss=loss or functional.cross_entropy)


def trained(task, batches):
    """The weights after in-place steps and after pure steps, from the same start."""
    start = task.initial_weights(0)
    inputs, targets = (torch.from_numpy(a.copy()) for a in task.data.train)
    runtime = TorchRuntime(task)
    runtime.take(task.data.train)
    runtime.begin(start, np.arange(23), seed=0)
    frozen = ~torch.cat(
        [torch.full((p.numel(),), p.requires_grad) for p in runtime.module.parameters()]
    )
    pure, gradient = torch.from_numpy(start.copy()), torch.func.grad(pure_loss(task))
    for batch in batches:
        runtime.step(batch, 0.1)
        pure = pure - 0.1 * gradient(pure, inputs[batch], targets[batch]).masked_fill(frozen, 0.0)
    moved = np.abs(pure.numpy() - start).max()
    assert moved > 1e-3
    return runtime, np.abs(runtime.end()[0] - pure.numpy()).max() / moved


BATCHES = [slice(0, 10), slice(10, 20), slice(18, 23), slice(0, 23)]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (Wide, 2),
        (CalledTwice, 2),
        (SometimesTwice, 2),
        (Tied, 1),
        (ReadDirectly, 2),
        (Frozen, 1),
        (Recurrent, 2),
    ],
)
def test_layers_that_update_themselves_do_what_plain_steps_do(model, layers):
    runtime, error = trained(task_with(model), BATCHES)
    assert error < 1e-4
    assert len([] if runtime._layers is None else runtime._layers.layers) == layers


def test_a_penalty_on_the_weights_keeps_its_gradient():
    holder = []

    def model():
        holder.append(Wide())
        return holder[-1]

    def penalised(outputs, targets):
        return functional.cross_entropy(outputs, targets) + sum(
            (p**2).sum() for p in holder[-1].parameters()
        )

    task = task_with(model, penalised)
    start = task.initial_weights(0)
    runtime = TorchRuntime(task)  # the newest module, which the penalty is on
    runtime.take(task.data.train)
    runtime.begin(start, np.arange(23), seed=0)
    for _ in range(20):
        runtime.step(slice(0, 23), 0.05)
    assert np.linalg.norm(runtime.end()[0]) < 0.5 * np.linalg.norm(start)


def test_batch_norm_statistics_are_averaged():
    task = task_with(lambda: nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 2)))
    *_, final = rounds(FedAvg(client_lr=0.01, batch_size=None), task, cohort=1.0, num_rounds=1)
    spec = spec_of(task.module())
    statistics = spec.unflatten(final.weights)["0.running_mean"]
    expected = 0.1 * task.data.train.inputs.mean(axis=0)  # momentum 0.1, from 0
    np.testing.assert_allclose(statistics, expected, atol=1e-6)
