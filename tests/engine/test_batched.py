"""Layers in their form for many clients give what each client's own gives, and its gradient."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

from potluck import CNN, TwoNN
from potluck.engine.gpu.convolution import convolve, padding_of
from potluck.engine.gpu.layers import Rewritten, replace
from potluck.engine.gpu.recurrence import _FusedRecurrence, has_fused_cell, recur
from potluck.models import CharLSTM, PeepholeCharLSTM, PerCharacter, PerStep, cross_entropy
from potluck.models import mean_squared_error as squared
from potluck.models.losses import by_example

CLIENTS, BATCH, STEPS, SYMBOLS = 3, 4, 9, 30
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


class States(nn.Module):
    """Reads every output of an LSTM without biases whose steps come first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 5, padding_idx=3)
        self.lstm = nn.LSTM(5, 6, num_layers=2, bias=False)

    def forward(self, symbols):
        outputs, (hidden, cells) = self.lstm(self.embedding(symbols.int()).transpose(0, 1))
        return torch.cat([outputs.flatten(), hidden.flatten(), cells.square().flatten()])


class Grouped(nn.Module):
    """What vmap asks about memory, and layers that are left as they are."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 6, (3, 1), padding="same", bias=False)

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)
        return self.last(functional.gelu(self.norm(self.strided(images))))


def symbols():
    return torch.randint(0, SYMBOLS, (CLIENTS, BATCH, STEPS)).short()


def images(*shape):
    return torch.randn(CLIENTS, BATCH, *shape)


MODELS = {
    "2nn": (lambda: TwoNN((1, 8, 8)), lambda: images(1, 8, 8)),
    "cnn": (lambda: CNN((3, 12, 8)), lambda: images(3, 12, 8)),
    "char lstm": (lambda: CharLSTM(SYMBOLS, hidden=16), symbols),
    "peepholes": (lambda: PeepholeCharLSTM(SYMBOLS, hidden=16), symbols),
    "states": (States, symbols),
    "rows": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), lambda: images(3, 12, 8)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), lambda: images(3, 5, 7)),
    "grouped": (Grouped, lambda: images(3, 9, 11)),
}


def scalar(outputs):
    return (outputs.float() * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum()


def side_by_side(make, modules, inputs):
    """Losses and gradients of all clients at once, in their form for many clients."""
    base = make()
    replace(base)
    stacked = {
        name: torch.stack([m.get_parameter(name).detach() for m in modules]).requires_grad_()
        for name, _ in base.named_parameters()
    }

    def loss(tensors, batch):
        with Rewritten():
            return scalar(functional_call(base, tensors, (batch,)))

    losses = vmap(loss)(stacked, inputs)
    return losses, torch.autograd.grad(losses.sum(), list(stacked.values()))


@pytest.mark.parametrize(("make", "batches"), MODELS.values(), ids=MODELS)
def test_a_layer_of_many_clients_is_that_of_each(make, batches):
    torch.manual_seed(0)
    modules, inputs = [make() for _ in range(CLIENTS)], batches()
    losses, gradients = side_by_side(make, modules, inputs)
    for k, module in enumerate(modules):
        loss = scalar(module(inputs[k]))
        torch.testing.assert_close(losses[k], loss, rtol=1e-4, atol=1e-5)
        for found, expected in zip(
            gradients, torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["2nn", "char lstm", "peepholes"])
def test_bfloat16_rounds_what_layers_hand_on_and_not_the_gradients_of_weights(name):
    torch.manual_seed(5)  # losses are sums of either sign: a draw in which none cancels
    make, batches = MODELS[name]
    modules, inputs = [make() for _ in range(CLIENTS)], batches()
    losses, _ = side_by_side(make, modules, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, gradients = side_by_side(make, modules, inputs)
    assert {g.dtype for g in gradients} == {torch.float32}
    assert not torch.equal(rounded, losses)
    torch.testing.assert_close(rounded, losses, rtol=0.05, atol=0.05)


def test_a_layer_with_options_that_are_not_written_is_left_alone():
    left = [
        nn.LSTM(3, 4, bidirectional=True),
        nn.LSTM(3, 4, num_layers=2, dropout=0.5),
        nn.LSTM(3, 4, proj_size=2),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.Embedding(5000, 3),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 2, padding="same"),
    ]
    module = nn.ModuleList(left)
    replace(module)
    assert not [layer for layer in left if "forward" in vars(layer)]
    lstm = nn.LSTM(3, 4)
    own = lstm.forward
    lstm.forward = own
    replace(lstm)
    assert lstm.forward is own  # somebody has changed it


def test_padding_is_read_as_pytorch_reads_it():
    assert padding_of(nn.Conv2d(1, 1, 5, padding=2)) == (2, 2)
    assert padding_of(nn.Conv2d(1, 1, (5, 3), padding="same")) == (2, 1)
    assert padding_of(nn.Conv2d(1, 1, 3)) == (0, 0)


def test_a_convolution_by_hand():
    picture = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 1, 2, 2)
    kernel = torch.tensor([[10.0, 1.0]]).view(1, 1, 1, 1, 2)
    # A row [a, b] between zeros: 0·10 + a, a·10 + b, b·10 + 0; and the bias.
    maps = convolve(picture, kernel, torch.tensor([[0.5]]), (0, 1))
    assert maps.view(2, 3).tolist() == [[1.5, 12.5, 20.5], [3.5, 34.5, 40.5]]


LOSSES = {
    "classes": (cross_entropy, lambda: torch.randn(6, 5), lambda: torch.randint(0, 5, (6,))),
    "numbers": (squared, lambda: torch.randn(6, 1), lambda: torch.randn(6)),
    "characters": (
        PerCharacter(padding=4), lambda: torch.randn(6, 7, 5), lambda: torch.randint(0, 5, (6, 7))
    ),
    "steps": (
        PerStep(padding=4, steps=9), lambda: torch.randn(6, 7, 5),
        lambda: torch.randint(0, 5, (6, 7)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "outputs", "targets"), LOSSES.values(), ids=LOSSES)
def test_examples_that_are_not_present_count_nothing(loss, outputs, targets):
    torch.manual_seed(1)
    logits, wanted = outputs(), targets()
    apart = by_example(loss, wanted.ndim, wanted.dtype)
    present = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    there = present.bool()
    torch.testing.assert_close(apart.mean(logits, wanted, torch.ones(6)), loss(logits, wanted))
    torch.testing.assert_close(
        apart.mean(logits, wanted, present), loss(logits[there], wanted[there])
    )


def test_a_loss_that_is_not_known_is_not_taken_apart():
    whole = torch.int64
    assert by_example(lambda outputs, targets: outputs.sum(), 1, whole) is None
    assert by_example(cross_entropy, 1, torch.float32) is None
    assert by_example(cross_entropy, 2, whole) is None


def test_where_pytorch_has_no_fused_cell_the_cell_is_written_out(caplog):
    has_fused_cell.cache_clear()
    assert not has_fused_cell(torch.device("cpu"))  # it is for CUDA alone
    (record,) = caplog.records
    assert record.message.startswith("the fused LSTM cell is not used: ")
    has_fused_cell.cache_clear()


def fused_cell(gates_in, gates_hidden, cell, input_bias=None, hidden_bias=None):
    """What PyTorch's kernel for CUDA computes, with its workspace."""
    i, f, g, o = (gates_in + gates_hidden).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * cell + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def fused_cell_backward(into_hidden, into_cell, before, after, space, has_bias):
    i, f, g, o = space.chunk(4, 1)
    squashed = after.tanh()
    into_cell = into_cell + into_hidden * o * (1 - squashed**2)
    parts = [
        into_cell * g * i * (1 - i),
        into_cell * before * f * (1 - f),
        into_cell * i * (1 - g**2),
        into_hidden * squashed * o * (1 - o),
    ]
    return torch.cat(parts, 1), into_cell * f, space.new_zeros(0)


