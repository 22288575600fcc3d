"""Names the compiled code that the local training of a model uses on this machine."""

from __future__ import annotations

from torch import nn

from potluck.engine.native import lstm, max_pool
from potluck.models.vision import MaxPoolReLU


def kernels_of(module: nn.Module) -> str:
    """The names of the libraries that are used where a module is trained one client at a time on
    one thread, or "none". They are compiled and loaded now: before processes are forked, so that
    one compiler runs and all processes have the same."""
    layers = list(module.modules())
    found = (
        lstm.library() if any(map(lstm.is_wanted, layers)) else None,
        max_pool.library() if any(type(layer) is MaxPoolReLU for layer in layers) else None,
    )
    return ", ".join(one.name for one in found if one is not None) or "none"
