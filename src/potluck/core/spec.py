"""The names and shapes inside a model's vector.

A model is one contiguous float32 vector w ∈ ℝᵈ; a `Spec` says which slice of it is which tensor.
`flatten` and `unflatten` share memory: the tensors that `unflatten` returns are views of the
vector, so writing into one writes into the other. Both work on NumPy arrays and on PyTorch
tensors alike, and on the rows of a matrix of models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from potluck.core.update import Vector


@dataclass(frozen=True, slots=True)
class Spec:
    """Names and shapes, in the order in which they lie in the vector.

    Averaged buffers (batch-norm statistics) are part of it, behind the parameters; integer
    buffers are not: they stay local.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Any]]) -> Spec:
        """The spec of named tensors (anything with a `shape`)."""
        pairs = [(name, tuple(int(n) for n in tensor.shape)) for name, tensor in tensors]
        return cls(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts; one more entry than tensors, the last is `dim`."""
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
        """Bytes of one float32 vector: what one client uploads or downloads in a round."""
        return 4 * self.dim

    def digest(self) -> str:
        """Equal digests mean that vectors are interchangeable."""
        text = repr((self.names, self.shapes)).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def flatten(self, tensors: Mapping[str, Any]) -> Vector:
        """One new vector with the contents of `tensors`.

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
        """Views into `vector` by name: an array or tensor whose last axis has length `dim`."""
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
