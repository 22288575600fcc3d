"""The precision in which local training multiplies matrices. Weights, gradients' sums and updates
are float32, and so is every evaluation on a CPU.

float32   every product in float32: the results of a CPU, to float tolerance
tf32      float32 whose factors are rounded to 10 bits before they are multiplied
bf16      factors, and the outputs of layers, in bfloat16 (8 bits), where PyTorch's autocast does
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch

from potluck.data.trees import mapped

Precision: TypeAlias = Literal["float32", "tf32", "bf16"]


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses an unknown precision.

    Raises:
        ValueError: no such word, or TF32 without a GPU.
    """
    if precision not in get_args(Precision):
        words = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(
            f"precision must be one of {words}, got precision={precision!r}. Leave it out for "
            "float32."
        )
    if precision == "tf32" and device.type == "cpu":
        raise ValueError(
            "precision must be 'float32' or 'bf16' on a CPU, which has no TF32, got "
            "precision='tf32'. Leave it out, or name a GPU as the device."
        )


@contextmanager
def products(precision: Precision) -> Generator[None]:
    """Makes float32 products on a GPU in float32 in this block, or in TF32 if the precision is
    "tf32".

    PyTorch's own default is TF32 for convolutions and LSTMs. A graph keeps what it was captured
    with.
    """
    wanted = "tf32" if precision == "tf32" else "ieee"
    before = [(part, _get(part)) for part in _parts()]
    try:
        for part, _ in before:
            _set(part, wanted)
        yield
    finally:
        for part, value in before:
            _set(part, value)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def floated(outputs: Any) -> Any:
    """Returns a model's outputs, one tensor or several together, in float32."""

    def one(part: Any) -> Any:
        is_float = isinstance(part, torch.Tensor) and part.is_floating_point()
        return part.float() if is_float else part

    return mapped(one, outputs)


def _parts() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # PyTorch ≥ 2.9
        return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    return [torch.backends.cuda.matmul, cudnn]


def _get(part: Any) -> Any:
    return part.fp32_precision if hasattr(part, "fp32_precision") else part.allow_tf32


def _set(part: Any, value: Any) -> None:
    if hasattr(part, "fp32_precision"):
        part.fp32_precision = value
    else:
        part.allow_tf32 = value if isinstance(value, bool) else value == "tf32"
