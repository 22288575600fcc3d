"""One model, made once: whatever its factory draws follows from the seed of the run."""

import copy
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from potluck import FedAvg, Loop, Task, evaluate, federated_evaluation, own_data, rounds
from potluck.engine import spec_of
from potluck.engine.module.copies import differences, leaves
from potluck.simulation import Auto, Vmap, Workers
from potluck.simulation.executors.train_loss import WithTrainLoss

SIZE, CLASSES = 12, 3
ALGORITHM = FedAvg(client_lr=0.2, local_epochs=2, batch_size=5)


def clients():
    generator = np.random.default_rng(0)
    made = {}
    for name, count in (("a", 12), ("b", 20), ("c", 9)):
        inputs = generator.standard_normal((count, SIZE)).astype(np.float32)
        targets = (inputs[:, :CLASSES].argmax(1)).astype(np.int64)
        made[name] = (inputs, targets)
    return own_data.from_clients(made)


DATA = clients()


class Constant(nn.Module):
    """A linear model behind something that was drawn when it was made."""

    def __init__(self):
        super().__init__()
        self.draw()
        self.head = nn.Linear(SIZE, CLASSES)

    def draw(self): ...

    def forward(self, inputs):
        return self.head(self.seen(inputs))


class IntegerBuffer(Constant):
    def draw(self):
        self.register_buffer("order", torch.randperm(SIZE))

    def seen(self, inputs):
        return inputs[:, self.order]


class BooleanBuffer(Constant):
    def draw(self):
        self.register_buffer("keep", torch.rand(SIZE) > 0.5)

    def seen(self, inputs):
        return inputs * self.keep


class DoubleBuffer(Constant):
    def draw(self):
        self.register_buffer("scale", torch.rand(SIZE, dtype=torch.float64))

    def seen(self, inputs):
        return inputs * self.scale.float()


class NotPersistent(Constant):
    def draw(self):
        self.register_buffer("order", torch.randperm(SIZE), persistent=False)

    def seen(self, inputs):
        return inputs[:, self.order]


class List(Constant):
    def draw(self):
        self.order = torch.randperm(SIZE).tolist()

    def seen(self, inputs):
        return inputs[:, self.order]


class TensorAttribute(Constant):
    def draw(self):
        self.features = torch.randn(SIZE, SIZE)

    def seen(self, inputs):
        return inputs @ self.features


class Array(Constant):
    def draw(self):
        self.order = np.random.permutation(SIZE)  # noqa: NPY002

    def seen(self, inputs):
        return inputs[:, torch.from_numpy(self.order)]


class Number(Constant):
    def draw(self):
        self.shift = random.randrange(SIZE)

    def seen(self, inputs):
        return inputs.roll(self.shift, 1)


class Nested(Constant):
    def draw(self):
        order = list(range(SIZE))
        random.shuffle(order)
        self.plan = {"order": tuple(order)}

    def seen(self, inputs):
        return inputs[:, list(self.plan["order"])]


class Closure(Constant):
    def draw(self):
        order = torch.randperm(SIZE)
        self.permute = lambda inputs: inputs[:, order]

    def seen(self, inputs):
        return self.permute(inputs)


class NumpyWeights(Constant):
    def draw(self):
        self.gain = nn.Parameter(torch.tensor(np.random.rand(SIZE), dtype=torch.float32))  # noqa: NPY002

    def seen(self, inputs):
        return inputs * self.gain


class Frozen(Constant):
    def draw(self):
        self.body = nn.Linear(SIZE, SIZE).requires_grad_(False)

    def seen(self, inputs):
        return self.body(inputs)


DRAWN = [
    IntegerBuffer, BooleanBuffer, DoubleBuffer, NotPersistent, List, TensorAttribute, Array, Number,
    Nested, Closure,
]  # fmt: skip
MODELS = [*DRAWN, NumpyWeights, Frozen]