def test_around_a_fused_cell_the_recurrence_is_the_one_written_out():
    """The lines around the kernel, with its formulas in its place: it is for CUDA alone."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        library.impl("_thnn_fused_lstm_cell", fused_cell, "CPU")
        library.impl("_thnn_fused_lstm_cell_backward_impl", fused_cell_backward, "CPU")
        torch.manual_seed(0)
        activations = torch.randn(7, 3, 5, 32, requires_grad=True)
        weight = torch.randn(3, 32, 8, requires_grad=True)
        found = []
        for function in (_FusedRecurrence.apply, partial(recur, peepholes=None)):
            hidden, cell = function(activations, weight)
            loss = scalar(hidden) + cell.square().sum()
            gradients = torch.autograd.grad(loss, (activations, weight))
            found.append([hidden, cell, *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        has_fused_cell.cache_clear()
        assert has_fused_cell(torch.device("cpu"))
    finally:
        library._destroy()
        has_fused_cell.cache_clear()


@needs_cuda
def test_the_fused_cell_is_the_cell_written_out():
    device = torch.device("cuda")
    assert has_fused_cell(device)
    torch.manual_seed(0)
    activations = torch.randn(7, 3, 5, 32, device=device, requires_grad=True)
    weight = torch.randn(3, 32, 8, device=device, requires_grad=True)
    fused = _FusedRecurrence.apply(activations, weight)
    plain = [part.cpu() for part in recur(activations.cpu(), weight.cpu(), None)]
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
