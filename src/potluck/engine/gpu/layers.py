"""Layers of many clients, each with weights of its own, in a form that is fast on a GPU.

Under `torch.func.vmap` every operator of a layer gets the axis of clients by a rule of PyTorch's.
For some layers the rule is a poor one: an LSTM has none and is done client by client, a convolution
becomes a grouped one, an embedding a scattered sum. `replace` gives those layers, and linear ones,
a forward pass that is written for tensors with clients in front, as batched matrix products:

    linear      Y = X Wᵀ + b                                       one product a layer
    embedding   Y = 1[symbol] W                                    of few symbols
    LSTM        A = X Wᵀ + b for all steps, then a product a step  (`potluck.engine.gpu.recurrence`)
    convolution Y = patches K + b                                 (`potluck.engine.gpu.convolution`)

Inside vmap each is one function, whose rule is that form. Gradients flow outside of it, through
ordinary operators. A layer of another kind, one that is not plain (`potluck.engine.module.plain`)
or one with options that are not written here is left to PyTorch's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from potluck.engine.gpu.convolution import convolve, padding_of
from potluck.engine.gpu.recurrence import recur
from potluck.engine.module.plain import is_plain
from potluck.models.peephole_lstm import PeepholeLSTM

_SYMBOLS = 1024  # of an embedding, beyond which its product costs more than it saves


def replace(module: nn.Module) -> None:
    """Gives the layers of a module that runs under vmap their forward pass for clients."""
    for layer in module.modules():
        forward = _forward_of(layer)
        if forward is not None:
            layer.forward = forward


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which products of a tensor are made."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _forward_of(layer: nn.Module) -> Callable[..., Any] | None:
    some: Any = layer
    if is_plain(layer, nn.Linear):
        return partial(_linear, layer)
    if is_plain(layer, nn.Embedding) and _is_plain_embedding(some):
        return partial(_embedding, layer)
    if is_plain(layer, nn.LSTM) and _is_plain_lstm(some):
        return partial(_lstm, layer, layer.forward)
    if is_plain(layer, PeepholeLSTM):
        return partial(_peephole, layer)
    if is_plain(layer, nn.Conv2d) and (padding := padding_of(some)) is not None:
        return partial(_conv, layer, layer.forward, padding)
    return None


class _OfClients(torch.autograd.Function):
    """A function of tensors with clients in front, called where vmap hides that axis."""

    @staticmethod
    def forward(form: Callable[..., Any], *tensors: Tensor | None) -> Any:  # type: ignore[override]
        outputs = form(*[None if t is None else t.unsqueeze(0) for t in tensors])
        if isinstance(outputs, Tensor):
            return outputs.squeeze(0)
        return tuple(output.squeeze(0) for output in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing: gradients flow through `form` itself."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("a layer for many clients was called without vmap")

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: Any, *tensors: Tensor | None) -> Any:  # type: ignore[override]
        moved: list[Tensor | None] = []
        for tensor, axis in zip(tensors, in_dims[1:], strict=True):
            if tensor is None or axis is not None:
                moved.append(None if tensor is None else tensor.movedim(axis, 0))
            else:
                moved.append(tensor.expand(info.batch_size, *tensor.shape))
        outputs = form(*moved)
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)


_of_clients = cast("Callable[..., Any]", _OfClients.apply)


def _linear(layer: Any, inputs: Tensor) -> Tensor:
    return _of_clients(_affine, inputs, layer.weight, layer.bias)


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[clients, …, in] to [clients, …, out]."""
    rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    transposed = weight.transpose(1, 2)
    if bias is None:
        out = torch.bmm(rows, transposed)
    else:
        out = torch.baddbmm(bias.unsqueeze(1), rows, transposed)
    return out.view(*inputs.shape[:-1], weight.shape[1])


def _is_plain_embedding(layer: nn.Embedding) -> bool:
    few = layer.num_embeddings <= _SYMBOLS
    return few and layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse


def _embedding(layer: Any, symbols: Tensor) -> Tensor:
    return _of_clients(partial(_looked_up, layer.padding_idx), symbols, layer.weight)


def _looked_up(padding: int | None, symbols: Tensor, weight: Tensor) -> Tensor:
    """[clients, …] to [clients, …, width]: a product, whose gradient is one as well."""
    numbers = torch.arange(weight.shape[1], device=weight.device)
    if padding is not None:  # has a row, but no gradient
        weight = torch.where((numbers == padding).unsqueeze(1), weight.detach(), weight)
    chosen = (symbols.reshape(len(symbols), -1, 1) == numbers).to(weight.dtype)
    return torch.bmm(chosen, weight).view(*symbols.shape, weight.shape[2])


def _is_plain_lstm(layer: nn.LSTM) -> bool:
    draws = layer.dropout > 0.0 and layer.num_layers > 1
    return not layer.bidirectional and layer.proj_size == 0 and not draws


def _lstm(layer: Any, plain: Callable[..., Any], inputs: Any, state: Any = None) -> Any:
    if state is not None or not isinstance(inputs, Tensor) or inputs.ndim != 3:
        return plain(inputs, state)
    weights = [weight for of_layer in layer.all_weights for weight in of_layer]
    form = partial(_lstm_layers, layer.batch_first, layer.bias)
    hidden, last, cells = _of_clients(form, inputs, *weights)
    return hidden, (last, cells)


def _lstm_layers(
    batch_first: bool, has_bias: bool, inputs: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, in the order of the inputs [clients, batch, steps, …] or [clients, steps,
    batch, …], and the last hidden states and cells, [clients, layers, batch, hidden]."""
    sequence = inputs.permute(2, 0, 1, 3) if batch_first else inputs.transpose(0, 1)
    lasts: list[Tensor] = []
    cells: list[Tensor] = []
    each = 4 if has_bias else 2
    for i in range(0, len(weights), each):
        weight, recurrent, *biases = weights[i : i + each]
        bias = biases[0] + biases[1] if biases else None
        sequence, cell = recur(_projected(sequence, weight, bias), recurrent, None)
        lasts.append(sequence[-1])
        cells.append(cell)
    hidden = sequence.permute(1, 2, 0, 3) if batch_first else sequence.transpose(0, 1)
    return hidden, torch.stack(lasts, dim=1), torch.stack(cells, dim=1)


def _peephole(layer: Any, inputs: Tensor) -> Tensor:
    names = ("weight_input", "weight_hidden", "bias", "peepholes")
    return _of_clients(_peephole_layer, inputs, *[getattr(layer, name) for name in names])


def _peephole_layer(
    inputs: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, peepholes: Tensor
) -> Tensor:
    activations = _projected(inputs.transpose(0, 1), weight, bias)
    hidden, _ = recur(activations, recurrent, peepholes.to(activations.dtype))
    return hidden.transpose(0, 1)


def _projected(sequence: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b of all steps in one product: [steps, clients, batch, in] to [… 4 · hidden]."""
    return _affine(sequence.transpose(0, 1), weight, bias).transpose(0, 1)


def _conv(layer: Any, plain: Callable[..., Tensor], padding: Any, images: Tensor) -> Tensor:
    if images.ndim != 4:
        return plain(images)
    return _of_clients(partial(_convolved, padding), images, layer.weight, layer.bias)


def _convolved(padding: Any, images: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    dtype = autocast_dtype(images)
    return convolve(images.to(dtype), kernel.to(dtype), bias, padding)


class Rewritten(TorchFunctionMode):
    """Rewrites functions in this block that depend on the memory layout, which vmap hides.

    A request for channels last is ignored, and group normalization is its formula.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        if func is functional.group_norm:
            return _group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    out = ((grouped - mean) * (variance + eps).rsqrt()).reshape(input.shape)
    channels = (-1, *[1] * (input.ndim - 2))
    out = out if weight is None else out * weight.reshape(channels)
    return out if bias is None else out + bias.reshape(channels)
