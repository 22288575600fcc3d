"""Which layers do what their class says and nothing more: the one proof that fast paths ask for.

A fast path computes what `nn.Linear.forward` computes without calling it. That is right only for a
layer of exactly that class, without hooks, with no attribute that stands before one of its class
(a `forward` of its own, a `weight` that is computed), whose class is as PyTorch wrote it. A step
that a fast path takes in place of autograd's is right only for weights that are plain leaves.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
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


def is_plain(layer: nn.Module, kind: type[nn.Module], ours: Collection[str] = ()) -> bool:
    """Whether calling a layer is exactly what `kind.forward` says.

    Args:
        ours: names of attributes that Potluck itself has put on it.
    """
    own = vars(layer)
    return (
        type(layer) is kind
        and not any(hooks for name, hooks in own.items() if "hook" in name and name not in ours)
        and not any(_GLOBAL_HOOKS)
        and not own["_modules"]
        and all(name in ours for name in own.keys() & _names_of(kind))
        and not own.keys() & own["_parameters"].keys()
        and not any(hasattr(kind, name) for name in own["_parameters"])
        and _is_as_written(kind)
    )


def is_quiet(module: nn.Module) -> bool:
    """Whether nothing but its class's forward runs when a module, of any class, is called."""
    own = vars(module)
    return not (
        any(hooks for name, hooks in own.items() if "hook" in name)
        or any(_GLOBAL_HOOKS)
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or one of its parts is compiled or scripted."""
    return any(
        vars(part).get("_compiled_call_impl") is not None
        or "_orig_mod" in vars(part).get("_modules", {})
        or isinstance(part, torch.jit.ScriptModule)
        for part in module.modules()
    )


def is_plain_weight(weight: Any) -> bool:
    """Whether a tensor is a trained leaf whose gradient nobody else gets to see."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and weight.is_leaf
        and weight.dtype == torch.float32
        and not has_hooks(weight)
    )


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody sees or changes the gradient of a leaf."""
    after = getattr(tensor, "_post_accumulate_grad_hooks", None)
    return bool(tensor._backward_hooks) or bool(after)


def are_hooked(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them `has_hooks`."""
    return any(map(has_hooks, parameters))


def owned_weights(layer: nn.Module, places: Mapping[int, int]) -> list[nn.Parameter] | None:
    """The parameters of a layer in the order of their names, if they are plain and no other place
    of the module has them; else None.

    Args:
        places: of the module that the layer is a part of; see `places_of`.
    """
    weights = [weight for weight in vars(layer)["_parameters"].values() if weight is not None]
    alone = all(is_plain_weight(weight) and places[id(weight)] == 1 for weight in weights)
    return weights if alone else None


def places_of(module: nn.Module) -> Counter[int]:
    """In how many places of a module a parameter is registered, by its identity."""
    return Counter(
        id(weight)
        for part in module.modules()
        for weight in vars(part)["_parameters"].values()
        if weight is not None
    )


def is_observed() -> bool:
    """Whether a transformation, a compiler, a trace or a mode wants to see PyTorch's own
    operations."""
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
    """Whether a class's forward, and what it calls, are those of the file that defines it."""
    code = getattr(vars(kind).get("forward"), "__code__", None)
    home: ModuleType | None = sys.modules.get(kind.__module__)
    return (
        code is not None
        and home is not None
        and code.co_filename == home.__file__
        and kind.__call__ is nn.Module.__call__
        and isinstance(functional.linear, BuiltinFunctionType)
    )


@cache
def _names_of(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(dir(kind))
