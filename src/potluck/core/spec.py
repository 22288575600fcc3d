"""The names and shapes inside a model's vector.

A model is one contiguous float32 vector w ∈ ℝᵈ; a `Spec` says which slice of it is which tensor:

    w = [parameters | buffers]        # parameters first, num_parameters entries

and what becomes of each tensor in a round, its role:

    trained     a parameter that local steps move; its Δ is an update
    statistic   what the forward pass writes (running means and variances, a momentum encoder): the
                clients' values are averaged by weight, and nothing else acts on them
    constant    a frozen parameter, a mask, a table of positions: the same everywhere, so that it
                need not travel; it may hold infinities

What travels between a server and its clients is `packed`: trained entries, then statistics.

`flatten` and `unflatten` share memory: the tensors that `unflatten` returns are views of the
vector, so writing into one writes into the other. Both work on NumPy arrays and on PyTorch
tensors alike, and on the rows of a matrix of models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from potluck.core.update import Vector

Role: TypeAlias = Literal["trained", "statistic", "constant"]


@dataclass(frozen=True, slots=True)
class Spec:
    """Names, shapes and roles, in the order in which the tensors lie in the vector.

    Args:
        names, shapes: of each tensor. Integer buffers are not among them: they stay local.
        roles: of each tensor; all are trained if left out.
        num_buffers: how many of the tensors, the last ones, are buffers and not parameters.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    roles: tuple[Role, ...] = ()
    num_buffers: int = 0

    def __post_init__(self) -> None:
        if not self.roles:
            object.__setattr__(self, "roles", ("trained",) * len(self.names))

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, Any]],
        roles: Iterable[Role] = (),
        num_buffers: int = 0,
    ) -> Spec:
        """Returns the spec of named tensors (anything with a `shape`)."""
        pairs = [(name, tuple(int(n) for n in tensor.shape)) for name, tensor in tensors]
        names, shapes = tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs)
        return cls(names, shapes, tuple(roles), num_buffers)

    @classmethod
    def of_packed(
        cls, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], num_statistics: int
    ) -> Spec:
        """Returns the spec of what travels, of which the last tensors are statistics."""
        trained = len(names) - num_statistics
        roles: tuple[Role, ...] = ("trained",) * trained + ("statistic",) * num_statistics
        return cls(names, shapes, roles, num_statistics)

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the tensors that local steps move."""
        pairs = zip(self.names, self.roles, strict=True)
        return tuple(name for name, role in pairs if role == "trained")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The start of each tensor, and `dim` behind the last."""
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        return tuple(ends)

    @property
    def dim(self) -> int:
        """The length of the vector."""
        return sum(self.sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes of one float32 vector."""
        return 4 * self.dim

    @property
    def num_parameters(self) -> int:
        """The number of leading entries that are parameters, trained or not. Algorithms work on
        these."""
        return self.offsets[len(self.names) - self.num_buffers]

    @property
    def is_all_trained(self) -> bool:
        """True if every entry is of a trained parameter."""
        return self.num_buffers == 0 and all(role == "trained" for role in self.roles)

    def slices(self, *roles: Role) -> list[slice]:
        """Returns the places of the tensors of these roles, in order."""
        ends = self.offsets
        return [slice(ends[i], ends[i + 1]) for i, role in enumerate(self.roles) if role in roles]

    def size(self, *roles: Role) -> int:
        """Returns the number of entries that have these roles."""
        return sum(part.stop - part.start for part in self.slices(*roles))

    def with_roles(self, roles: Mapping[str, Role]) -> Spec:
        """Returns the same tensors, some of them in another role."""
        new: dict[str, Role] = dict(zip(self.names, self.roles, strict=True))
        new.update((name, role) for name, role in roles.items() if name in new)
        return Spec(self.names, self.shapes, tuple(new.values()), self.num_buffers)

    def packed(self) -> Spec:
        """Returns the spec of what travels: the trained tensors, then the statistics."""
        order = [i for i, role in enumerate(self.roles) if role == "trained"]
        statistics = [i for i, role in enumerate(self.roles) if role == "statistic"]
        order += statistics
        names = tuple(self.names[i] for i in order)
        return Spec.of_packed(names, tuple(self.shapes[i] for i in order), len(statistics))

    def pack(self, vector: Vector) -> Vector:
        """Turns a vector of this spec into one of `packed`."""
        parts = self.slices("trained") + self.slices("statistic")
        return np.concatenate([vector[part] for part in parts] or [vector[:0]])

    def unpack(self, packed: Vector, rest: Vector) -> Vector:
        """Turns a vector of `packed` into one of this spec, with the constants of `rest` [dim]."""
        vector, start = rest.copy(), 0
        for part in self.slices("trained") + self.slices("statistic"):
            stop = start + part.stop - part.start
            vector[part] = packed[start:stop]
            start = stop
        return vector

    def name_at(self, entry: int) -> str:
        """Returns the name of the tensor in which an entry of the vector lies."""
        ends = self.offsets
        return next(name for i, name in enumerate(self.names) if entry < ends[i + 1])

    def digest(self) -> str:
        """Returns a digest that is equal for specs whose vectors are interchangeable.

        So is then what an algorithm keeps of them.
        """
        told: tuple[object, ...] = (self.names, self.shapes)
        if not self.is_all_trained:
            trained = tuple(role == "trained" for role in self.roles)
            told += (self.num_buffers, trained)
        return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()

    def flatten(self, tensors: Mapping[str, Any]) -> Vector:
        """Returns one new vector with the contents of `tensors`.

        Raises:
            ValueError: a missing or foreign name, or a wrong shape.
        """
        if set(tensors) != set(self.names):
            wrong = sorted(set(tensors) ^ set(self.names))
            raise ValueError(
                f"tensors must have exactly the names of the spec, got a difference of {wrong}. "
                "Build the spec from the same model."
            )
        vector = np.empty(self.dim, np.float32)
        for name, view in self.unflatten(vector).items():
            array = np.asarray(tensors[name])
            if array.shape != view.shape:
                raise ValueError(
                    f"{name} must have shape {view.shape}, got shape={array.shape}. "
                    "Build the spec from the same model."
                )
            view[...] = array
        return vector

    def unflatten(self, vector: Any) -> dict[str, Any]:
        """Returns views into `vector` by name: an array or tensor whose last axis has length
        `dim`."""
        if vector.shape[-1] != self.dim:
            raise ValueError(
                f"a vector of this model must have length {self.dim}, "
                f"got length={vector.shape[-1]}. Use the spec that it was made with."
            )
        lead = tuple(vector.shape[:-1])
        offsets = self.offsets
        return {
            name: vector[..., offsets[i] : offsets[i + 1]].reshape(lead + shape)
            for i, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True))
        }
