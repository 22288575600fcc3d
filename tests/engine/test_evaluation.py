"""Evaluation: the loss and every metric are those of all examples at once, however they are cut."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potluck import Loop, Task, Vmap, Workers, own_data
from potluck.core import TaskError
from potluck.data import Examples
from potluck.data.federated import FederatedData
from potluck.engine import Evaluator, bind, evaluate, evaluation_batches, federated_evaluation
from potluck.engine.evaluation import batches_of
from potluck.models import mean_squared_error
from potluck.models.task_metrics import RootMeanSquaredError, RSquared, accuracy

SIZES = (1, 2, 7, 40)


def made(inputs, targets, num_classes, sizes=SIZES, **rest):
    """Data with these examples as the first clients' own, and as a test set of four parts."""
    offsets = np.cumsum([0, *sizes])
    assert offsets[-1] <= len(inputs)
    examples = Examples(inputs[: offsets[-1]], targets[: offsets[-1]])
    return FederatedData(
        name="made",
        train=examples,
        offsets=offsets,
        test=examples,
        test_offsets=offsets,
        clients=tuple(f"c{k}" for k in range(len(sizes))),
        num_classes=num_classes,
        **rest,
    )


def classes(num=50, shape=(), seed=0, ignored=None):
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((num, 6, *shape)).astype(np.float32)
    targets = np.sort(random.integers(0, 3, (num, *shape)), axis=0)  # batches differ by their class
    if ignored is not None:
        targets[random.random(targets.shape) < 0.4] = ignored
    return inputs, targets


def numbers(num=50, shape=()):
    random = np.random.default_rng(1)
    inputs = random.standard_normal((num, 6)).astype(np.float32)
    targets = (inputs.sum(1) + random.standard_normal(num)).astype(np.float32)
    return inputs, np.sort(targets).reshape(num, *shape)


def at_once(task, weights):
    """The outputs for the whole test set in one batch, and its targets."""
    module = task.module().eval()
    bind(module, torch.tensor(weights))
    with torch.no_grad():
        outputs = module(torch.tensor(task.data.test.inputs))
    return outputs, torch.tensor(task.data.test.targets)


WEIGHT = torch.tensor([0.2, 1.0, 5.0])


def soft_f1(outputs, targets):
    chances = outputs.softmax(1)
    wanted = F.one_hot(targets, 3).float()
    return 1 - (2 * (chances * wanted).sum(0) / (chances + wanted).sum(0)).mean()


def contrast(outputs, targets):
    apart = (outputs[:, None] - outputs[None]).square().sum(2)
    same = (targets[:, None] == targets[None]).float()
    return (same * apart + (1 - same) * (1 - apart).clamp(min=0)).mean()


CLASS_LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "function": F.cross_entropy,
    "weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "weights in a partial": partial(F.cross_entropy, weight=WEIGHT),
    "weights in a lambda": lambda o, t: F.cross_entropy(o, t, weight=WEIGHT),
    "weights and smoothing": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    "an ignored class": nn.CrossEntropyLoss(ignore_index=1),
    "an ignored class in a lambda": lambda o, t: F.cross_entropy(o, t, ignore_index=0),
    "a class of weight 0": nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0])),
    "likelihood": lambda o, t: F.nll_loss(o.log_softmax(1), t, weight=WEIGHT),
    "margins": nn.MultiMarginLoss(),
    "a sum": nn.CrossEntropyLoss(reduction="sum"),
    "a sum with weights": partial(F.cross_entropy, weight=WEIGHT, reduction="sum"),
    "soft F1": soft_f1,
    "pairs": contrast,
    "a root": lambda o, t: F.cross_entropy(o, t).sqrt(),
    "one number": lambda o, t: F.cross_entropy(o, t).reshape(1),
    "float64": lambda o, t: F.cross_entropy(o.double(), t),
}


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("bias", [False, True], ids=["all outputs alike", "outputs differ"])
def test_a_loss_is_that_of_the_whole_test_set_in_one_batch(name, bias):
    data = made(*classes(), 3)
    task = Task(model=lambda: nn.Linear(6, 3), data=data, loss=CLASS_LOSSES[name])
    weights = task.initial_weights(0) * float(bias)
    outputs, targets = at_once(task, weights)
    expected = float(CLASS_LOSSES[name](outputs, targets))
    for size in (1, 3, 7, 16, 100):
        evaluator = Evaluator(task)
        evaluator.load(weights)
        found = evaluator.evaluate(batches_of(data.test, size))["loss"]
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-6), size


