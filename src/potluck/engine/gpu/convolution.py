"""A convolution of many clients, each with a kernel of its own, as batched matrix products.

`torch.func.vmap` makes one grouped convolution of it, with a group for each client. Libraries
optimise grouped convolutions for many groups of few channels. Others run one after another, or
without matrix units. Here the patches under the kernel are written next to each other,

    P  [clients, batch · height · width, kernel · channels]        Y = P K + b
    ∂ℓ/∂K = Pᵀ ∂ℓ/∂Y            ∂ℓ/∂x = P' K',  P' the patches of ∂ℓ/∂Y and K' the kernel turned

so that all of it is batched products of the size that a GPU is made for. Channels come last in
memory, throughout: a patch is then rows that lie together, and pooling reads and writes them too.
The price is memory: a patch of a 5 × 5 kernel is 25 times its input.

Exact for steps of 1, kernels no larger than twice the padding allows, and zeros around the image;
others are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Padding = tuple[int, int]


def padding_of(layer: nn.Conv2d) -> Padding | None:
    """Rows and columns of zeros on each side; None if the layer is not one of those done here."""
    height, width = layer.kernel_size
    if layer.stride != (1, 1) or layer.dilation != (1, 1) or layer.groups != 1:
        return None
    if layer.padding_mode != "zeros":
        return None
    if isinstance(layer.padding, str):
        odd = height % 2 == 1 and width % 2 == 1
        if layer.padding == "valid":
            return 0, 0
        return (height // 2, width // 2) if odd else None
    rows, columns = (int(n) for n in layer.padding)
    return (rows, columns) if rows < height and columns < width else None


def convolve(images: Tensor, kernel: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
    """Images [clients, batch, channels, height, width] to maps of the same axes.

    Args:
        kernel: [clients, out, channels, kernel height, kernel width].
        bias: [clients, out].
    """
    function = cast("Callable[..., Tensor]", _Convolution.apply)
    maps = function(images, kernel, padding)
    return maps if bias is None else maps + bias[:, None, :, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, kernel: Tensor, padding: Padding) -> Tensor:  # type: ignore[override]
        clients, out, channels, height, width = kernel.shape
        patches, shape = _patches(images, (height, width), padding)
        flat = kernel.permute(0, 3, 4, 2, 1).reshape(clients, height * width * channels, out)
        ctx.save_for_backward(patches, kernel)
        ctx.padding = padding
        return _maps(torch.bmm(patches, flat), shape)

    @staticmethod
    def backward(ctx: Any, into: Tensor) -> Any:  # type: ignore[override]
        patches, kernel = ctx.saved_tensors
        clients, out, channels, height, width = kernel.shape
        rows = into.permute(0, 1, 3, 4, 2).reshape(clients, -1, out)
        into_kernel = torch.bmm(patches.transpose(1, 2), rows)
        into_kernel = into_kernel.view(clients, height, width, channels, out)
        into_images = None
        if ctx.needs_input_grad[0]:
            around = height - 1 - ctx.padding[0], width - 1 - ctx.padding[1]
            errors, shape = _patches(into, (height, width), around)
            turned = kernel.flip(3, 4).permute(0, 3, 4, 1, 2)
            flat = turned.reshape(clients, height * width * out, channels)
            into_images = _maps(torch.bmm(errors, flat), shape)
        return into_images, into_kernel.permute(0, 4, 3, 1, 2), None


def _patches(
    images: Tensor, kernel: tuple[int, int], padding: Padding
) -> tuple[Tensor, tuple[int, ...]]:
    """The patches under a kernel, and [clients, batch, height, width] of the maps."""
    rows, columns = padding
    last = functional.pad(images.permute(0, 1, 3, 4, 2), (0, 0, columns, columns, rows, rows))
    seen = last.unfold(2, kernel[0], 1).unfold(3, kernel[1], 1)  # [… height, width, channels, k, k]
    shape = tuple(seen.shape[:4])
    patches = seen.permute(0, 1, 2, 3, 5, 6, 4)
    return patches.reshape(shape[0], -1, kernel[0] * kernel[1] * images.shape[2]), shape


def _maps(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows [clients, positions, channels] as [clients, batch, channels, height, width]."""
    return rows.view(*shape, rows.shape[2]).permute(0, 1, 4, 2, 3)