def run(model, seed=0, executor="loop", **arguments):
    task = Task(model=model, data=DATA)
    arguments = {"num_rounds": 3, **arguments}
    return task, list(
        rounds(ALGORITHM, task, cohort=1.0, seed=seed, executor=executor, **arguments)
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_executor_trains_and_evaluates_the_same_model(model):
    torch.rand(3)  # a script draws, and that must not matter
    task, found = run(model, seed=5)
    assert found[-1].metrics == evaluate(task, found[-1].weights)
    for executor in ("workers", "vmap", "auto"):
        np.random.rand()  # noqa: NPY002
        random.random()
        _, other = run(model, seed=5, executor=executor)
        np.testing.assert_allclose(other[-1].weights, found[-1].weights, atol=1e-5)
        for one, two in zip(found, other, strict=True):
            assert one.metrics == pytest.approx(two.metrics, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_goes_on_with_its_own_constants(model):
    _, whole = run(model, seed=3)
    _, rest = run(model, seed=3, resume=(1, whole[1].state))
    assert np.array_equal(rest[-1].weights, whole[-1].weights)
    assert rest[-1].metrics == whole[-1].metrics


@pytest.mark.parametrize("model", DRAWN)
def test_seeds_differ_in_constants_too(model):
    task = Task(model=model, data=DATA)
    one, other = (leaves(task.module(seed=seed)) for seed in (0, 1))
    assert not differences(one, leaves(Task(model=model, data=DATA).module(seed=0)))
    names = {*differences(one, other)} - {"head.weight", "head.bias"}
    assert names


@pytest.mark.parametrize("executor", ["workers", "vmap"])
def test_one_executor_serves_runs_of_several_seeds(executor):
    task = Task(model=IntegerBuffer, data=DATA)
    made = Vmap(task) if executor == "vmap" else Workers(task, 2)
    try:
        for seed in (4, 0, 4):
            own = run(IntegerBuffer, seed=seed)[1][-1]
            *_, shared = rounds(ALGORITHM, task, cohort=1.0, num_rounds=3, seed=seed, executor=made)
            np.testing.assert_allclose(shared.weights, own.weights, atol=1e-5)
            assert shared.metrics == pytest.approx(own.metrics, rel=1e-3)
    finally:
        made.close()


@pytest.mark.parametrize("executor", [Loop, Workers, Vmap, Auto])
def test_an_executor_over_a_task_of_its_own_has_the_model_of_the_run(executor):
    own = run(IntegerBuffer, seed=4)[1]
    made = executor(Task(model=IntegerBuffer, data=DATA))
    try:
        _, shared = run(IntegerBuffer, seed=4, executor=WithTrainLoss(made, made._task, 5))
    finally:
        made.close()
    for one, other in zip(own, shared, strict=True):
        expected = {**one.metrics, "train_loss": other.metrics["train_loss"]}
        assert other.metrics == pytest.approx(expected, rel=1e-3)


def test_interleaved_runs_keep_their_own_models():
    task = Task(model=IntegerBuffer, data=DATA)
    both = [rounds(ALGORITHM, task, cohort=1.0, num_rounds=3, seed=seed) for seed in (0, 1)]
    pairs = list(zip(*both, strict=True))
    for k in (0, 1):
        alone = run(IntegerBuffer, seed=k)[1]
        assert [pair[k].metrics for pair in pairs] == [round.metrics for round in alone]


def test_weights_of_an_unknown_run_need_its_seed_where_constants_are_drawn():
    task, found = run(IntegerBuffer, seed=2)
    weights, metrics = found[-1].weights, found[-1].metrics
    assert evaluate(task, weights) == metrics  # the only run there was
    other = Task(model=IntegerBuffer, data=DATA)
    for judge in (evaluate, federated_evaluation):
        with pytest.raises(ValueError, match="seed must be given"):
            judge(other, weights)
    assert evaluate(other, weights, seed=2) == metrics
    assert federated_evaluation(other, weights, seed=2)["accuracy"].mean > 0.0
    list(rounds(ALGORITHM, task, num_rounds=1, seed=1))
    with pytest.raises(ValueError, match="seed must be given"):
        evaluate(task, weights)
    plain = Task(model=lambda: nn.Linear(SIZE, CLASSES), data=DATA)
    evaluate(plain, plain.initial_weights(0))
    evaluate(Task(model=lambda: nn.Linear(SIZE, CLASSES), data=DATA), plain.initial_weights(1))


def test_a_module_is_made_for_weights():
    task, found = run(IntegerBuffer, seed=2)
    module = task.module(found[-1].weights).eval()
    outputs = module(torch.tensor(DATA.test.inputs))
    right = (outputs.argmax(1) == torch.tensor(DATA.test.targets)).float().mean()
    assert float(right) == pytest.approx(found[-1].metrics["accuracy"])


@pytest.mark.parametrize("model", MODELS)
def test_a_module_that_is_handed_over_is_copied_with_its_constants(model):
    module = model()
    before = leaves(copy.deepcopy(module))
    for given in (module, lambda: module):
        task, found = run(given)
        spec = spec_of(module)
        start = spec.flatten({name: module.state_dict()[name] for name in spec.names})
        assert np.array_equal(found[0].weights, start)
        assert evaluate(task, found[-1].weights) == found[-1].metrics
        assert not differences(before, leaves(module))


class OwnGenerator(Constant):
    def draw(self):
        self.register_buffer("order", torch.from_numpy(np.random.default_rng().permutation(SIZE)))

    def seen(self, inputs):
        return inputs[:, self.order]


def test_a_factory_that_draws_from_elsewhere_is_refused_by_name():
    with pytest.raises(ValueError, match=r"another 'order' the second time"):
        run(OwnGenerator)


class Numbered(nn.Linear):
    """Numbers and names by which modules tell themselves apart are no constants of a model."""

    made: ClassVar[list[int]] = []

    def __init__(self):
        super().__init__(SIZE, CLASSES)
        self.made.append(0)
        self.number, self.name = len(self.made), f"module {len(self.made)}"


def test_modules_may_be_numbered():
    _, found = run(Numbered, num_rounds=1)
    assert evaluate(Task(model=Numbered, data=DATA), found[-1].weights) == found[-1].metrics


class WithGenerator(Constant):
    """PyTorch copies neither generators nor tensors that were computed."""

    def draw(self):
        self.generator = torch.Generator().manual_seed(7)
        self.scale = torch.ones(SIZE, requires_grad=True) * 2

    def seen(self, inputs):
        return inputs * self.scale.detach()


def test_modules_are_copied_with_what_pytorch_does_not_copy():
    task = Task(model=WithGenerator(), data=DATA)
    one, other = task.module(), task.module()
    torch.rand(3, generator=one.generator)
    assert not torch.equal(one.generator.get_state(), other.generator.get_state())
    assert Loop(task).evaluate(task.initial_weights(0))["loss"] > 0.0


class Patched(nn.Module):
    """What deep copies leave behind: closures over parts, hooks on layers and on weights."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, CLASSES)
        down = self.body.down = nn.Linear(SIZE, 2)
        plain = self.body.forward
        self.body.forward = lambda inputs: plain(inputs) + down(inputs).sum(1, keepdim=True)
        self.head.register_forward_hook(lambda _module, _inputs, outputs: outputs + down.bias[0])
        self.head.weight.register_hook(lambda gradient: 2 * gradient)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def test_a_module_that_is_handed_over_patched_trains_as_one_that_is_made():
    _, made = run(Patched, seed=0)
    module = Task(model=Patched, data=DATA).module(seed=0)
    _, given = run(module, seed=0)
    assert np.array_equal(given[-1].weights, made[-1].weights)
    assert run(lambda: module)[1][-1].metrics == made[-1].metrics


class OwnNumber(Constant):
    def draw(self):
        self.shift = int(np.random.default_rng().integers(1, 1 << 30))

    def seen(self, inputs):
        return inputs + self.shift


def test_a_number_that_decides_what_a_model_gives_is_refused_by_name():
    with pytest.raises(ValueError, match=r"another 'shift' the second time"):
        run(OwnNumber)


def test_global_randomness_is_the_callers():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    run(Number)
    run(Array, executor="vmap")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
