"""Weights that a loss depends on, and that nobody trains: they are no parameters of the model.

The parameters of a loss, a layer in a Python list, or the weights of a module that the loss holds
and that is not the one in training would stay as they are, without an error. So the graph of the
first losses is looked through for them.
"""

from __future__ import annotations

from torch import Tensor, nn

from potluck.core import TaskError
from potluck.engine.gradients import read_in

_LOOKS = 2  # losses: a tensor that is made anew for every batch is in one of them


class Foreign:
    """Looks through the first losses of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {id(parameter) for parameter in module.parameters()}
        self._looks = _LOOKS
        self._last: list[Tensor] = []

    def look(self, loss: Tensor) -> None:
        """Look through the graph of a loss, if it is one of the first.

        Raises:
            TaskError: it depends on weights that are no parameters of the module.
        """
        if self._looks == 0:
            return
        self._looks -= 1
        leaves = (getattr(node, "variable", None) for node in read_in(loss))
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in self._own]
        for leaf in found:
            if isinstance(leaf, nn.Parameter) or any(leaf is other for other in self._last):
                self._looks = _LOOKS  # as often as it is asked
                raise TaskError(
                    "a loss must depend on no other weights than the parameters of the model, "
                    f"which are what trains, got a tensor of shape {tuple(leaf.shape)} that needs "
                    "a gradient and is none. If it belongs to the loss, make it a parameter of "
                    "the model, or a constant by requires_grad_(False); if it is a layer's, "
                    "register the layer (nn.ModuleList instead of a list)."
                )
        self._last = found if self._looks else []