@pytest.mark.parametrize("ignored", [-100, 2, 9])
@pytest.mark.parametrize("how", ["module", "partial", "lambda"])
def test_pixels_that_are_ignored_count_nowhere(ignored, how):
    inputs, targets = classes(shape=(4, 3), ignored=ignored)
    targets[:9] = ignored  # batches in which nothing counts
    data = made(inputs, targets, 3)
    loss = {
        "module": nn.CrossEntropyLoss(ignore_index=ignored),
        "partial": partial(F.cross_entropy, ignore_index=ignored),
        "lambda": lambda o, t: F.cross_entropy(o, t, ignore_index=ignored),
    }[how]
    task = Task(model=lambda: nn.Conv2d(6, 3, 1), data=data, loss=loss)
    weights = task.initial_weights(0)
    outputs, wanted = at_once(task, weights)
    counts = (wanted != ignored) & (wanted >= 0)
    right = float((outputs.argmax(1) == wanted)[counts].float().mean())
    for size in (1, 4, 50):
        evaluator = Evaluator(task)
        evaluator.load(weights)
        found = evaluator.evaluate(batches_of(data.test, size))
        assert found["loss"] == pytest.approx(float(loss(outputs, wanted)), rel=1e-5)
        if how != "lambda" or ignored == -100:  # what a lambda ignores, accuracy cannot know
            assert found["accuracy"] == pytest.approx(right)


REGRESSION_LOSSES = {
    "default": mean_squared_error,
    "absolute": F.l1_loss,
    "huber": nn.HuberLoss(delta=0.5),
    "log-cosh": lambda o, t: (o - t).cosh().log().mean(),
    "root": lambda o, t: F.mse_loss(o, t).sqrt(),
    "a sum": nn.MSELoss(reduction="sum"),
    "correlation": lambda o, t: 1 - torch.corrcoef(torch.stack([o.ravel(), t.ravel()]))[0, 1],
}


@pytest.mark.parametrize("name", REGRESSION_LOSSES)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["[n]", "[n, 1]"])
def test_a_regression_is_judged_by_its_errors_over_all_examples(name, shape):
    data = made(*numbers(shape=shape), 0)
    model = nn.Linear(6, 1) if shape else nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    task = Task(model=model, data=data, loss=REGRESSION_LOSSES[name])
    weights = task.initial_weights(0)
    outputs, targets = at_once(task, weights)
    errors = (outputs - targets).double().numpy().ravel()
    wanted = targets.double().numpy().ravel()
    for size in (3, 16, 100):
        evaluator = Evaluator(task)
        evaluator.load(weights)
        found = evaluator.evaluate(batches_of(data.test, size))
        expected = float(REGRESSION_LOSSES[name](outputs, targets))
        assert found["loss"] == pytest.approx(expected, rel=2e-5)
        assert found["mae"] == pytest.approx(np.abs(errors).mean())
        assert found["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
        spread = ((wanted - wanted.mean()) ** 2).sum()
        assert found["r2"] == pytest.approx(1 - (errors**2).sum() / spread)
        assert set(found) == {"loss", "mae", "rmse", "r2"}


def test_many_targets_an_example_have_the_mean_r2_of_theirs():
    random = np.random.default_rng(0)
    targets = (random.standard_normal((50, 3)) * [1, 5, 0.2]).astype(np.float32)
    data = made(random.standard_normal((50, 6)).astype(np.float32), targets, 0)
    task = Task(model=nn.Linear(6, 3), data=data)
    outputs, wanted = (part.double().numpy() for part in at_once(task, task.initial_weights(0)))
    errors = ((outputs - wanted) ** 2).sum(0)
    found = evaluate(task, task.initial_weights(0))
    assert found["r2"] == pytest.approx(
        (1 - errors / ((wanted - wanted.mean(0)) ** 2).sum(0)).mean()
    )
    assert found["rmse"] == pytest.approx(np.sqrt(((outputs - wanted) ** 2).mean()))


def test_by_hand_rmse_and_r2_of_three_examples():
    outputs, targets = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 4.0, 4.0])
    rmse, r2 = RootMeanSquaredError(), RSquared()  # errors 0, 2, 2; mean 3, spread 4 + 1 + 1
    assert rmse.value(rmse.terms(outputs, targets).sum(0).numpy()) == pytest.approx((8 / 3) ** 0.5)
    assert r2.value(r2.terms(outputs, targets).sum(0).numpy()) == pytest.approx(1 - 8 / 6)
    alike = r2.terms(outputs, torch.full((3,), 2000.0)).sum(0).numpy()
    assert np.isnan(r2.value(alike))


