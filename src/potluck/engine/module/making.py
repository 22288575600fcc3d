"""The one model of a run, made once by its factory under the seed of the run.

All that a factory draws follows from the seed: the first weights, and what never changes, such as
a permutation, a mask, or random features. Every trainer and evaluator has a model that was made
from this seed. So these constants are the same in training, in evaluation, in every process, and
after a resume. A factory that makes another model from the same seed is refused.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potluck.core import derive_seed
from potluck.data.trees import called, mapped
from potluck.engine.module.copies import copy_of, differences, leaves
from potluck.engine.module.kinds import averaged_tensors, check_module, made_by
from potluck.engine.module.randomness import borrowed_randomness, seed_generators
from potluck.engine.module.rebinding import Pairs, twins
from potluck.engine.module.variables import Variables


class Making:
    """Makes the module of one task, and keeps the seeds for which it did.

    `seed` is that of the run which was begun last; None before there is one.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.seeds: set[int] = set()
        self._is_one: bool | None = None  # whether the factory gives one module again and again
        self._is_drawn: bool | None = None  # whether seeds decide more than weights, once known
        self._originals: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of all that still exist
        self._is_checked = False

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self.seed = seed
        self.seeds.add(seed)

    def module(self, model: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
        """A module for this seed that shares nothing with any other."""
        if isinstance(model, nn.Module):
            check_module(model)
            return copy_of(model)
        module = self._new(model, seed)
        if self._is_one is None:
            self._is_one = self._new(model, seed) is module
        return copy_of(module) if self._is_one else module

    def twins(self, model: nn.Module | Callable[[], nn.Module], module: nn.Module) -> Pairs:
        """Pairs the parts of other modules that are still in use with their counterparts in
        `module`."""
        originals = [model] if isinstance(model, nn.Module) else list(self._originals)
        found: Pairs = {}
        for original in originals:
            if original is not module:
                with contextlib.suppress(ValueError, KeyError):  # it is built otherwise
                    found |= twins(original, module)
        return found

    def check(
        self,
        model: nn.Module | Callable[[], nn.Module],
        one: nn.Module,
        seed: int,
        inputs: Any,
    ) -> None:
        """Refuses a factory that does not make the same from the same seed; checked once.

        Args:
            one: a module for this seed, which is of no more use then.
            inputs: what two modules are tried on.

        Raises:
            ValueError: it does not; what differs is named.
        """
        if isinstance(model, nn.Module) or self._is_checked:
            return
        other = self.module(model, seed)
        found = differences(_drawn(leaves(one)), _drawn(leaves(other)))
        if not found and differences(_outputs(one, inputs), _outputs(other, inputs)):
            found = differences(leaves(one), leaves(other)) or ["forward"]
        if found:
            raise ValueError(
                "model must make the same module whenever it is called with the same seeds, got "
                f"another {found[0]!r} the second time. Draw from torch, numpy.random or random, "
                "which Potluck seeds, or give your own generator a seed."
            )
        self._is_checked = True

    def is_drawn(self, model: nn.Module | Callable[[], nn.Module], *seeds: int) -> bool:
        """True if modules made from these two seeds differ in more than their weights."""
        if isinstance(model, nn.Module) or len(set(seeds)) == 1:
            return False
        if self._is_drawn is None:
            first, second = (_constants(self._new(model, seed)) for seed in seeds)
            found = differences(first, second)
            if found:  # some of it may be another every time
                found = set(found) - set(differences(first, _constants(self._new(model, seeds[0]))))
            self._is_drawn = bool(found)
        return self._is_drawn

    def _new(self, model: Callable[[], nn.Module], seed: int) -> nn.Module:
        with borrowed_randomness():
            first = derive_seed(seed, "weights")
            torch.manual_seed(first)  # of GPUs, too
            seed_generators(first)
            module = made_by(model)
        self._originals.add(module)
        return module

    # What was made stays here: another process makes it again.
    def __getstate__(self) -> Any:
        return self.seed, self.seeds

    def __setstate__(self, state: Any) -> None:
        self.__init__()
        self.seed, self.seeds = state


def _outputs(module: nn.Module, inputs: Any) -> dict[str, Any]:
    """Returns a module's outputs for a few examples, in evaluation mode; nothing where it fails."""
    try:
        with borrowed_randomness(), Variables.of(module, None).held(), torch.no_grad():
            seed_generators(0)
            return leaves(called(module.eval(), mapped(torch.tensor, inputs)))
    except Exception:  # reported where it trains
        return {}


def _drawn(held: dict[str, Any]) -> dict[str, Any]:
    """Returns what may have been drawn: neither names nor numbers that identify modules."""
    kinds = (Tensor, np.ndarray)
    return {k: v for k, v in held.items() if isinstance(v, kinds) or ("[" in k and _is_number(v))}


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic))


def _constants(module: nn.Module) -> dict[str, Any]:
    """Returns what a module holds beside its vector, and what is computed from that."""
    averaged = {id(tensor) for _, tensor in averaged_tensors(module)}
    return {
        name: value
        for name, value in leaves(module).items()
        if id(value) not in averaged and not (isinstance(value, Tensor) and value.requires_grad)
    }
