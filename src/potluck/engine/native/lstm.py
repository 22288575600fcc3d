"""LSTM layers whose steps are compiled for the processor at hand, where there is a C++ compiler.

A step of a layer multiplies a few rows, a batch's lines, with a large matrix. PyTorch's libraries
do that at a good half of the core's rate. `lstm.cpp` does it at nearly all of it, and leaves
padding out of the backward pass. A compiled layer (`potluck.engine.native.compiler`) that differs
from PyTorch's is not used. The backward pass finds the layer's SGD step too
(`potluck.engine.deferred`), as that of the linear ones of `potluck.engine.fused_sgd` does, which
chooses the layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from potluck.engine.deferred import Deferred, plain_gradients
from potluck.engine.native import compiler
from potluck.engine.precision import Precision

_SOURCES = compiler.sources("lstm.cpp", "gemm.hpp")
SMALLEST = 65_536  # recurrent weights, of a width of 128; narrower layers are as fast in PyTorch
_TOLERANCES = {"float32": 1e-5, "bf16": 2e-2}  # of a step whose numbers are about 1

_SIZES, _POINTER = [ctypes.c_int] * 4, ctypes.c_void_p
_FORWARD = ctypes.CFUNCTYPE(None, *_SIZES, *[_POINTER] * 9)
_BACKWARD = ctypes.CFUNCTYPE(
    None,
    *_SIZES,
    *[_POINTER, ctypes.c_int64, ctypes.c_int64],
    *[_POINTER] * 6,
    ctypes.c_float,
    *[_POINTER] * 5,
)


def suits(
    layer: nn.Module, precision: Precision = "float32", smallest: int = SMALLEST
) -> TypeGuard[nn.LSTM]:
    """True if a layer's steps can be compiled here."""
    if not is_wanted(layer, smallest):
        return False
    library = _library()
    return (
        library is not None
        and precision in library.steps
        and layer.hidden_size % library.columns == 0
    )


def is_wanted(layer: nn.Module, smallest: int = SMALLEST) -> TypeGuard[nn.LSTM]:
    """True if a layer's steps would be compiled on some processor."""
    return (
        type(layer) is nn.LSTM
        and 4 * layer.hidden_size**2 >= smallest
        and layer.proj_size == 0
        and not layer.bidirectional
        and layer.bias
        and (layer.dropout == 0.0 or layer.num_layers == 1)
    )


def library() -> compiler.Library | None:
    """Returns the compiled library of LSTMs."""
    return compiler.library("LSTMs", _SOURCES)


def names(layer: nn.LSTM) -> list[str]:
    """Returns the names of a suitable layer's weights, as PyTorch registers them."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"{kind}_l{number}" for number in range(layer.num_layers) for kind in kinds]


def takes(inputs: object, state: object, precision: Precision = "float32") -> TypeGuard[Tensor]:
    """True if a layer's arguments are of the kind that `in_place` is for."""
    return (
        state is None
        and isinstance(inputs, Tensor)
        and inputs.ndim == 3
        and inputs.numel() > 0
        and inputs.device.type == "cpu"
        and (precision == "bf16" or inputs.dtype == torch.float32)
    )


def in_place(
    layer: nn.LSTM, inputs: Tensor, deferred: Deferred, precision: Precision = "float32"
) -> Any:
    """Returns `layer(inputs)`; a backward pass finds the SGD step too. With "bf16" products are of
    numbers rounded to bfloat16; states and sums are float32."""
    library = _library()
    assert library is not None  # `suits` has checked it
    compiled = library.steps[precision]
    steps = (inputs.transpose(0, 1) if layer.batch_first else inputs).float()
    last: list[tuple[Tensor, Tensor]] = []
    for weights in layer.all_weights:
        steps, cell = _layer(compiled, steps, deferred, weights)
        last.append((steps[-1], cell))
    outputs = steps.transpose(0, 1) if layer.batch_first else steps
    h, c = (torch.stack(each) for each in zip(*last, strict=True))
    return outputs, (h, c)


