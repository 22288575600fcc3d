"""The symbols of text, bytes or characters, and lines as rows of them.

Bytes are the 256 of `potluck.data.lines`. Characters are an alphabet, numbered in its order, in
which U+FFFD stands for every character that it has not. START and PADDING come after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from potluck.data.tables.columns import Array

UNKNOWN = "\ufffd"
STEPS = 80  # of the paper's LSTM

_INT16 = 2**15


class Symbols(BaseModel):
    """The coding of lines of text as rows of numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    alphabet: Annotated[str, Field(max_length=100_000)] | None = None
    """The characters in the order of their codes; None: the bytes of UTF-8."""
    steps: Annotated[int, Field(ge=1, le=100_000)] = STEPS
    """Positions in a row; a longer line goes on in the next row."""
    column: Annotated[str, Field(max_length=200)] | None = None
    """Of a table; None: a text file."""

    @model_validator(mode="after")
    def _consistent(self) -> Symbols:
        alphabet = self.alphabet
        if alphabet is not None and list(alphabet) != sorted({*alphabet, "\n", UNKNOWN}):
            raise ValueError("an alphabet must be sorted, with newline and U+FFFD, none twice")
        return self

    @classmethod
    def of(cls, texts: Iterable[str], steps: int, column: str | None) -> Symbols:
        """The characters that occur."""
        found = {"\n", UNKNOWN}
        for text in texts:
            found.update(text)
        return cls(alphabet="".join(sorted(found)), steps=steps, column=column)

    @property
    def start(self) -> int:
        """Comes before the first symbol of a line."""
        return 256 if self.alphabet is None else len(self.alphabet)

    @property
    def padding(self) -> int:
        """Fills rows; it never counts."""
        return self.start + 1

    @property
    def size(self) -> int:
        """The number of symbols, with START and PADDING."""
        return self.start + 2

    @property
    def dtype(self) -> str:
        """The type of the rows' entries."""
        return "int16" if self.size <= _INT16 else "int64"

    def encode(self, lines: Sequence[str]) -> tuple[Array, Array]:
        """Inputs and targets [rows, steps] of lines, which are without their newlines.

        A line of n symbols fills ⌈(n + 1) / steps⌉ rows.
        """
        codes = [self._codes(line + "\n") for line in lines]
        lengths = np.array([len(line) for line in codes], np.int64)
        return self.rows(np.concatenate([np.zeros(0, np.int64), *codes]), lengths)

    def rows(self, flat: Array, lengths: NDArray[np.int64]) -> tuple[Array, Array]:
        """Inputs and targets [rows, steps] of the symbols of lines of these lengths, which lie
        behind each other in `flat`, newlines included."""
        starts = np.cumsum(lengths) - lengths
        rows = -(-lengths // self.steps)
        positions = np.arange(len(flat)) - np.repeat(starts, lengths)
        # Where in its line a symbol is, and in which row and column that puts it.
        row = np.repeat(np.cumsum(rows) - rows, lengths) + positions // self.steps
        places = row * self.steps + positions % self.steps
        before = np.full(len(flat), self.start, self.dtype)
        before[1:] = flat[:-1]
        before[starts] = self.start
        sides = np.full((2, int(rows.sum()), self.steps), self.padding, self.dtype)
        sides.reshape(2, -1)[:, places] = before, flat
        return sides[0], sides[1]

    def decode(self, rows: Array) -> str:
        """The text in some rows, without START and PADDING."""
        codes = np.asarray(rows).ravel()
        codes = codes[codes < self.start]
        if self.alphabet is None:
            return codes.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return "".join(self.alphabet[code] for code in codes)

    def _codes(self, text: str) -> NDArray[np.int64]:
        if self.alphabet is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        points = _points(text)
        known = _points(self.alphabet)
        codes = np.searchsorted(known, points).clip(max=len(known) - 1)
        unknown = self.alphabet.index(UNKNOWN)
        return np.where(known[codes] == points, codes, unknown).astype(np.int64)


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
