"""Language models, losses over padded sequences, and batches by length."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from potluck import FedAvg, Loop, Task, Workers, evaluate, federated_evaluation, rounds
from potluck.core import ClientContext, LocalSGD, stream
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime, spec_of
from potluck.engine.local_run import batch_order, batches_of, run_of
from potluck.engine.runtime import pure_loss
from potluck.models import (
    CharacterAccuracy,
    CharLSTM,
    PeepholeCharLSTM,
    PerCharacter,
    PerStep,
    WordLSTM,
)
from potluck.models.peephole_lstm import PeepholeLSTM

PADDING = 257


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(PeepholeCharLSTM, 866_578), (CharLSTM, 867_090), (WordLSTM, 4_950_544)],
)
def test_parameter_counts_are_the_papers(model, parameters):
    module = model()
    assert spec_of(module).dim == parameters
    assert module(torch.zeros(2, 5, dtype=torch.int16)).shape[:2] == (2, 5)


def textbook(layer, inputs):
    """Peephole LSTM, one operation after another, for autograd to differentiate."""
    p_i, p_f, p_o = layer.peepholes
    h = c = inputs.new_zeros(inputs.shape[1], len(p_i))
    hidden = []
    for x in inputs:
        a = x @ layer.weight_input.t() + h @ layer.weight_hidden.t() + layer.bias
        a_i, a_f, a_o, a_g = a.split(len(p_i), dim=1)
        i, f = torch.sigmoid(a_i + p_i * c), torch.sigmoid(a_f + p_f * c)
        c = f * c + i * torch.tanh(a_g)
        h = torch.sigmoid(a_o + p_o * c) * torch.tanh(c)
        hidden.append(h)
    return torch.stack(hidden)


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (6, 3), (2, 5)])
def test_the_peephole_lstm_and_its_gradients_are_the_textbooks(steps, batch):
    torch.manual_seed(0)
    layer = PeepholeLSTM(5, 7).double()
    for parameter in (layer.bias, layer.peepholes):  # which start at zero
        torch.nn.init.uniform_(parameter)
    inputs = torch.randn(steps, batch, 5, dtype=torch.float64, requires_grad=True)
    onward = torch.randn(steps, batch, 7, dtype=torch.float64)
    wanted = [inputs, *layer.parameters()]
    ours, theirs = layer(inputs), textbook(layer, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, expected in zip(
        torch.autograd.grad((ours * onward).sum(), wanted),
        torch.autograd.grad((theirs * onward).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_without_peepholes_the_layer_is_pytorchs():
    torch.manual_seed(0)
    layer, theirs = PeepholeLSTM(5, 7), torch.nn.LSTM(5, 7)
    assert not layer.peepholes.any()
    torch.nn.init.uniform_(layer.bias)
    with torch.no_grad():
        i_f_g_o = torch.cat([torch.arange(14), torch.arange(21, 28), torch.arange(14, 21)])
        theirs.weight_ih_l0.copy_(layer.weight_input[i_f_g_o])
        theirs.weight_hh_l0.copy_(layer.weight_hidden[i_f_g_o])
        theirs.bias_ih_l0.copy_(layer.bias[i_f_g_o])
        theirs.bias_hh_l0.zero_()
    inputs = torch.randn(6, 3, 5)
    torch.testing.assert_close(layer(inputs), theirs(inputs)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [CharLSTM, PeepholeCharLSTM])
def test_gates_start_with_as_much_of_their_inputs_as_these_have(model):
    torch.manual_seed(0)
    module = model()
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    recurrent = [w for name, w in weights.items() if "weight_h" in name]
    assert len(recurrent) == 2
    for gate in (gate for weight in recurrent for gate in weight.chunk(4)):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(256), rtol=0, atol=1e-5)
    symbols = torch.randint(0, 128, (20, 40))
    assert float(module(symbols)[:, 10:].detach().std()) == pytest.approx(1.0, rel=0.4)
    first, second = (w for name, w in weights.items() if "weight_i" in name)
    assert float((torch.randn(500, 8) @ first.t()).std()) == pytest.approx(1.0, rel=0.1)
    assert float((torch.randn(500, 256) / 4 @ second.t()).std()) == pytest.approx(1.0, rel=0.1)
    for name, weight in weights.items():
        assert ("bias" not in name and "peephole" not in name) or not weight.any()


def test_losses_by_hand():
    # Two symbols and padding (2); the first line has two real characters, the second one.
    logits = torch.log(torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.5, 0.5]]]))
    targets = torch.tensor([[0, 1, 2, 2], [1, 2, 2, 2]], dtype=torch.int16)
    total = -np.log(0.9) - np.log(0.5) - np.log(0.8)
    assert float(PerCharacter(padding=2)(logits, targets[:, :2])) == pytest.approx(total / 3)
    assert float(PerStep(padding=2, steps=4)(logits, targets[:, :2])) == pytest.approx(total / 8)
    right = CharacterAccuracy(padding=2)(logits, targets[:, :2])
    np.testing.assert_array_equal(right[:, 0], [1.0, 1.0])
    assert right.isnan().tolist() == [[False, False], [False, True]]
    later = CharacterAccuracy(padding=2, skipped=1)(logits, targets[:, :2])
    assert later.isnan().tolist() == [[True, False], [True, True]]
    assert float(later[0, 1]) == float(right[0, 1])


def lines(num_clients=4, size=23, steps=12, symbols=10):
    """Random sequences whose next symbol is the last one plus one; of very unequal length."""
    random = np.random.default_rng(0)
    n = num_clients * size
    first = random.integers(0, symbols, (n, 1))
    rows = (first + np.arange(steps + 1)) % symbols
    length = random.integers(1, steps + 1, n)
    padded = np.arange(steps) >= length[:, None]
    inputs = np.where(padded, PADDING, rows[:, :-1]).astype(np.int16)
    targets = np.where(padded, PADDING, rows[:, 1:]).astype(np.int16)
    return FederatedData(
        name="counting",
        train=Examples(inputs, targets),
        test=Examples(inputs[:30], targets[:30]),
        offsets=np.arange(0, n + 1, size),
        test_offsets=np.array([0, 10, 10, 20, 30]),
        clients=tuple("abcd"[:num_clients]),
        num_classes=258,
        padding=PADDING,
    )


def task(loss=None, **kwargs):
    return Task(
        model=lambda: CharLSTM(hidden=16),
        data=lines(),
        loss=loss or PerCharacter(padding=PADDING),
        metrics={"accuracy": CharacterAccuracy(padding=PADDING)},
        **kwargs,
    )


LOSSES = [PerCharacter(padding=PADDING), PerStep(padding=PADDING, steps=12)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", [CharLSTM, PeepholeCharLSTM])
def test_trimmed_steps_are_the_steps_on_padded_sequences(loss, model):
    problem = Task(model=lambda: model(hidden=16), data=lines(), loss=loss, metrics={})
    runtime, examples = TorchRuntime(problem), problem.data.client(0)
    start = problem.initial_weights(1)
    runtime.take(examples)
    runtime.begin(start, np.arange(23), 0)
    for batch in (slice(0, 10), slice(10, 20), slice(20, 23)):
        runtime.step(batch, 0.5)
    module = problem.module()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(start.copy()), module.parameters())
    inputs, targets = (torch.from_numpy(array.copy()) for array in examples)
    for batch in (slice(0, 10), slice(10, 20), slice(20, 23)):
        gradients = torch.autograd.grad(
            loss(module(inputs[batch]), targets[batch]), list(module.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    expected = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    moved = np.abs(expected - start).max()
    np.testing.assert_allclose(runtime.end()[0], expected, atol=1e-5 * moved)


@pytest.mark.parametrize("model", [CharLSTM, PeepholeCharLSTM])
def test_language_models_train_in_bfloat16_within_its_rounding(model):
    problem = Task(model=lambda: model(hidden=16), data=lines(), loss=LOSSES[0], metrics={})
    found = []
    for precision in ("float32", "bf16"):
        executor = Loop(problem, precision=precision)
        algorithm = FedAvg(client_lr=1.0, batch_size=10)
        first, last = rounds(algorithm, problem, cohort=1.0, num_rounds=1, executor=executor)
        found.append(last.weights - first.weights)
    assert 0 < np.linalg.norm(found[1] - found[0]) < 0.05 * np.linalg.norm(found[0])


def test_the_pure_loss_takes_padded_sequences():
    problem = task()
    weights = torch.from_numpy(problem.initial_weights(1))
    inputs, targets = (torch.from_numpy(array.copy()) for array in problem.data.client(0))
    module = problem.module()
    torch.nn.utils.vector_to_parameters(weights, module.parameters())
    expected = functional.cross_entropy(
        module(inputs).flatten(0, 1), targets.flatten().long(), ignore_index=PADDING
    )
    torch.testing.assert_close(pure_loss(problem)(weights, inputs, targets), expected)


@pytest.mark.parametrize("size", [1, 9, 10, 11, 23, 40])
def test_batches_by_length_hold_every_example_once_and_little_padding(size):
    random = np.random.default_rng(size)
    lengths = random.integers(1, 80, size)
    order = batch_order(size, 10, lengths, random)
    assert sorted(order) == list(range(size))
    if size >= 20:
        widths = [lengths[order[b]].max() * len(order[b]) for b in batches_of(size, 10)]
        at_random = random.permutation(size)
        others = [lengths[at_random[b]].max() * len(at_random[b]) for b in batches_of(size, 10)]
        assert sum(widths) < sum(others)


def test_batches_by_length_come_in_random_order_and_differ_by_round():
    lengths = np.arange(100)
    first = [batch_order(100, 10, lengths, np.random.default_rng(s))[0] // 10 for s in range(20)]
    assert len(set(first)) > 5


def test_random_batches_are_those_of_other_data():
    client = ClientContext(3, 1, 0, int(lines().sizes[0]))
    request = LocalSGD(np.zeros(1, np.float32), 0.1, 1, 10)
    others = stream(3, "batches", 1, 0).permutation(client.num_examples)
    found = [run_of(task(batches=b), request, client).rows for b in ("random", "by length")]
    assert np.array_equal(found[0], others)
    assert not np.array_equal(found[1], others)
    assert sorted(found[1]) == sorted(others)


def test_evaluation_counts_characters_whatever_the_order_and_padding():
    problem = task()
    weights = problem.initial_weights(1)
    found = evaluate(problem, weights)
    module = problem.module()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), module.parameters())
    inputs, targets = (torch.from_numpy(array.copy()) for array in problem.data.test)
    logits, real = module(inputs).detach(), targets != PADDING
    loss = functional.cross_entropy(logits[real], targets[real].long())
    right = (logits[real].argmax(1) == targets[real]).float().mean()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(right), rel=1e-6)
    mine = federated_evaluation(problem, weights)["accuracy"]
    assert mine.weighted_mean == pytest.approx(found["accuracy"], rel=1e-6)
    assert np.isnan(mine.per_client[1])  # it has no test lines


def test_a_language_model_learns_to_count_and_executors_agree():
    problem = task()
    algorithm = FedAvg(client_lr=2.0, local_epochs=5, batch_size=10)
    results = []
    for make in (Loop, lambda t: Workers(t, 2)):
        executor = make(problem)
        *_, last = rounds(algorithm, problem, cohort=1.0, num_rounds=12, executor=executor)
        executor.close()
        results.append(last)
    np.testing.assert_array_equal(results[0].weights, results[1].weights)
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics["accuracy"] > 0.9
