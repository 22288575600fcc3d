"""A linear layer with its SGD step, compiled for processors with a tile unit.

With products in bfloat16, PyTorch rounds all weights of a layer and writes them down before it
multiplies, once forward and once going back, and writes their gradient. `linear.cpp` rounds a few
columns of the weights at a time, multiplies them on the processor's tile unit (AMX) and takes their
step while they are in the cache, if nothing else reads them. `potluck.engine.fused_sgd` chooses the
layers.

Factors of products are rounded to bfloat16, outputs and the gradients that flow back too, as by
PyTorch's autocast; sums, weights and the step are float32. Elsewhere, and for inputs whose number
is no multiple of 32, PyTorch does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from potluck.engine.deferred import Deferred, plain_gradients
from potluck.engine.native import compiler

_SOURCES = compiler.sources("linear.cpp", "gemm.hpp", "amx.hpp")
_COLUMNS = 32  # inputs come in whole multiples of it
_ROWS = 98  # of the weights of the layer that is tried
_TOLERANCE = 2e-2  # of a step whose numbers are about 1
_POINTER = ctypes.c_void_p
_SIZES = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
_FORWARD = ctypes.CFUNCTYPE(None, *_SIZES, *[_POINTER] * 4)
_BACKWARD = ctypes.CFUNCTYPE(None, *_SIZES, *[_POINTER] * 2, ctypes.c_float, *[_POINTER] * 3)


def suits(layer: nn.Linear) -> bool:
    """Whether a layer's steps can be compiled here."""
    return layer.in_features % _COLUMNS == 0 and _library() is not None


def takes(layer: nn.Linear, inputs: Tensor) -> bool:
    """Whether these inputs are of the kind that `in_place` is for."""
    return (
        inputs.ndim > 1
        and inputs.numel() > 0
        and inputs.device.type == "cpu"
        and inputs.shape[-1] == layer.in_features
    )


def in_place(layer: nn.Linear, inputs: Tensor, deferred: Deferred) -> Tensor:
    """What `layer(inputs)` gives, in bfloat16; a backward pass finds the SGD step too."""
    library = _library()
    assert library is not None  # `suits` said so
    apply = cast("Callable[..., Tensor]", _Step.apply)
    return apply(inputs, layer.weight, layer.bias, library, deferred)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, library: Any, deferred: Any
    ) -> Tensor:
        rows = _rows(inputs)
        sizes = len(rows), weight.shape[1], weight.shape[0]
        outputs = torch.empty(len(rows), len(weight), dtype=torch.bfloat16)
        forward, ctx.backward_step = library
        compiler.call(forward, *sizes, rows, weight, bias, outputs)
        ctx.save_for_backward(inputs, weight, bias, rows)
        ctx.sizes, ctx.deferred = sizes, deferred
        ctx.layer = [weight] if bias is None else [weight, bias]
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, into: Tensor) -> Any:  # type: ignore[override]
        inputs, weight, bias, rows = ctx.saved_tensors
        if not ctx.deferred.is_open:
            return *plain_gradients(ctx, _plain, [inputs, weight, bias], [into]), None, None
        onward = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        stepped = ctx.deferred.at_once(ctx.layer)
        layer = stepped if len(stepped) == 2 else [*stepped, None]
        factor = -ctx.deferred.lr
        compiler.call(ctx.backward_step, *ctx.sizes, rows, _rows(into), factor, onward, *layer)
        if onward is not None:
            onward = onward.view(inputs.shape).to(inputs.dtype)
        return (onward, *[None] * 4)


def _plain(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `_Step` gives, not rounded."""
    return nn.functional.linear(inputs.float(), weight, bias)


def _rows(numbers: Tensor) -> Tensor:
    """[…, columns] as bfloat16 [rows, columns]."""
    return numbers.bfloat16().flatten(0, -2).contiguous()


@cache
def _library() -> tuple[Any, Any] | None:
    """Forward and backward, if they are compiled and agree with PyTorch; asked for once."""
    return compiler.tiled_steps(
        "linear layers",
        _SOURCES,
        "linear",
        (_FORWARD, _BACKWARD),
        lambda steps: all(_agrees(steps, rows) for rows in (3, 35)),
    )


def _agrees(library: tuple[Any, Any], rows: int) -> bool:
    """Whether a small layer takes the step that PyTorch finds, but for the rounding."""
    generator, lr = torch.Generator().manual_seed(0), 0.1

    def drawn(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-0.5, 0.5, generator=generator).bfloat16().float()

    inputs, into = drawn(rows, 2 * _COLUMNS).requires_grad_(), drawn(rows, _ROWS)
    weight, bias = drawn(_ROWS, 2 * _COLUMNS) / 4, drawn(_ROWS)
    first, second = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    outputs = nn.functional.linear(inputs, first, second)
    onward, change, shift = torch.autograd.grad(outputs, [inputs, first, second], into)
    deferred = Deferred()
    apply = cast("Callable[..., Tensor]", _Step.apply)
    found = apply(inputs, weight, bias, library, deferred)
    with deferred.open(lr):
        (mine,) = torch.autograd.grad(found, [inputs], into.bfloat16())
    pairs = [(outputs, found), (onward, mine)]
    pairs += [(first - lr * change, weight), (second - lr * shift, bias)]
    return all(torch.allclose(a, b.float(), rtol=0.0, atol=_TOLERANCE) for a, b in pairs)