def macro_recall(outputs, targets):
    right = outputs.argmax(1) == targets
    return float(np.mean([right[targets == k].float().mean() for k in targets.unique()]))


METRICS = {
    "values": lambda o, t: (o.argmax(1) == t).float(),
    "Booleans": lambda o, t: o.argmax(1) == t,
    "NumPy values": lambda o, t: (o.argmax(1) == t).numpy(),
    "a mean": lambda o, t: (o.argmax(1) == t).float().mean(),
    "a number": lambda o, t: float((o.argmax(1) == t).float().mean()),
    "a NumPy number": lambda o, t: np.mean((o.argmax(1) == t).numpy()),
    "no mean": macro_recall,
    "a count": lambda o, t: (o.argmax(1) == t).sum(),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_that_of_the_whole_test_set_in_one_batch(name):
    data = made(*classes(), 3)
    task = Task(model=nn.Linear(6, 3), data=data, metrics={name: METRICS[name]})
    weights = task.initial_weights(0)
    expected = float(np.mean(np.asarray(METRICS[name](*at_once(task, weights)), np.float64)))
    for size in (3, 16, 100):
        evaluator = Evaluator(task)
        evaluator.load(weights)
        found = evaluator.evaluate(batches_of(data.test, size))[name]
        assert found == pytest.approx(expected), size


WRONG_METRICS = {
    "compares each with all": lambda o, t: (o.argmax(1)[:, None] == t).float(),
    "a value per class": lambda o, t: torch.ones(3),
    "compares with the batch": lambda o, t: o[:, 0] - o[:, 0].mean(),
    "nothing": lambda o, t: None,
    "a word": lambda o, t: "good",
    "fails": lambda o, t: o @ t,
}


@pytest.mark.parametrize("name", WRONG_METRICS)
def test_a_metric_that_breaks_its_contract_is_refused_by_name(name):
    data = made(*classes(), 3)
    task = Task(model=nn.Linear(6, 3), data=data, metrics={"mine": WRONG_METRICS[name]})
    with pytest.raises(TaskError, match="metric 'mine' must"):
        evaluate(task, task.initial_weights(0))


def test_a_metric_of_targets_in_a_column_does_not_broadcast():
    inputs, targets = classes()
    data = made(inputs, targets[:, None], 3)
    loss = lambda o, t: F.cross_entropy(o, t.squeeze(1))  # noqa: E731
    wrong = lambda o, t: (o.argmax(1) == t).float()  # noqa: E731
    task = Task(model=nn.Linear(6, 3), data=data, loss=loss, metrics={"mine": wrong})
    with pytest.raises(TaskError, match="does not depend on the others"):
        evaluate(task, task.initial_weights(0))
    outputs, wanted = at_once(task, task.initial_weights(0))
    right = float((outputs.argmax(1) == wanted.squeeze(1)).float().mean())
    by_default = Task(model=task.model, data=data, loss=loss)
    assert evaluate(by_default, task.initial_weights(0))["accuracy"] == pytest.approx(right)


BINARY = {  # the loss, what the model ends with, where label 1 begins
    "logits": (lambda o, t: F.binary_cross_entropy_with_logits(o, t.float()), nn.Identity(), 0.0),
    "weighted": (
        lambda o, t: F.binary_cross_entropy_with_logits(o, t.float(), pos_weight=torch.tensor(9.0)),
        nn.Identity(),
        0.0,
    ),
    "probabilities": (lambda o, t: F.binary_cross_entropy(o, t.float()), nn.Sigmoid(), 0.5),
    "squares": (lambda o, t: F.mse_loss(o, t.float()), nn.Sigmoid(), 0.5),
    "clamped": (
        lambda o, t: (
            -(t * o.clamp(1e-6, 1).log() * 3 + (1 - t) * (1 - o).clamp(1e-6, 1).log()).mean()
        ),
        nn.Sigmoid(),
        0.5,
    ),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("labels", [0, 4], ids=["one label", "many labels"])
def test_accuracy_of_one_output_per_label_begins_where_the_loss_says(name, labels):
    loss, last, threshold = BINARY[name]
    random = np.random.default_rng(0)
    inputs = random.standard_normal((50, 6)).astype(np.float32)
    wanted = random.integers(0, 2, (50, labels) if labels else 50)
    model = nn.Sequential(nn.Linear(6, max(labels, 1)), last)
    if not labels:
        model.append(nn.Flatten(0))
    kind = "multilabel" if labels else "classes"
    targets = wanted.astype(np.float32) if labels else wanted
    data = made(inputs, targets, labels or 2, kind=kind)
    task = Task(model=model, data=data, loss=loss)
    outputs, _ = at_once(task, task.initial_weights(0))
    right = float(((outputs > threshold).numpy() == wanted).mean())
    assert evaluate(task, task.initial_weights(0))["accuracy"] == pytest.approx(right)


def test_one_hot_targets_have_the_accuracy_of_their_classes():
    inputs, targets = classes()
    data = made(inputs, np.eye(3, dtype=np.float32)[targets], 3, kind="multilabel")
    task = Task(model=nn.Linear(6, 3), data=data, loss=F.cross_entropy)
    outputs, _ = at_once(task, task.initial_weights(0))
    right = float((outputs.argmax(1).numpy() == targets[: len(outputs)]).mean())
    assert evaluate(task, task.initial_weights(0))["accuracy"] == pytest.approx(right)


def test_defaults_follow_from_what_targets_are():
    data = made(*numbers(), 0)
    assert set(Task(model=nn.Linear(6, 1), data=data).metrics) == {"mae", "rmse", "r2"}
    assert Task(model=nn.Linear(6, 1), data=data).loss is mean_squared_error
    assert Task(model=nn.Linear(6, 3), data=made(*classes(), 3)).metrics == {"accuracy": accuracy}
    asked_for = Task(model=nn.Linear(6, 1), data=data, metrics={"right": accuracy})
    with pytest.raises(TaskError, match="accuracy needs"):
        evaluate(asked_for, asked_for.initial_weights(0))


def test_metrics_by_default_that_do_not_fit_are_left_out_with_a_word(caplog):
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_variance = nn.Linear(6, 1), nn.Linear(6, 1)

        def forward(self, x):
            return self.mean(x).squeeze(1), self.log_variance(x).squeeze(1).exp()

    loss = lambda o, t: F.gaussian_nll_loss(o[0], t, o[1])  # noqa: E731
    task = Task(model=Gaussian, data=made(*numbers(), 0), loss=loss)
    outputs, targets = at_once(task, task.initial_weights(0))
    found = evaluate(task, task.initial_weights(0))
    assert found == {"loss": pytest.approx(float(loss(outputs, targets)), rel=1e-5)}
    assert "mae is not reported" in caplog.text


@pytest.mark.parametrize("name", ["weights in a lambda", "soft F1", "weights"])
def test_every_executor_evaluates_alike(name):
    data = made(*classes(400), 3, sizes=(150, 3, 201))
    task = Task(
        model=lambda: nn.Linear(6, 3),
        data=data,
        loss=CLASS_LOSSES[name],
        metrics={"accuracy": accuracy, "recall": macro_recall},
    )
    weights = task.initial_weights(0)
    expected = evaluate(task, weights)
    outputs, targets = at_once(task, weights)
    assert expected["loss"] == pytest.approx(float(CLASS_LOSSES[name](outputs, targets)), rel=1e-5)
    assert expected["recall"] == pytest.approx(macro_recall(outputs, targets))
    for make in (Loop, Vmap, lambda task: Workers(task, 2)):
        executor = make(task)
        try:
            assert executor.evaluate(weights) == pytest.approx(expected)
        finally:
            executor.close()


@pytest.mark.parametrize("name", ["weights", "weights in a lambda", "soft F1", "a sum"])
def test_each_client_is_judged_as_if_it_were_alone(name):
    data = made(*classes(250), 3, sizes=(1, 2, 201, 40))
    loss = CLASS_LOSSES[name]
    metrics = {"accuracy": accuracy, "recall": macro_recall}
    task = Task(model=lambda: nn.Linear(6, 3), data=data, loss=loss, metrics=metrics)
    weights = task.initial_weights(0)
    found = federated_evaluation(task, weights)
    outputs, targets = at_once(task, weights)
    for k in range(4):
        mine = slice(data.offsets[k], data.offsets[k + 1])
        alone = float(loss(outputs[mine], targets[mine]))
        assert found["loss"].per_client[k] == pytest.approx(alone, rel=1e-5)
        recall = macro_recall(outputs[mine], targets[mine])
        assert found["recall"].per_client[k] == pytest.approx(recall)


def test_the_worst_clients_of_a_regression_have_the_largest_errors():
    data = made(*numbers(), 0)
    task = Task(model=nn.Linear(6, 1), data=data)
    found = federated_evaluation(task, task.initial_weights(0))
    assert set(found) == {"loss", "mae", "rmse", "r2"}
    for name in ("loss", "mae", "rmse"):
        assert found[name].worst_decile == found[name].per_client.max()
    assert found["r2"].worst_decile == np.nanmin(found["r2"].per_client)
    assert np.isnan(found["r2"].per_client[0])  # one example has no spread
    central = evaluate(task, task.initial_weights(0))
    for name, metric in found.items():
        assert metric.weighted_mean == pytest.approx(central[name], rel=1e-5)


class Energy(nn.Module):
    """Its output is minus the gradient of an energy, of its own making."""

    def __init__(self, asks):
        super().__init__()
        self.energy, self.asks = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), asks

    def forward(self, x):
        if self.asks:
            with torch.enable_grad():
                return self._force(x)
        return self._force(x)

    def _force(self, x):
        x = x.detach().clone().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)
        return -force[:, :3]


