"""Proves that a layer does what its class says and nothing more, as every fast path requires.

A fast path computes what `nn.Linear.forward` computes without calling it. That is right only for a
layer of exactly that class, as PyTorch wrote it, and without hooks. No attribute may hide one of
the class (a `forward` of its own, a `weight` that is computed). A step that a fast path takes in
place of autograd's is right only for weights that are plain leaves. And a proof may become invalid:
hooks are added, weights are replaced.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_of_torch

_GLOBAL_HOOKS: list[Any] = [
    hooks
    for name, hooks in vars(module_of_torch).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]
_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]
_LINEAR = functional.linear


class Proof:
    """That a layer is plain, as `prove` has found, and what that rests on."""

    def __init__(self, layer: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        self._layer, self._weights = layer, weights
        self._kind = type(layer)
        self._forward: Any = self._kind.forward
        self._names = set(vars(layer))
        self._places = len(vars(layer)["_parameters"])  # also of a bias that there is not

    def hand_over(self, forward: Any) -> None:
        """Gives the layer another forward pass."""
        self._layer.forward = forward
        self._names.add("forward")

    def holds(self) -> bool:
        """True if nothing of it has changed."""
        own = vars(self._layer)
        present = own["_parameters"]
        return (
            type(self._layer) is self._kind
            and self._kind.forward is self._forward
            and own.keys() == self._names
            and not own["_modules"]
            and not any(map(own.get, _HOOKS))
            and not any(_GLOBAL_HOOKS)
            and functional.linear is _LINEAR
            and len(present) == self._places
            and sum(weight is not None for weight in present.values()) == len(self._weights)
            and all(
                present.get(name) is weight
                and weight.requires_grad
                and weight.is_contiguous()
                and not has_hooks(weight)
                for name, weight in self._weights.items()
            )
        )


def prove(layer: nn.Module, places: Mapping[int, int]) -> Proof | None:
    """A proof that a layer is plain and that its parameters are trained leaves which no other
    place of the module has; None if that is not so.

    Args:
        places: of the module that the layer is a part of; see `places_of`.
    """
    if not is_plain(layer, type(layer)):
        return None
    present = vars(layer)["_parameters"]
    weights = {name: weight for name, weight in present.items() if weight is not None}
    owned = all(is_plain_weight(w) and places[id(w)] == 1 for w in weights.values())
    return Proof(layer, weights) if owned and len(weights) else None


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling a layer is exactly `kind.forward`."""
    own = vars(layer)
    return (
        type(layer) is kind
        and is_quiet(layer)
        and not own["_modules"]
        and not own.keys() & set(dir(kind))
        and not own.keys() & own["_parameters"].keys()
        and not any(hasattr(kind, name) for name in own["_parameters"])
        and _is_as_written(kind)
    )


def is_quiet(module: nn.Module) -> bool:
    """True if nothing but its class's forward runs when a module, of any class, is called."""
    own = vars(module)
    return not (
        any(map(own.get, _HOOKS))
        or any(_GLOBAL_HOOKS)
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    )


def is_compiled(module: nn.Module) -> bool:
    """True if a module or one of its parts is compiled or scripted."""
    return any(
        vars(part).get("_compiled_call_impl") is not None
        or "_orig_mod" in vars(part).get("_modules", {})
        or isinstance(part, torch.jit.ScriptModule)
        for part in module.modules()
    )


def is_plain_weight(weight: Any) -> bool:
    """True if a tensor is a trained leaf whose gradient nothing else reads."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and weight.is_leaf
        and weight.dtype == torch.float32
        and not has_hooks(weight)
    )


def has_hooks(tensor: Tensor) -> bool:
    """True if a hook reads or changes the gradient of a leaf."""
    after = getattr(tensor, "_post_accumulate_grad_hooks", None)
    return bool(tensor._backward_hooks) or bool(after)


def are_hooked(parameters: Iterable[Tensor]) -> bool:
    """True if any of them `has_hooks`."""
    return any(map(has_hooks, parameters))


def places_of(module: nn.Module) -> Counter[int]:
    """Returns the number of places where a parameter is registered in a module, by its identity."""
    return Counter(
        id(weight)
        for part in module.modules()
        for weight in vars(part)["_parameters"].values()
        if weight is not None
    )


def is_observed() -> bool:
    """True if a transformation, a compiler, a trace or a mode intercepts PyTorch's operations."""
    there: Any = torch
    private = there._C
    try:
        return bool(
            there.compiler.is_compiling()
            or there.jit.is_tracing()
            or private._functorch.peek_interpreter_stack() is not None
            or private._len_torch_function_stack()
            or private._len_torch_dispatch_stack()
            or there.autograd.forward_ad._current_level >= 0
        )
    except AttributeError:  # private names: without them nothing can be proven
        return True


def _is_as_written(kind: type[nn.Module]) -> bool:
    """True if a class's forward, and what it calls, are those of the file that defines it."""
    code = getattr(vars(kind).get("forward"), "__code__", None)
    home: ModuleType | None = sys.modules.get(kind.__module__)
    return (
        code is not None
        and home is not None
        and code.co_filename == home.__file__
        and kind.__call__ is nn.Module.__call__
        and functional.linear is _LINEAR
        and isinstance(_LINEAR, BuiltinFunctionType)
    )
