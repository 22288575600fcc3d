"""Text for next-character prediction: an example is one line.

The symbols are the 256 bytes, START and PADDING. A line b1 … bn becomes

    inputs    START  b1  b2  …  bn       PADDING …
    targets   b1     b2  …   bn newline  PADDING …

so every position predicts the byte that comes next, and a line of n bytes has n + 1 targets, its
newline among them. These are the characters that count: losses and metrics leave PADDING out.

A line that is too long for a row goes on in the next one, whose first input is the byte before
and not START. Nothing is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.core.validate import as_count
from potluck.data.federated import Array, Dataset, Examples
from potluck.data.tables.hold_out import num_test
from potluck.data.tables.symbols import STEPS as STEPS
from potluck.data.tables.symbols import Symbols

START, PADDING, SYMBOLS = Symbols().start, Symbols().padding, Symbols().size  # 256, 257, 258

_NEWLINE = 10
_TEST_FRACTION = 0.2


def line_corpus(
    name: str,
    clients: Mapping[str, Sequence[bytes]],
    *,
    checksums: Mapping[str, str],
    steps: int = STEPS,
) -> Dataset:
    """A data set of the lines of each client, of which the last 20 % are test lines.

    Rows are in the order of the clients and, within one, of its lines; `groups` and `test_groups`
    are the clients' names.

    Raises:
        DataError: no clients at all.
    """
    if not clients:
        raise DataError(f"{name!r} must have at least one client with lines, got 0.")
    cuts = [len(lines) - num_test(len(lines), _TEST_FRACTION) for lines in clients.values()]
    pieces = list(zip(clients.values(), cuts, strict=True))
    train, groups = _side(list(clients), [lines[:cut] for lines, cut in pieces], steps)
    test, test_groups = _side(list(clients), [lines[cut:] for lines, cut in pieces], steps)
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=SYMBOLS,
        padding=PADDING,
        groups=groups,
        test_groups=test_groups,
        checksums=checksums,
    )


def encode_lines(lines: Sequence[bytes], steps: int = STEPS) -> Examples:
    """Inputs and targets of lines, int16 [rows, steps]; a line of n bytes fills
    ⌈(n + 1) / steps⌉ rows, which `rows_per_line` counts.

    Args:
        lines: without their newlines.
        steps: positions in a row.
    """
    text = np.frombuffer(b"".join(line + b"\n" for line in lines), np.uint8)
    if np.count_nonzero(text == _NEWLINE) != len(lines):
        wrong = next(line for line in lines if b"\n" in line)
        raise ValueError(f"a line must not contain a newline, got line={wrong!r}. Split it.")
    lengths = np.array([len(line) + 1 for line in lines], np.int64)
    return Examples(*Symbols(steps=as_count("steps", steps)).rows(text, lengths))


def rows_per_line(lines: Sequence[bytes], steps: int = STEPS) -> NDArray[np.int64]:
    """Returns the number of rows of `encode_lines` for each line: 1 below `steps` bytes."""
    return np.array([len(line) // steps + 1 for line in lines], np.int64)


def _side(
    names: Sequence[str], lines_of: Sequence[Sequence[bytes]], steps: int
) -> tuple[Examples, Array]:
    """The examples of all clients, one after another, and the client of each."""
    rows = [int(rows_per_line(lines, steps).sum()) for lines in lines_of]
    lines = list(chain.from_iterable(lines_of))
    return encode_lines(lines, steps), np.repeat(np.array(names, np.str_), rows)