@pytest.mark.parametrize("asks", [True, False])
def test_a_model_that_differentiates_itself_is_evaluated(asks):
    data = made(*classes(), 3)
    task = Task(model=lambda: Energy(asks), data=data)
    weights = task.initial_weights(0)
    module = task.module().eval()
    bind(module, torch.tensor(weights))
    outputs = module(torch.tensor(data.test.inputs))
    targets = torch.tensor(data.test.targets)
    found = evaluate(task, weights)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(outputs, targets)), rel=1e-5)
    assert np.isfinite(federated_evaluation(task, weights)["accuracy"].mean)
    workers = Workers(task, 2)
    try:
        assert workers.evaluate(weights) == pytest.approx(found)
    finally:
        workers.close()


def test_a_loss_that_differentiates_the_model_is_evaluated():
    def penalised(outputs, targets):
        if not outputs.requires_grad:
            raise RuntimeError("a gradient is needed")
        (slope,) = torch.autograd.grad(outputs.sum(), outputs, create_graph=True)
        return F.cross_entropy(outputs, targets) + slope.square().mean()

    data = made(*classes(), 3)
    task = Task(model=lambda: nn.Linear(6, 3), data=data, loss=penalised)
    outputs, targets = at_once(task, task.initial_weights(0))
    found = evaluate(task, task.initial_weights(0))["loss"]
    assert found == pytest.approx(float(F.cross_entropy(outputs, targets)) + 1.0, rel=1e-5)