def _layer(
    compiled: tuple[Any, Any], inputs: Tensor, deferred: Deferred, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """[steps, batch, inputs] to hidden states [steps, batch, hidden] and last cells, from zeros."""
    apply = cast("Callable[..., tuple[Tensor, Tensor]]", _LayerStep.apply)
    return apply(inputs, *weights, compiled, deferred)


class _LayerStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        *weights, (forward, ctx.backward_step), ctx.deferred = rest
        steps, batch, width, size = *inputs.shape, weights[1].shape[1]
        rows = inputs.contiguous()
        gates = inputs.new_empty(steps, batch, 4 * size)
        hidden, cells = (inputs.new_empty(steps + 1, batch, size) for _ in range(2))
        squashed = inputs.new_empty(steps, batch, size)
        ctx.sizes, ctx.weights = (steps, batch, width, size), weights
        compiler.call(forward, *ctx.sizes, rows, *weights, gates, hidden, cells, squashed)
        ctx.save_for_backward(inputs, *weights, rows, gates, hidden, cells, squashed)
        return hidden[1:], cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, into_hidden: Tensor, into_cell: Tensor) -> Any:  # type: ignore[override]
        inputs, w, u, b, b2, *others = ctx.saved_tensors
        if not ctx.deferred.is_open:
            found = plain_gradients(ctx, _plain, [inputs, w, u, b, b2], [into_hidden, into_cell])
            return *found, None, None
        if into_hidden.stride(2) != 1:
            into_hidden = into_hidden.contiguous()
        into_cell = into_cell.clone(memory_format=torch.contiguous_format)
        onward = torch.empty_like(others[0]) if ctx.needs_input_grad[0] else None
        arguments = into_hidden, *into_hidden.stride()[:2], into_cell, *others
        weights = ctx.deferred.at_once(ctx.weights)
        factor = -ctx.deferred.lr
        compiler.call(ctx.backward_step, *ctx.sizes, *arguments, factor, onward, *weights)
        return (onward, *[None] * 6)


def _plain(inputs: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `_LayerStep` by PyTorch."""
    zeros = inputs.new_zeros(1, inputs.shape[1], weights[1].shape[1])
    options = (True, 1, 0.0, True, False, False)  # biases, layers, dropout, training, …
    outputs, _, cells = cast(Any, torch).lstm(inputs, (zeros, zeros), weights, *options)
    return outputs, cells[0]


class _Library(NamedTuple):
    columns: int  # of a panel; the size of a layer must be a multiple
    steps: dict[str, tuple[Any, Any]]  # by precision: forward, backward


@cache
def _library() -> _Library | None:
    """Returns the library if it is compiled and agrees with PyTorch, else None; decided once."""
    found = library()
    if found is None:
        return None
    compiled = found.functions
    steps: dict[str, tuple[Any, Any]] = {}
    for precision in _TOLERANCES:
        pair = _steps(compiled, precision)
        if pair is not None:
            steps[precision] = pair
    made = _Library(compiled.columns(), steps)
    if not all(_agrees(made, precision) for precision in steps):
        compiler.warn("LSTMs")
        return None
    return made


def _steps(compiled: ctypes.CDLL, precision: str) -> tuple[Any, Any] | None:
    """The steps with products in a precision, forward and backward, if the processor has it."""
    try:
        forward, backward = (
            ctypes.c_void_p.in_dll(compiled, f"{name}_{precision}").value or 0
            for name in ("forward", "backward")
        )
    except ValueError:
        return None
    return _FORWARD(forward), _BACKWARD(backward)


def _agrees(library: _Library, precision: str) -> bool:
    """True if a small layer takes the step that PyTorch finds for the equations of an LSTM."""
    generator, size, lr = torch.Generator().manual_seed(0), library.columns, 0.1

    def drawn(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-0.5, 0.5, generator=generator)

    inputs = drawn(4, 3, 5).requires_grad_()
    shapes = (4 * size, 5), (4 * size, size), (4 * size,), (4 * size,)
    weights = [drawn(*shape).requires_grad_() for shape in shapes]
    into = drawn(4, 3, size)
    into[2:, 1] = 0.0  # a line that is padded
    w, u, b, b2 = weights
    h = c = torch.zeros(3, size)
    states: list[Tensor] = []
    for x in inputs:
        i, f, g, o = (x @ w.t() + h @ u.t() + b + b2).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    outputs = torch.stack(states)
    onward, *gradients = torch.autograd.grad((outputs * into).sum(), [inputs, *weights])
    expected = [w.detach() - lr * g for w, g in zip(weights, gradients, strict=True)]
    deferred = Deferred()
    found, _ = _layer(library.steps[precision], inputs, deferred, weights)
    with deferred.open(lr):
        (found_onward,) = torch.autograd.grad((found * into).sum(), [inputs])
    pairs = [(outputs, found), (onward, found_onward), *zip(expected, weights, strict=True)]
    tolerance = _TOLERANCES[precision]
    return all(torch.allclose(a, b, rtol=0.0, atol=tolerance) for a, b in pairs)
