"""Modules as data: a copy that shares nothing, and what a module holds, by name.

What a module holds are not only parameters and buffers: also tensors, arrays, numbers, lists and
generators in its attributes, and what the objects there hold in theirs.
"""

from __future__ import annotations

import copy
import io
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from potluck.engine.module.rebinding import Rebinding, twins

TABLES = ("_parameters", "_buffers", "_modules")
PLUMBING = frozenset(vars(nn.Module()))  # of every module: its tables and hooks
ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy, also of what PyTorch itself does not copy: its generators, tensors that were
    computed from weights, hooks on weights, and functions that hold parts of the module."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule) and id(part) not in memo:
            pairs = zip(part.modules(), _script_copied(part).modules(), strict=True)
            memo |= {id(inner): copied for inner, copied in pairs}
        for value in _direct(vars(part)):
            if isinstance(value, torch.Generator):
                memo[id(value)] = cast("Any", value).clone_state()
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    copied = copy.deepcopy(module, memo)
    rebinding = Rebinding(twins(module, copied))
    for part in copied.modules():
        if not isinstance(part, torch.jit.ScriptModule):
            _rebind(vars(part), rebinding)
    for parameter in module.parameters():
        some: Any = parameter
        hooks: list[Any] = [*(some._backward_hooks or {}).values()]
        late: list[Any] = [*(some._post_accumulate_grad_hooks or {}).values()]
        mine: Any = rebinding.of(parameter)
        for hook in hooks:
            mine.register_hook(rebinding.of(hook))
        for hook in late:
            mine.register_post_accumulate_grad_hook(rebinding.of(hook))
    return copied


def _script_copied(module: torch.jit.ScriptModule) -> Any:
    """Copies a scripted module by its file: PyTorch's copy computes with the original's weights."""
    there: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the format, which stays here
        file = io.BytesIO()
        there.save(module, file)
        file.seek(0)
        return there.load(file)


def _rebind(attributes: dict[str, Any], rebinding: Rebinding) -> None:
    """Makes what a copied module holds refer to the copy."""
    for key, value in attributes.items():
        if key in TABLES:
            continue
        if key not in PLUMBING:
            attributes[key] = rebinding.of(value)
        elif isinstance(value, dict):
            hooks = cast("dict[Any, Any]", value)
            for number, hook in hooks.items():
                hooks[number] = rebinding.of(hook)


def leaves(root: Any) -> dict[str, Any]:
    """All that a module holds, by name: tensors, arrays, atoms, and the states of generators.

    Functions, and objects that do not show what they hold, are left out.
    """
    return dict(_leaves("", root, set()))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of what only one of two modules holds, or what differs."""
    found = [n for n, value in one.items() if n not in other or not _equal(value, other[n])]
    return found + [name for name in other if name not in one]


def _direct(values: Mapping[str, Any]) -> Iterator[Any]:
    """Attributes, and what lies in the containers among them."""
    for value in values.values():
        yield value
        if isinstance(value, (list, tuple, deque)):
            yield from cast("list[Any]", value)
        elif isinstance(value, dict):
            yield from cast("dict[Any, Any]", value).values()


def _leaves(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (*ATOMS, Tensor, np.ndarray, np.generic, torch.Size)):
        yield name, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, inner in _parts(value):
        yield from _leaves(f"{name}{key}" if name else key.removeprefix("."), inner, seen)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """Yields what an object holds, with the way to reach it."""
    held: Mapping[str, Any] = getattr(value, "__dict__", {})
    if isinstance(value, torch.Generator):
        held = {"state": value.get_state()}
    elif isinstance(value, random.Random):
        held = {"state": repr(value.getstate())}
    elif isinstance(value, (np.random.Generator, np.random.RandomState)):
        bits: Any = getattr(value, "bit_generator", value)
        held = {"state": repr(bits.state if bits is not value else bits.get_state(legacy=False))}
    elif isinstance(value, torch.jit.ScriptModule):  # which has no tables of its own
        held = value.state_dict(keep_vars=True)
    elif isinstance(value, nn.Module):
        own = {key: inner for key, inner in vars(value).items() if key not in PLUMBING}
        tables = [vars(value)[table] for table in TABLES]
        return [(f".{key}", inner) for table in (*tables, own) for key, inner in table.items()]
    elif isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        return [(f"[{key!r}]", inner) for key, inner in pairs.items()]
    elif isinstance(value, (list, tuple, deque)):
        row = cast("list[Any]", value)
        return [(f"[{i}]", inner) for i, inner in enumerate(row)]
    elif isinstance(value, (set, frozenset)):
        held = {"elements": repr(sorted(map(repr, cast("set[Any]", value))))}
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells}
    elif isinstance(value, MethodType):
        held = {"self": value.__self__}
    elif isinstance(value, partial):
        bound = cast("partial[Any]", value)
        held = {"args": bound.args, "keywords": bound.keywords}
    return [(f".{key}", inner) for key, inner in held.items()]


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        if one.is_meta:
            return True
        apart = one.detach() != other.detach()
        if one.is_floating_point() or one.is_complex():
            apart &= ~(one.isnan() & other.isnan())
        return not bool(apart.any())
    if isinstance(one, np.ndarray):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(one.tobytes() == other.tobytes() or np.all(one == other))
    return bool(one == other) or (one != one and other != other)
