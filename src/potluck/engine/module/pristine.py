"""A module as it was made, to which it is put back before every client.

Beside its weights a module may hold anything: counters, a hidden state, lists, generators of its
own. It may write them in any way: in place, by assignment, through `.data`, in another module's
attribute. None of it may pass from one client to the next, whose local training starts from what
was received and from nothing else.

The check is cheap where nothing changed. Attributes are compared by identity, tensors by their
memory and versions. An object with state of its own cannot be compared, and is replaced by a copy
of what it was.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from potluck.engine.module.copies import ATOMS, PLUMBING, TABLES, differences, leaves

_SMALL = 4096  # entries, which are written back without a check
_FIXED = (
    *ATOMS,
    Tensor,
    torch.Size,
    nn.Module,
    np.generic,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    ModuleType,
    partial,
)


class _Table(NamedTuple):
    """The attributes of a module, or its parameters, buffers, modules or hooks."""

    name: str  # what its entries' names begin with
    live: dict[Any, Any]
    before: dict[Any, Any]


class _Original(NamedTuple):
    """A tensor of the vector, where it belongs."""

    name: str
    table: dict[str, Any]
    key: str
    tensor: Tensor
    data: Tensor  # what it is a view of the vector by
    address: int
    trains: bool


class _Outside:
    """A tensor that is not in the vector."""

    def __init__(self, name: str, tensor: Tensor, *, may_count: bool) -> None:
        self.name, self.tensor, self.may_count = name, tensor, may_count
        self.data, self.address = tensor.data, tensor.data_ptr()
        self.content = tensor.detach().clone()
        self.version = tensor._version

    def is_changed(self) -> bool:
        moved = self.tensor.data_ptr() != self.address
        return moved or self.tensor._version != self.version

    def restore(self) -> None:
        if self.tensor.data_ptr() != self.address:
            self.tensor.data = self.data
        if self.content.numel() <= _SMALL or self.tensor._version != self.version:
            self.tensor.detach().copy_(self.content)
            self.version = self.tensor._version


class _Mutable(NamedTuple):
    """An attribute whose value may change without being assigned."""

    name: str
    table: _Table
    key: str
    is_plain: bool  # made of containers and values that compare


class Pristine:
    """The present content of a module, whose averaged tensors are views of a vector already.

    Args:
        averaged: these tensors, by name; their values are not kept.
        loss: is put back as well, with what it holds.
    """

    def __init__(self, module: nn.Module, averaged: dict[str, Tensor], loss: Any = None) -> None:
        self._module = module
        self._tables: list[_Table] = []
        self._places: list[_Original] = []
        self._mutable: list[_Mutable] = []
        self._outside: list[_Outside] = []
        ours = {id(tensor): name for name, tensor in averaged.items()}
        known = dict(module.named_buffers())
        for name, tensor in known.items():
            if id(tensor) not in ours:
                self._outside.append(_Outside(name, tensor, may_count=True))
                ours[id(tensor)] = ""
        parts = _parts(module, "")
        while isinstance(loss, (MethodType, partial)):
            loss = loss.__self__ if isinstance(loss, MethodType) else cast("Any", loss).func
        if isinstance(loss, nn.Module):
            mine = set(map(id, parts.values()))
            parts |= {n: p for n, p in _parts(loss, "loss.").items() if id(p) not in mine}
            for name, tensor in loss.named_buffers():
                if id(tensor) not in ours:
                    self._outside.append(_Outside(f"loss.{name}", tensor, may_count=False))
                    ours[id(tensor)] = ""
        elif not _is_fixed(loss):
            self._note_attributes("loss.", getattr(loss, "__dict__", {}), ours)
        for prefix, part in parts.items():
            self._note(prefix, vars(part), ours)
        self._of_modules = [table for table in self._tables if _is_of_modules(table)]
        self._fixed = {id(value): value for value in [*parts.values(), *module.parameters()]}
        self._fixed |= {id(value): value for value in known.values()}
        self._values = self._copied([m.table.live[m.key] for m in self._mutable])

    def _note(self, prefix: str, attributes: dict[str, Any], ours: dict[int, str]) -> None:
        for name in TABLES:
            inner = attributes[name]
            self._tables.append(_Table(prefix, inner, dict(inner)))
            for key, value in inner.items():
                if ours.get(id(value)):
                    trains, address = value.requires_grad, value.data_ptr()
                    place = _Original(
                        ours[id(value)], inner, key, value, value.data, address, trains
                    )
                    self._places.append(place)
        self._note_attributes(prefix, attributes, ours)
        for key in PLUMBING.intersection(attributes).difference(TABLES):
            if isinstance(attributes[key], dict):
                self._tables.append(_Table(prefix, attributes[key], dict(attributes[key])))

    def _note_attributes(
        self, prefix: str, attributes: dict[str, Any], ours: dict[int, str]
    ) -> None:
        table = _Table(prefix, attributes, dict(attributes))
        self._tables.append(table)
        for key, value in attributes.items():
            if key in PLUMBING:
                continue
            if isinstance(value, Tensor):
                if id(value) not in ours and value.is_leaf and not value.is_meta:
                    self._outside.append(_Outside(prefix + key, value, may_count=False))
            elif not _is_fixed(value):
                self._mutable.append(_Mutable(prefix + key, table, key, _is_plain(value)))

    def adopt(self) -> None:
        """Adds to the kept content what was put on the module since."""
        for table in self._tables:
            for key in table.live.keys() - table.before.keys():
                table.before[key] = table.live[key]

    def read(self, views: dict[str, Tensor]) -> None:
        """Copies the module's tensors into the views of the vector, where they are elsewhere.

        Raises:
            ValueError: a tensor is gone, or has another shape.
        """
        elsewhere = [p for p in self._places if _is_elsewhere(p)]
        moved = any(map(_differs, self._of_modules))
        if not elsewhere and not moved:
            return
        present: dict[str, Any] = {**dict(self._module.named_buffers(remove_duplicate=False))}
        present |= dict(self._module.named_parameters(remove_duplicate=False))
        for place in self._places:
            now, view = present.get(place.name), views[place.name]
            if now is None or now.shape != view.shape:
                raise ValueError(
                    f"a model must keep its tensors while it trains: {place.name} must have shape "
                    f"{tuple(view.shape)}, got {None if now is None else tuple(now.shape)}."
                )
            if now.data_ptr() != place.address:
                view.copy_(now.detach())

    def restore(self) -> None:
        """Restores everything but the values of the averaged tensors."""
        for table in self._tables:
            if _differs(table):
                table.live.clear()
                table.live.update(table.before)
        for place in self._places:
            if place.tensor.data_ptr() != place.address:
                place.tensor.data = place.data
            if place.tensor.requires_grad != place.trains:
                place.tensor.requires_grad_(place.trains)
        for outside in self._outside:
            outside.restore()
        if self._mutable:
            self._restore_values()

    def changed(self) -> str | None:
        """The name of something that changed, and is neither a value of an averaged tensor nor a
        counter: a buffer that was written in place."""
        for table in self._tables:
            if _differs(table):
                keys = table.live.keys() | table.before.keys()
                differing = (k for k in keys if table.live.get(k) is not table.before.get(k))
                return table.name + min(map(str, differing), default="?")
        for place in self._places:
            if place.tensor.data_ptr() != place.address or _is_elsewhere(place):
                return place.name
        for outside in self._outside:
            if outside.is_changed() and not (
                outside.may_count and outside.tensor.data_ptr() == outside.address
            ):
                return outside.name
        for mutable, value in zip(self._mutable, self._values, strict=True):
            if not _same(mutable, mutable.table.live[mutable.key], value):
                return mutable.name
        return None

    def _restore_values(self) -> None:
        wrong = [
            not m.is_plain or not _same(m, m.table.live[m.key], value)
            for m, value in zip(self._mutable, self._values, strict=True)
        ]
        if any(wrong):
            for mutable, value in zip(self._mutable, self._copied(self._values), strict=True):
                mutable.table.live[mutable.key] = mutable.table.before[mutable.key] = value

    def _copied(self, values: list[Any]) -> list[Any]:
        """Copies of attributes, that share what these share, with the module's own parts in them;
        what cannot be copied stays as it is."""
        memo = dict(self._fixed)
        copies: list[Any] = []
        for value in values:
            try:
                copies.append(copy.deepcopy(value, memo))
            except Exception:
                copies.append(value)
        return copies


def _parts(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """A module's modules, by what the names of their attributes begin with."""
    some: Any = module
    return {
        f"{prefix}{path}." if path else prefix: part
        for path, part in some.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
    }