def test_an_evaluation_that_fails_names_the_client_and_what_it_was_given():
    inputs, targets = classes()
    targets[12] = 7
    task = Task(model=lambda: nn.Linear(6, 3), data=made(inputs, targets, 8))
    wanted = r"client 'c3': the loss must .* outputs=float32 \[.*, 3\].*at least 8 outputs"
    with pytest.raises(TaskError, match=wanted):
        evaluate(task, task.initial_weights(0))
    with pytest.raises(TaskError, match=wanted):
        federated_evaluation(task, task.initial_weights(0))
    workers = Workers(task, 2)
    try:
        with pytest.raises(TaskError, match=wanted):
            workers.evaluate(task.initial_weights(0))
    finally:
        workers.close()


def test_images_of_whole_numbers_are_refused_with_a_word_about_255():
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4))
    data = made(images, classes()[1], 3)
    task = Task(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), data=data)
    with pytest.raises(TaskError, match=r"inputs=int64 \[.*, 1, 4, 4\].*divide them by 255"):
        evaluate(task, task.initial_weights(0))


def test_a_batch_in_another_order_is_the_same_evaluation():
    data = made(*classes(), 3)
    task = Task(model=lambda: nn.Linear(6, 3), data=data, loss=CLASS_LOSSES["weights"])
    order = np.random.default_rng(0).permutation(data.test.num_examples)
    weights = task.initial_weights(0)
    again = evaluate(task, weights, data.test.rows(order))
    assert again == pytest.approx(evaluate(task, weights))
    assert len(evaluation_batches(task, size=7)) == 8


