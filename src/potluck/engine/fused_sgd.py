"""Layers whose backward pass finds their SGD step without writing a gradient.

For a linear layer y = W x + b the gradient of a batch of B examples is a product of two thin
matrices, ∇W = gᵀ x with g = ∂ℓ/∂y [B, out] and x [B, in]. A plain step writes it out, reads it
back and adds it to W. Here the product is added to W directly, as one rank-B update

    W ← W − lr · gᵀ x

when the backward pass is over (`potluck.engine.deferred`). The gradient is never written, which for
large layers and small batches saves most of the memory traffic of a step. LSTMs do the same where
their steps can be compiled (`potluck.engine.native.lstm`).

Only layers that are proven plain are chosen (`potluck.engine.module.plain`), and every call checks
again. After a later hook, patch or other weight, under autocasting, for an unusual input or in a
transformation of the model, the layer runs the forward of its class. Its gradient is then written
as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from potluck.engine.deferred import Deferred, plain_gradients
from potluck.engine.module.plain import (
    Proof,
    is_compiled,
    is_observed,
    is_plain,
    places_of,
    prove,
)
from potluck.engine.native import lstm
from potluck.engine.precision import Precision

SMALLEST = 65_536  # weights; below it the plain step is as fast
_THIN = 32  # rows of a batch; up to here the time goes into reading the weights, not into products
# Weights; from it on oneDNN multiplies thin batches faster than MKL (benchmarks/LOG.md, "oneDNN for
# products"): 2 to 5 % of a step of the CNN.
_LARGE = 1_000_000

_Forward = Callable[..., Any]


class InPlaceLayers:
    """The layers of one module that are fused with their steps.

    Args:
        compiled: on one thread, where LSTMs may be compiled, these too.
        smallest: weights from which on a layer is fused.
    """

    def __init__(
        self,
        module: nn.Module,
        precision: Precision = "float32",
        *,
        compiled: bool = False,
        smallest: int = SMALLEST,
    ) -> None:
        self.deferred = Deferred()
        self.layers: list[nn.Module] = []
        self.num_calls = 0
        """The number of calls of fused layers, for tests: the plain forward does not count."""
        self.is_off = False
        self.precision: Precision = precision
        self._was_compiled = False  # whether a compiled layer was called since the last step
        self._handles = RemovableHandle.next_id
        if is_compiled(module):
            return
        places = places_of(module)
        for layer in module.modules():
            forward = _forward_of(layer, precision, compiled, smallest)
            proof = None if forward is None else prove(layer, places)
            if forward is not None and proof is not None:
                proof.hand_over(_Fused(self, layer, proof, forward))
                self.layers.append(layer)

    def step(self, lr: float, loss: Tensor) -> AbstractContextManager[None]:
        """Collects the steps of a loss's backward pass in this block, and takes them at its end."""
        compiled, self._was_compiled = self._was_compiled, False
        # Hooks on the results of a forward pass cannot be found, but every hook has a new handle.
        handles, self._handles = self._handles, RemovableHandle.next_id
        return self.deferred.open(lr, loss if compiled and handles == self._handles else None)

    @contextmanager
    def plain(self) -> Generator[None]:
        """Makes the layers plain in this block."""
        self.is_off = True
        try:
            yield
        finally:
            self.is_off = False

    def note(self, *, compiled: bool) -> None:
        """Notes the call of a layer."""
        self.num_calls += 1
        self._was_compiled |= compiled