def _differs(table: _Table) -> bool:
    try:
        return table.live != table.before
    except (RuntimeError, ValueError, TypeError):  # tensors or arrays that are not the same
        return True


def _is_of_modules(table: _Table) -> bool:
    return any(isinstance(value, nn.Module) for value in table.before.values())


def _is_elsewhere(place: _Original) -> bool:
    now = place.table.get(place.key)
    return now is not place.tensor or place.tensor.data_ptr() != place.address


def _same(mutable: _Mutable, one: Any, other: Any) -> bool:
    if mutable.is_plain:
        try:
            return type(one) is type(other) and bool(one == other)
        except (RuntimeError, ValueError, TypeError):
            return False
    return not differences(leaves(one), leaves(other))


def _is_fixed(value: Any) -> bool:
    """True if a value can only change by assignment."""
    inside: Any = value
    if isinstance(value, torch.Generator):
        return False
    if isinstance(value, _FIXED) or type(value).__module__.partition(".")[0] == "torch":
        return True
    if getattr(getattr(inside, "__dataclass_params__", None), "frozen", False):
        return True
    return type(inside) in (tuple, frozenset) and all(_is_fixed(part) for part in inside)


def _is_plain(value: Any) -> bool:
    if type(value) not in (list, tuple, set, deque, dict, OrderedDict):
        return False
    some: Any = value
    inside: Any = some.values() if hasattr(some, "values") else some
    return all(_is_fixed(inner) or _is_plain(inner) for inner in inside)