def test_own_targets_are_judged_by_what_they_are():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((30, 4)).astype(np.float32)
    prices = own_data.from_clients({"a": (inputs, inputs.sum(1))})
    tags = own_data.from_clients({"a": (inputs, inputs > 0)}, kind="multilabel")
    for data, names in ((prices, {"loss", "mae", "rmse", "r2"}), (tags, {"loss", "accuracy"})):
        outputs = 1 if data is prices else 4
        task = Task(model=nn.Linear(4, outputs), data=data)
        assert set(evaluate(task, task.initial_weights(0))) == names


def test_the_largest_of_one_output_is_no_prediction():
    mine = {"accuracy": lambda o, t: (o.argmax(1) == t).float()}
    for data in (made(*numbers(), 0), made(classes()[0], classes()[1] % 2, 2)):
        loss = lambda o, t: F.mse_loss(o.squeeze(1), t.float())  # noqa: E731
        task = Task(model=nn.Linear(6, 1), data=data, loss=loss, metrics=mine)
        with pytest.raises(TaskError, match=r"largest of one output .* always the first"):
            evaluate(task, task.initial_weights(0))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss": "cross_entropy"}, "loss must be a function"),
        ({"loss": nn.CrossEntropyLoss}, "or a module, got"),
        ({"metrics": [accuracy]}, "metrics must be a dictionary"),
        ({"metrics": {"a": 3}}, "'a'=3"),
        ({"metrics": {"r2": RSquared}}, "or an instance"),
        ({"metrics": {"loss": accuracy}}, "other than 'loss'"),
        ({"metrics": {3: accuracy}}, "called 3"),
    ],
)
def test_what_can_judge_nothing_is_refused_when_the_task_is_made(given, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Task(model=nn.Linear(6, 3), data=made(*classes(), 3), **given)


@pytest.mark.parametrize(
    ("targets", "loss", "hint"),
    [
        (classes()[1][:, None], None, r"targets\[:, 0\]"),
        (classes()[1] % 2, nn.BCEWithLogitsLoss(), r"end with .squeeze\(1\)"),
        (numbers()[1], nn.CrossEntropyLoss(), 'say kind = "classes"'),
        (classes()[1] % 2, lambda o, t: F.binary_cross_entropy(o[:, 0].sigmoid(), t), "float"),
    ],
)
def test_a_loss_that_takes_other_targets_comes_with_a_hint(targets, loss, hint):
    outputs = 1 if targets.ndim == 1 and targets.dtype.kind == "i" else 3
    data = made(classes()[0], targets, 3 if targets.dtype.kind == "i" else 0)
    task = Task(model=nn.Linear(6, outputs), data=data, **({"loss": loss} if loss else {}))
    with pytest.raises(TaskError, match=hint):
        evaluate(task, task.initial_weights(0))
