"""Modules of PyTorch and of two adapter libraries as small models from 16 numbers to 3 classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import loralib
import torch
from lora_pytorch import LoRA
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

INPUTS, CLASSES, SYMBOLS = 16, 3, 20
View = Callable[[Tensor], Tensor]


def flat(inputs: Tensor) -> Tensor:
    return inputs


def image(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, 1, 4, 4)


def maps(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, 4, 2, 2)


def series(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, 4, 4)


def volume(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, 1, 2, 2, 4)


def symbols(inputs: Tensor) -> Tensor:
    return (inputs * 7).abs().long() % SYMBOLS


class Headed(nn.Module):
    """A scale, a view, a body, and a linear layer over all that the body gives."""

    def __init__(self, view: View, body: nn.Module) -> None:
        super().__init__()
        self.view, self.body = view, body
        self.scale = nn.Parameter(torch.ones(INPUTS))
        with torch.no_grad():
            was = [part.training for part in body.modules()]
            body.eval()
            width = self.hidden(torch.ones(2, INPUTS)).shape[1]
            body.train(was[0])
            for part, mode in zip(body.modules(), was, strict=True):
                part.training = mode
        self.head = nn.Linear(width, CLASSES)

    def hidden(self, inputs: Tensor) -> Tensor:
        outputs: Any = self.body(self.view(inputs * self.scale))
        while isinstance(outputs, tuple):  # of recurrent layers, with their states
            outputs = outputs[0]
        return outputs.flatten(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.hidden(inputs))


class Attention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, steps: Tensor) -> Tensor:
        return self.attention(steps, steps, steps)


class Both(nn.Module):
    """A module of two arguments, given the same twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs, inputs)


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, steps: Tensor) -> Tensor:
        state: Any = None
        for step in steps.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 4)
        self.output = nn.Linear(4, SYMBOLS, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.embedding(inputs).mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.inner, inputs, use_reentrant=False)