class _Fused:
    """The replacement of a layer's forward. A copy of the layer gets its class's own."""

    def __init__(
        self, owner: InPlaceLayers, layer: nn.Module, proof: Proof, forward: _Forward
    ) -> None:
        self._owner, self._layer, self._proof, self._forward = owner, layer, proof, forward

    def __call__(self, inputs: Any, *rest: Any, **named: Any) -> Any:
        plain: _Forward = type(self._layer).forward
        if torch.compiler.is_compiling():  # checked first, so that nothing else is traced
            return plain(self._layer, inputs, *rest, **named)
        if not (rest or named or self._owner.is_off) and self._is_proven(inputs):
            outputs = self._forward(self._owner, self._layer, inputs)
            if outputs is not NotImplemented:
                return outputs
        return plain(self._layer, inputs, *rest, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        layer = memo.get(id(self._layer), self._layer)
        return MethodType(cast(Any, type(layer).forward), layer)

    def _is_proven(self, inputs: Any) -> bool:
        return (
            not is_observed()
            and type(inputs) in (Tensor, nn.Parameter)
            and inputs.layout is torch.strided
            and torch.is_grad_enabled()
            and _casts(inputs, self._owner.precision)
            and vars(self._layer).get("forward") is self
            and self._proof.holds()
        )


def _casts(inputs: Tensor, precision: Precision) -> bool:
    """True if PyTorch would make the products of these inputs in the precision of the run."""
    autocasts = torch.is_autocast_enabled("cpu")
    if precision == "float32":
        return not autocasts and inputs.dtype == torch.float32
    return (
        autocasts
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and inputs.dtype in (torch.float32, torch.bfloat16)
    )


def _forward_of(
    layer: nn.Module, precision: Precision, compiled: bool, smallest: int
) -> _Forward | None:
    """The fused forward pass of a layer, if it is of a kind that has one, and plain."""
    own = vars(layer)["_parameters"]
    if is_plain(layer, nn.Linear):
        weight = own.get("weight")  # there is none where another network makes it
        if weight is None or weight.numel() < smallest or own.keys() != {"weight", "bias"}:
            return None
        return _linear_step
    if compiled and is_plain(layer, nn.LSTM) and lstm.suits(layer, precision, smallest):
        return _lstm if list(own) == lstm.names(layer) else None
    return None


def _linear_step(owner: InPlaceLayers, layer: nn.Linear, inputs: Tensor) -> Tensor:
    if inputs.ndim < 2 or inputs.shape[-1] != layer.in_features or inputs.device.type != "cpu":
        return NotImplemented
    owner.note(compiled=False)
    rounds = owner.precision == "bf16" and inputs.numel() > _THIN * inputs.shape[-1]
    kind = torch.bfloat16 if rounds else torch.float32
    step = cast("Callable[..., Tensor]", _LinearStep.apply)
    return step(inputs.to(kind), layer.weight, layer.bias, owner.deferred)


def _lstm(owner: InPlaceLayers, layer: nn.LSTM, inputs: Tensor) -> Any:
    if not lstm.takes(inputs, None, owner.precision):
        return NotImplemented
    owner.note(compiled=True)
    return lstm.in_place(layer, inputs, owner.deferred, owner.precision)


class _LinearStep(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward pass finds the SGD step of W and b. Products are of the
    inputs' type; the weights and their step are float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, deferred: Deferred
    ) -> Tensor:
        kind = inputs.dtype
        ctx.layer, ctx.deferred = (weight, bias), deferred
        ctx.rounded = None if kind == weight.dtype else weight.to(kind)
        ctx.save_for_backward(inputs, weight, bias)
        autocasts = torch.is_autocast_enabled("cpu")  # which would round them
        with torch.autocast("cpu", enabled=False) if autocasts else nullcontext():
            if ctx.rounded is None:
                return _linear(inputs, weight, bias)
            rows = inputs.flatten(0, -2)  # one product, whatever the layout
            bias = None if bias is None else bias.to(kind)
            outputs = nn.functional.linear(rows, ctx.rounded, bias)
            return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        inputs, weight, bias = ctx.saved_tensors
        if not ctx.deferred.is_open:
            return *plain_gradients(ctx, _unrounded, [inputs, weight, bias], [gradient]), None
        rows, onward = gradient.flatten(0, -2), None  # [batch, out]
        if ctx.needs_input_grad[0] and ctx.rounded is None:
            onward = _linear(gradient, weight.t(), None)
        elif ctx.needs_input_grad[0]:
            onward = (rows @ ctx.rounded).view(*gradient.shape[:-1], -1)
        ctx.deferred.product(*ctx.layer, rows, inputs.flatten(0, -2))
        return onward, None, None, None


def _unrounded(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(inputs.float(), weight, bias)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, by size and not by the clock, so that every process gets the same bits."""
    if weight.numel() < _LARGE or not _has_onednn():
        return nn.functional.linear(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """True if this PyTorch multiplies by oneDNN; the operator is not among its public ones."""
    some = torch.eye(16)
    try:
        found = torch.ops.mkldnn._linear_pointwise(some, some.t(), some[0], "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, some + some[0])
