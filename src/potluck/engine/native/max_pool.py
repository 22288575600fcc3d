"""ReLU of 2 × 2 max pooling as one operation, compiled for the processor at hand.

PyTorch takes two passes forward and three back, one of which only writes zeros, and its pooling
kernels are slow at bfloat16: half of the time of a large batch of the paper's CNN. `max_pool.cpp`
takes one each way. It gives the same bits, so it is used wherever it can be: on a CPU, on one
thread, with the channels last. PyTorch does it elsewhere, and where a transformation, a compiler or
a mode intercepts operations (`potluck.engine.module.plain.is_observed`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck.engine.module.plain import is_observed, is_plain
from potluck.engine.native import compiler
from potluck.models.vision import MaxPoolReLU

_SOURCES = compiler.sources("max_pool.cpp")
_SIZES, _POINTER = [ctypes.c_int64, *[ctypes.c_int] * 3], ctypes.c_void_p
_FUNCTION = ctypes.CFUNCTYPE(None, *_SIZES, *[_POINTER] * 3)  # forward and backward


def use_compiled(module: nn.Module) -> None:
    """Gives the layers of a module that pool in this way the forward pass of `relu_of_max_pool`."""
    for layer in module.modules():
        if is_plain(layer, MaxPoolReLU):
            layer.forward = relu_of_max_pool


def relu_of_max_pool(maps: Tensor) -> Tensor:
    """Computes `MaxPoolReLU` for maps [batch, channels, height, width]."""
    functions = _library() if _suits(maps) else None
    if functions is None:
        return functional.relu(functional.max_pool2d(maps, 2))
    pool = cast("Callable[..., Tensor]", _Pool.apply)
    return pool(maps, *functions[maps.dtype])


def library() -> compiler.Library | None:
    """Returns the compiled library of poolings."""
    return compiler.library("poolings", _SOURCES)


def _suits(maps: Tensor) -> bool:
    return (
        type(maps) is Tensor
        and not is_observed()
        and maps.device.type == "cpu"
        and maps.dtype in (torch.float32, torch.bfloat16)
        and maps.ndim == 4
        and maps.numel() > 0
        and maps.shape[2] % 2 == maps.shape[3] % 2 == 0
        and maps.is_contiguous(memory_format=torch.channels_last)
        and torch.get_num_threads() == 1
    )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, forward: Any, backward: Any) -> Tensor:  # type: ignore[override]
        batch, channels, height, width = maps.shape
        shape = batch, height // 2, width // 2, channels
        pooled, which = maps.new_empty(shape), maps.new_empty(shape, dtype=torch.uint8)
        sizes = batch, height, width, channels
        compiler.call(forward, *sizes, maps, pooled, which)
        ctx.save_for_backward(which)
        ctx.sizes, ctx.backward_step = sizes, backward
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, into: Tensor) -> Any:  # type: ignore[override]
        (which,) = ctx.saved_tensors
        batch, height, width, channels = ctx.sizes
        rows = into.permute(0, 2, 3, 1).contiguous()
        onward = rows.new_empty(batch, height, width, channels)
        compiler.call(ctx.backward_step, *ctx.sizes, rows, which, onward)
        return onward.permute(0, 3, 1, 2), None, None


@cache
def _library() -> dict[torch.dtype, tuple[Any, Any]] | None:
    """Returns forward and backward by type, if they are compiled and agree with PyTorch; decided
    once."""
    compiled = library()
    if compiled is None:
        return None
    functions: dict[torch.dtype, tuple[Any, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        forward, backward = (
            _FUNCTION(ctypes.c_void_p.in_dll(compiled.functions, f"{way}_{name}").value or 0)
            for way in ("forward", "backward")
        )
        functions[dtype] = forward, backward
    if not all(_agrees(*each) for each in functions.items()):
        compiler.warn("poolings")
        return None
    return functions


def _agrees(dtype: torch.dtype, functions: tuple[Any, Any]) -> bool:
    """True if small maps, some of whose numbers are equal, are pooled as by PyTorch."""
    with torch.inference_mode(mode=False), torch.enable_grad():  # whatever mode the caller is in
        return _is_same(dtype, functions)


def _is_same(dtype: torch.dtype, functions: tuple[Any, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(-3, 4, (3, 6, 4, 33), generator=generator).to(dtype).permute(0, 3, 1, 2)
    into = torch.randn(3, 33, 3, 2, generator=generator).to(dtype)
    theirs = maps.clone(memory_format=torch.preserve_format).requires_grad_()
    ours = maps.clone(memory_format=torch.preserve_format).requires_grad_()
    pairs = [
        (functional.relu(functional.max_pool2d(theirs, 2)), theirs),
        (cast("Callable[..., Tensor]", _Pool.apply)(ours, *functions), ours),
    ]
    found = [(pooled, *torch.autograd.grad(pooled, given, into)) for pooled, given in pairs]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