class Penalised(nn.Module):
    """Differentiates itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(INPUTS, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            given = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
            outputs = self.inner(given).sin()
            (slope,) = torch.autograd.grad(outputs.sum(), given, create_graph=True)
        return outputs + slope[:, :8]


def adapted(layer: nn.Linear) -> nn.Linear:
    """With a forward of its own, as adapters are put on."""
    layer.down = nn.Linear(layer.in_features, 2, bias=False)
    layer.up = nn.Linear(2, layer.out_features, bias=False)
    plain = layer.forward
    layer.forward = lambda inputs: plain(inputs) + layer.up(layer.down(inputs))
    return layer


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_pre_hook(lambda m, i: (i[0] * 0.5,))
    layer.register_forward_hook(lambda m, i, o: o * 2)
    layer.register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,))
    layer.weight.register_hook(lambda g: g * 0.5)
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return torch.nn.utils.weight_norm(layer)


def wide() -> nn.Linear:
    return nn.Linear(INPUTS, 8)


def after(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(wide(), activation())


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.RReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Softplus,
        nn.Softsign,
        nn.Tanh,
        nn.Sigmoid,
        nn.Hardtanh,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Hardshrink,
        nn.Softshrink,
        nn.Tanhshrink,
        nn.LogSigmoid,
        nn.GLU,
        nn.Dropout,
        nn.AlphaDropout,
    )
}
_BODIES: dict[str, tuple[View, Callable[[], nn.Module]]] = {
    "Identity": (flat, nn.Identity),
    "Linear": (flat, wide),
    "Linear, no bias": (flat, lambda: nn.Linear(INPUTS, 8, bias=False)),
    "Bilinear": (flat, lambda: Both(nn.Bilinear(INPUTS, INPUTS, 4))),
    "CosineSimilarity": (series, lambda: Both(nn.CosineSimilarity(2))),
    "Softmax": (flat, lambda: after(lambda: nn.Softmax(1))),
    "LogSoftmax": (flat, lambda: after(lambda: nn.LogSoftmax(1))),
    "Threshold": (flat, lambda: after(lambda: nn.Threshold(0.1, 0.0))),
    "Conv1d": (series, lambda: nn.Conv1d(4, 6, 3, padding=1)),
    "Conv2d": (image, lambda: nn.Conv2d(1, 6, 3)),
    "Conv2d, grouped": (maps, lambda: nn.Conv2d(4, 8, 2, groups=4)),
    "Conv2d, circular": (image, lambda: nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")),
    "Conv3d": (volume, lambda: nn.Conv3d(1, 4, 2)),
    "ConvTranspose1d": (series, lambda: nn.ConvTranspose1d(4, 3, 2)),
    "ConvTranspose2d": (image, lambda: nn.ConvTranspose2d(1, 3, 2)),
    "ConvTranspose3d": (volume, lambda: nn.ConvTranspose3d(1, 2, 2)),
    "Unfold": (image, lambda: nn.Unfold(2)),
    "PixelShuffle": (maps, lambda: nn.PixelShuffle(2)),
    "Upsample": (image, lambda: nn.Upsample(scale_factor=2)),
    "MaxPool1d": (series, lambda: nn.MaxPool1d(2)),
    "MaxPool2d": (image, lambda: nn.MaxPool2d(2)),
    "MaxPool3d": (volume, lambda: nn.MaxPool3d(2)),
    "AvgPool2d": (image, lambda: nn.AvgPool2d(2)),
    "LPPool2d": (image, lambda: nn.LPPool2d(2, 2)),
    "AdaptiveAvgPool2d": (image, lambda: nn.AdaptiveAvgPool2d(2)),
    "AdaptiveMaxPool2d": (image, lambda: nn.AdaptiveMaxPool2d(2)),
    "ZeroPad2d": (image, lambda: nn.ZeroPad2d(1)),
    "BatchNorm1d": (flat, lambda: nn.BatchNorm1d(INPUTS)),
    "BatchNorm2d": (maps, lambda: nn.BatchNorm2d(4)),
    "BatchNorm3d": (volume, lambda: nn.BatchNorm3d(1)),
    "BatchNorm1d, not affine": (flat, lambda: nn.BatchNorm1d(INPUTS, affine=False)),
    "BatchNorm1d, no statistics": (
        flat,
        lambda: nn.BatchNorm1d(INPUTS, track_running_stats=False),
    ),
    "BatchNorm1d, cumulative": (flat, lambda: nn.BatchNorm1d(INPUTS, momentum=None)),
    "InstanceNorm2d": (maps, lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "LayerNorm": (series, lambda: nn.LayerNorm(4)),
    "GroupNorm": (maps, lambda: nn.GroupNorm(2, 4)),
    "RMSNorm": (series, lambda: nn.RMSNorm(4)),
    "LocalResponseNorm": (maps, lambda: nn.LocalResponseNorm(2)),
    "RNN": (series, lambda: nn.RNN(4, 6, batch_first=True)),
    "LSTM": (series, lambda: nn.LSTM(4, 6, batch_first=True)),
    "LSTM, bidirectional": (series, lambda: nn.LSTM(4, 5, bidirectional=True, batch_first=True)),
    "LSTM, projected": (series, lambda: nn.LSTM(4, 6, proj_size=3, batch_first=True)),
    "GRU": (series, lambda: nn.GRU(4, 6, num_layers=2, batch_first=True)),
    "RNNCell": (series, lambda: Cell(nn.RNNCell(4, 6))),
    "LSTMCell": (series, lambda: Cell(nn.LSTMCell(4, 6))),
    "GRUCell": (series, lambda: Cell(nn.GRUCell(4, 6))),
    "MultiheadAttention": (
        series,
        lambda: Attention(nn.MultiheadAttention(4, 2, batch_first=True)),
    ),
    "TransformerEncoderLayer": (
        series,
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
    ),
    "TransformerDecoderLayer": (
        series,
        lambda: Both(nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)),
    ),
    "Embedding": (symbols, lambda: nn.Embedding(SYMBOLS, 4)),
    "Embedding, padded": (symbols, lambda: nn.Embedding(SYMBOLS, 4, padding_idx=0)),
    "Embedding, sparse": (symbols, lambda: nn.Embedding(SYMBOLS, 4, sparse=True)),
    "Embedding, of a norm": (symbols, lambda: nn.Embedding(SYMBOLS, 4, max_norm=1.0)),
    "EmbeddingBag": (symbols, lambda: nn.EmbeddingBag(SYMBOLS, 4)),
    "tied embedding": (symbols, Tied),
    "Dropout2d": (maps, lambda: nn.Dropout2d()),
    "weight norm": (flat, lambda: parametrizations.weight_norm(wide())),
    "weight norm by a hook": (flat, lambda: old_weight_norm(wide())),
    "weight norm of an LSTM": (
        series,
        lambda: parametrizations.weight_norm(nn.LSTM(4, 6, batch_first=True), "weight_hh_l0"),
    ),
    "spectral norm": (flat, lambda: parametrizations.spectral_norm(wide())),
    "spectral norm by a hook": (flat, lambda: torch.nn.utils.spectral_norm(wide())),
    "orthogonal": (flat, lambda: parametrizations.orthogonal(nn.Linear(INPUTS, INPUTS))),
    "pruned": (flat, lambda: prune.l1_unstructured(wide(), "weight", amount=0.4)),
    "pruned by rows": (flat, lambda: prune.ln_structured(wide(), "weight", 0.5, n=2, dim=0)),
    "pruned at random": (flat, lambda: prune.random_unstructured(wide(), "weight", amount=0.4)),
    "with hooks": (flat, lambda: hooked(wide())),
    "with a forward of its own": (flat, lambda: adapted(wide())),
    "frozen": (flat, lambda: frozen(wide())),
    "batch norm in evaluation mode": (flat, lambda: nn.BatchNorm1d(INPUTS).eval()),
    "averaged": (flat, lambda: AveragedModel(wide())),
    "in parallel": (flat, lambda: nn.DataParallel(wide())),
    "checkpointed": (flat, Checkpointed),
    "differentiating itself": (flat, Penalised),
    "loralib Linear": (flat, lambda: loralib.Linear(INPUTS, 8, r=2)),
    "loralib MergedLinear": (
        flat,
        lambda: loralib.MergedLinear(INPUTS, 9, r=2, enable_lora=[True, False, True]),
    ),
    "loralib Embedding": (symbols, lambda: loralib.Embedding(SYMBOLS, 4, r=2)),
    "loralib Conv2d": (image, lambda: loralib.Conv2d(1, 4, 3, r=2)),
    "lora_pytorch Linear": (flat, lambda: LoRA.from_module(wide(), rank=2)),
    "lora_pytorch Conv2d": (image, lambda: LoRA.from_module(nn.Conv2d(1, 4, 3), rank=2)),
    "lora_pytorch Embedding": (
        symbols,
        lambda: LoRA.from_module(nn.Embedding(SYMBOLS, 4), rank=2),
    ),
    "lora_pytorch of a whole": (
        flat,
        lambda: LoRA.from_module(nn.Sequential(wide(), nn.Tanh(), nn.Linear(8, 8)), rank=2),
    ),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    name: partial(lambda view, body: Headed(view, body()), view, body)
    for name, (view, body) in _BODIES.items()
} | {
    name: partial(lambda kind: Headed(flat, after(kind)), kind)
    for name, kind in _ACTIVATIONS.items()
}


class Zoo(nn.Module):
    """Many models as one: the logits of each, whose losses add up, so that each trains alone."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.models = nn.ModuleList(MODELS[name]() for name in names)

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, CLASSES, models], as classes of several targets."""
        return torch.stack([model(inputs) for model in self.models], dim=2)
