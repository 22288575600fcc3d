"""Layers that take their SGD step while gradients flow through them.

For a linear layer y = W x + b the gradient of a batch of B examples is a product of two thin
matrices, ∇W = gᵀ x with g = ∂ℓ/∂y [B, out] and x [B, in]. A plain step writes it out, reads it
back and adds it to W. Here the backward pass adds the product to W directly, as one rank-B update

    W ← W − lr · gᵀ x

after it has computed what flows on to the layers before. The gradient is never written, which for
large layers and small batches saves most of the memory traffic of a step. LSTMs and, in bfloat16,
convolutions that are pooled do the same where their steps can be compiled (`potluck.tasks.native`,
`potluck.tasks.pooled_convolution`), and linear layers do it in compiled code then
(`potluck.tasks.linear`).

This is exact only for a layer that is called once in a forward pass and whose weights nothing
else reads (no penalty on them, no tying). `probe` finds out which layers those are by running one
batch; every other layer keeps the plain step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from potluck.tasks import linear, native, pooled_convolution
from potluck.tasks.precision import Precision

_SMALLEST = 65_536  # weights; below it the plain step is as fast
_THIN = 32  # rows of a batch; up to here the time goes into reading the weights, not into products
_LARGE = 1_000_000  # weights; from it on oneDNN multiplies thin batches faster than MKL


class InPlaceLayers:
    """The layers of one module that update themselves, once `probe` has chosen them."""

    def __init__(
        self, module: nn.Module, precision: Precision = "float32", *, compiled: bool = False
    ) -> None:
        """`compiled`: on one thread, where layers may be compiled, others than linear ones too."""
        self.lr = 0.0
        self._precision: Precision = precision
        self._compiled = compiled
        self.token = torch.zeros((), requires_grad=True)  # makes gradients flow to first layers
        self._calls: dict[nn.Module, int] = {
            layer: 0
            for layer in module.modules()
            if _is_large(layer) or (compiled and _is_compiled(layer, precision))
        }

    def probe(self, module: nn.Module, forward: Callable[[], Tensor]) -> set[nn.Parameter]:
        """Choose the layers by one forward and backward pass at rate 0; return their parameters,
        which from now on need no step. The values of parameters may be lost.

        Args:
            forward: runs the model on a batch and returns its loss.
        """
        self.lr = 0.0
        for layer in self._calls:
            self._replace(layer)
        try:
            loss = forward()
            inputs = [p for layer in self._calls for p in layer.parameters()]
            found = torch.autograd.grad(loss, [*inputs, self.token], allow_unused=True)
            read_elsewhere = {id(p) for p, g in zip(inputs, found, strict=False) if _is_there(g)}
        except Exception:
            read_elsewhere = {id(p) for layer in self._calls for p in layer.parameters()}
        uses = Counter(id(p) for layer in self._calls for p in layer.parameters())
        tied = {parameter for parameter, times in uses.items() if times > 1}
        for layer, calls in list(self._calls.items()):
            if calls != 1 or any(id(p) in tied | read_elsewhere for p in layer.parameters()):
                self._restore(layer)
        return {p for layer in self._calls for p in layer.parameters()}

    def start(self, lr: float) -> None:
        """Before the forward pass of a step at rate `lr`."""
        self.lr = lr
        for layer in self._calls:
            self._calls[layer] = 0

    def called_twice(self) -> bool:
        """After a forward pass: whether its backward pass would not be exact."""
        return any(calls > 1 for calls in self._calls.values())

    @contextmanager
    def plain(self) -> Generator[None]:
        """Within it the layers are plain ones."""
        layers = list(self._calls)
        for layer in layers:
            self._restore(layer)
        try:
            yield
        finally:
            for layer in layers:
                self._replace(layer)

    def _replace(self, layer: nn.Module) -> None:
        self._calls[layer] = 0

        tiled = self._compiled and self._precision == "bf16" and linear.suits(layer)

        def straight(inputs: Tensor) -> Tensor:
            assert isinstance(layer, nn.Linear)
            self._calls[layer] += 1
            if tiled and linear.takes(layer, inputs):
                return linear.in_place(layer, inputs, self.token, self.lr)
            rounds = self._precision == "bf16" and inputs.numel() > _THIN * inputs.shape[-1]
            kind = torch.bfloat16 if rounds else torch.float32
            step = cast("Callable[..., Tensor]", _LinearStep.apply)
            return step(inputs.to(kind), layer.weight, layer.bias, self.token, self)

        def lstm(inputs: Any, hx: Any = None) -> Any:
            assert isinstance(layer, nn.LSTM)
            if not native.takes(inputs, hx, self._precision):
                self._calls[layer] = 2  # as if called twice: not exact
                return cast(Any, nn.LSTM).forward(layer, inputs, hx)
            self._calls[layer] += 1
            return native.in_place(layer, inputs, self.token, self.lr, self._precision)

        def pooled(images: Tensor) -> Tensor:
            assert isinstance(layer, nn.Conv2d)
            if not pooled_convolution.takes(layer, images):
                self._calls[layer] = 2
                return pooled_convolution.plain(layer, images)
            self._calls[layer] += 1
            return pooled_convolution.in_place(layer, images, self.token, self.lr)

        if isinstance(layer, nn.Conv2d):
            pooled_convolution.replace(layer, pooled)
        else:
            layer.forward = cast(Any, straight if isinstance(layer, nn.Linear) else lstm)

    def _restore(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Conv2d):
            pooled_convolution.restore(layer)
        else:
            del layer.forward  # the class's own shows again
        del self._calls[layer]


def _is_large(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.weight.requires_grad
        and layer.weight.numel() >= _SMALLEST
    )


def _is_compiled(layer: nn.Module, precision: Precision) -> bool:
    if isinstance(layer, nn.Conv2d):
        return precision == "bf16" and pooled_convolution.suits(layer)
    return native.suits(layer, precision)


def _is_there(gradient: Tensor | None) -> bool:
    return gradient is not None  # with `allow_unused`, which PyTorch's annotations leave out


class _LinearStep(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward pass is also the SGD step of W and b. Products are of the
    inputs' type; the weights and their step are float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, owner: Any
    ) -> Tensor:
        weight, kind = weight.detach(), inputs.dtype
        ctx.weight, ctx.bias, ctx.owner = weight, bias, owner
        ctx.rounded = None if kind == weight.dtype else weight.to(kind)
        if ctx.rounded is None:
            ctx.save_for_backward(inputs)
            with torch.autocast("cpu", enabled=False):  # which would round them
                return _linear(inputs, weight, bias)
        rows = inputs.flatten(0, -2)  # one product, whatever the layout
        ctx.save_for_backward(rows)
        outputs = nn.functional.linear(rows, ctx.rounded, None if bias is None else bias.to(kind))
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (inputs,) = ctx.saved_tensors
        weight, lr, onward = ctx.weight, ctx.owner.lr, None
        rows = gradient.flatten(0, -2)  # [batch, out]
        if ctx.rounded is None:
            if ctx.needs_input_grad[0]:
                onward = _linear(gradient, weight.t(), None)
            weight.addmm_(rows.t(), inputs.flatten(0, -2), alpha=-lr)
        else:
            if ctx.needs_input_grad[0]:
                onward = (rows @ ctx.rounded).view(*gradient.shape[:-1], -1)
            weight.add_(rows.t() @ inputs, alpha=-lr)
        if ctx.bias is not None:
            ctx.bias.detach().add_(rows.sum(0), alpha=-lr)
        return onward, None, None, None, None


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, by size and not by the clock, so that every process gets the same bits."""
    if weight.numel() < _LARGE or not _has_onednn():
        return nn.functional.linear(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """Whether this PyTorch multiplies by oneDNN; the operator is not among its public ones."""
    some = torch.eye(16)
    try:
        found = torch.ops.mkldnn._linear_pointwise(some, some.t(), some[0], "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, some + some[0])
