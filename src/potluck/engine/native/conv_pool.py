"""A convolution, 2 × 2 max pooling and ReLU as one step, compiled for processors with a tile unit.

With products in bfloat16, PyTorch writes what a convolution gives, four times what is left of it
after pooling, and reads it again, and going back it writes as much, three quarters of it zeros.
`conv_pool.cpp` pools what the processor's tile unit (AMX) gives before it leaves the cache, and its
backward pass finds the SGD step of the layer too (`potluck.engine.deferred`), as that of the linear
layers of `potluck.engine.fused_sgd` does, which chooses these too.

Factors of products are rounded to bfloat16, the pooled maps and the gradients that flow back too;
sums and the step are float32. Elsewhere, and for other convolutions, PyTorch does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck.engine.deferred import Deferred, plain_gradients
from potluck.engine.gpu.convolution import padding_of
from potluck.engine.native import compiler
from potluck.engine.native.max_pool import relu_of_max_pool

_SOURCES = compiler.sources("conv_pool.cpp", "gemm.hpp", "amx.hpp")
_COLUMNS = 32  # channels come in whole multiples of it
_LARGEST = 15  # kernel
_TOLERANCE = 2e-2  # of a step whose numbers are about 1
_POINTER = ctypes.c_void_p
_SIZES = [ctypes.c_int64, *[ctypes.c_int] * 5]
_FORWARD = ctypes.CFUNCTYPE(None, *_SIZES, *[_POINTER] * 5)
_BACKWARD = ctypes.CFUNCTYPE(None, *_SIZES, *[_POINTER] * 3, ctypes.c_float, *[_POINTER] * 3)
IN_PLACE = "pooled_in_place"  # of a layer: what does it instead

Step = Callable[[Tensor], Tensor]


def pooled(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """relu(max_pool2d(layer(images), 2)) of images [batch, channels, height, width]."""
    step: Step | None = getattr(layer, IN_PLACE, None)
    return plain(layer, images) if step is None else step(images)


def plain(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """`pooled` by PyTorch."""
    # ReLU and max pooling commute, and pooling first leaves a quarter to do.
    return relu_of_max_pool(layer(images))


def suits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer's pooled steps can be compiled here."""
    own = vars(layer)["_parameters"]
    if type(layer) is not nn.Conv2d or own.get("weight") is None or own.get("bias") is None:
        return False
    side, channels = layer.kernel_size[0], layer.in_channels
    return (
        layer.kernel_size == (side, side)
        and side % 2 == 1
        and side <= _LARGEST
        and padding_of(layer) == (side // 2, side // 2)
        and (channels == 1 or channels % _COLUMNS == 0)
        and layer.out_channels % _COLUMNS == 0
        and _library() is not None
    )


def takes(layer: nn.Conv2d, images: Tensor) -> bool:
    """Whether these images are of the kind that `in_place` is for."""
    return (
        images.ndim == 4
        and images.numel() > 0
        and images.device.type == "cpu"
        and images.shape[1] == layer.in_channels
        and images.shape[2] % 2 == images.shape[3] % 2 == 0
        and not (layer.in_channels == 1 and images.requires_grad)
    )


def in_place(layer: nn.Conv2d, images: Tensor, deferred: Deferred) -> Tensor:
    """What `pooled(layer, images)` gives; a backward pass finds the SGD step too."""
    library = _library()
    assert library is not None  # `suits` said so
    apply = cast("Callable[..., Tensor]", _Step.apply)
    return apply(images, layer.weight, layer.bias, library, deferred)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, library: Any, deferred: Any
    ) -> Tensor:
        rows = _rows(images)
        batch, height, width, channels = rows.shape
        shape = batch, height // 2, width // 2, len(weight)
        maps = torch.empty(shape, dtype=torch.bfloat16)
        which = torch.empty(shape, dtype=torch.uint8)
        sizes = batch, height, width, channels, len(weight), weight.shape[-1]
        forward, ctx.backward_step = library
        compiler.call(forward, *sizes, rows, weight, bias, maps, which)
        ctx.save_for_backward(images, weight, bias, rows, which)
        ctx.sizes, ctx.deferred, ctx.layer = sizes, deferred, [weight, bias]
        return maps.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, into: Tensor) -> Any:  # type: ignore[override]
        images, weight, bias, rows, which = ctx.saved_tensors
        if not ctx.deferred.is_open:
            return *plain_gradients(ctx, _plain, [images, weight, bias], [into]), None, None
        onward = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        layer, factor = ctx.deferred.at_once(ctx.layer), -ctx.deferred.lr
        flows = rows, _rows(into), which, factor, onward
        compiler.call(ctx.backward_step, *ctx.sizes, *flows, *layer)
        if onward is not None:
            onward = onward.permute(0, 3, 1, 2).to(images.dtype)
        return (onward, *[None] * 4)


def _plain(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `_Step` gives, not rounded."""
    maps = functional.conv2d(images.float(), weight, bias, padding=weight.shape[-1] // 2)
    return functional.relu(functional.max_pool2d(maps, 2))


def _rows(images: Tensor) -> Tensor:
    """[batch, channels, height, width] as bfloat16 [batch, height, width, channels]."""
    return images.bfloat16().permute(0, 2, 3, 1).contiguous()


@cache
def _library() -> tuple[Any, Any] | None:
    """Forward and backward, if they are compiled and agree with PyTorch; asked for once."""
    return compiler.tiled_steps(
        "pooled convolutions",
        _SOURCES,
        "pooled",
        (_FORWARD, _BACKWARD),
        lambda steps: all(_agrees(steps, channels) for channels in (1, _COLUMNS)),
    )


def _agrees(library: tuple[Any, Any], channels: int) -> bool:
    """Whether a small layer takes the step that PyTorch finds, but for the rounding."""
    generator, lr = torch.Generator().manual_seed(0), 0.1

    def drawn(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-0.5, 0.5, generator=generator).bfloat16().float()

    images, kernel = drawn(3, channels, 4, 18), drawn(_COLUMNS, channels, 3, 3) / 4
    bias, into = drawn(_COLUMNS), drawn(3, _COLUMNS, 2, 9)
    first, second = kernel.clone().requires_grad_(), bias.clone().requires_grad_()
    images.requires_grad_(channels > 1)
    flowing = [images] if channels > 1 else []
    maps = functional.conv2d(images, first, second, padding=1)
    maps = functional.relu(functional.max_pool2d(maps, 2))
    *onward, change, shift = torch.autograd.grad((maps * into).sum(), [*flowing, first, second])
    deferred = Deferred()
    apply = cast("Callable[..., Tensor]", _Step.apply)
    found = apply(images, kernel.requires_grad_(), bias, library, deferred)
    with deferred.open(lr):
        mine = torch.autograd.grad((found * into).sum(), [*flowing, kernel], allow_unused=True)
    pairs = [(maps, found), (first - lr * change, kernel), (second - lr * shift, bias)]
    pairs += zip(onward, mine, strict=False)
    return all(torch.allclose(a, b.float(), rtol=0.0, atol=_TOLERANCE) for a, b in pairs)
