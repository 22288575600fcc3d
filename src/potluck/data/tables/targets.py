"""The kind of targets: classes, quantities (a regression), several labels at once, or text.

The user says it (`kind`, in an experiment `task.kind`). An array or a column gives only a proposal.
Text and Booleans are classes, and decimals are quantities. Whole numbers are classes where they are
exactly 0 to k − 1 with few classes and many repeats. A note in words names that proposal. Anything
else that could be either is refused, with the two ways to say it.

A label of −100 among codes from 0 is no class: the loss leaves it out, as PyTorch's do.

Labels that are not their own codes (text, Booleans, whole numbers with gaps or below 0) are
numbered in sorted order over all clients together, and their names are kept.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.data.tables.columns import Array, first_text
from potluck.data.tables.row_places import at, listed

TargetKind: TypeAlias = Literal["classes", "regression", "multilabel", "text"]
KINDS: tuple[TargetKind, ...] = get_args(TargetKind)

IGNORED = -100  # the class that PyTorch's losses leave out if no other is named

_MOST_IN_TABLES = 20  # classes that a column of whole numbers is proposed to be
_EXACT = 2.0**53  # above it, floats hold not every whole number
_MOST_IN_ARRAYS = 1000  # an array of integers was made one on purpose

TAKEN = "targets are taken for"  # begins the note of a proposal

_SAY = (
    'Say kind = "regression" for quantities (prices, ages, counts) or kind = "classes" for codes; '
    "in an experiment that is task.kind."
)
_SAY_LABELS = (
    'Say kind = "multilabel" for several labels an example; of one-hot rows give '
    "targets.argmax(axis=1)."
)


class Part(NamedTuple):
    """Targets of one client or test set, as they were given, and where they are from."""

    where: str
    values: Array  # [examples] or [examples, ...]


class Meaning(NamedTuple):
    """The kind and the classes of the targets of all parts."""

    kind: TargetKind
    num_classes: int  # 0 for a regression
    classes: tuple[str, ...] | None = None  # None: labels are their own codes
    note: str | None = None  # what was proposed rather than said


def understand(
    parts: Sequence[Part],
    *,
    kind: TargetKind | None = None,
    num_classes: int | None = None,
    in_tables: bool = False,
    columns: bool = False,
) -> tuple[list[Array], Meaning]:
    """The targets of all parts as a model takes them, and what they are.

    Args:
        kind: what the user says they are; None takes the proposal of the values.
        num_classes: labels are then their own codes, from 0 to num_classes − 1; 0 for a regression.
        in_tables: a whole number is then no sign of intent.
        columns: a class may be [1] of each example, for a loss that takes it so.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(map(repr, KINDS))}, got kind={kind!r}.")
    _check_one_type(parts)
    note = None
    if kind is None:
        kind, note = _proposed(parts, num_classes, in_tables)
    as_kind = {"regression": _as_quantities, "multilabel": _as_many_labels, "text": _as_symbols}
    if kind == "classes":
        for part in parts:
            _check_label_shape(part, columns)
    values, meaning = as_kind.get(kind, _as_classes)(parts, num_classes)
    return values, meaning._replace(note=note)


def label_texts(values: Array) -> Array:
    """The names of many labels."""
    if values.dtype.kind == "U":
        return values.astype(object)
    distinct, inverse = np.unique(values, return_inverse=True)
    return np.array([label_text(value) for value in distinct], object)[inverse]


def encode_labels(values: Array, classes: Sequence[str], where: str) -> Array:
    """The codes of labels whose names are known."""
    codes = codes_of(label_texts(values), classes)
    must = f"a label must be one of {listed(map(repr, classes))}"
    _check(codes < 0, Part(where, values), must, "Mend it.")
    return codes


def codes_of(texts: Array, names: Sequence[str]) -> NDArray[np.int64]:
    """The place of each text among the names; −1 for one that is none of them."""
    known = {name: code for code, name in enumerate(names)}
    distinct, inverse = np.unique(texts.astype(np.str_), return_inverse=True)
    codes = np.array([known.get(str(text), -1) for text in distinct], np.int64)
    return codes[inverse].reshape(texts.shape)


def check_spaces(names: Sequence[str], what: str, where: str) -> None:
    """Raises a `DataError` for two names that look alike: they differ in the spaces around them
    alone, or in how an accent is coded, as a Mac and a PC do."""
    stripped: dict[str, str] = {}
    for name in names:
        other = stripped.setdefault(unicodedata.normalize("NFC", name).strip(), name)
        if other != name and name.strip():
            raise DataError(
                f"{what} must differ in more than the spaces around them, or how an accent is "
                f"coded, got {other!a} and {name!a} (see {where}). Write them alike."
            )


def label_text(value: Any) -> str:
    """The name of a label: 1, 1.0 and "1" are one class."""
    number: Any = cast("Any", value).item() if isinstance(value, np.generic) else value
    if isinstance(number, float) and number.is_integer():
        return str(int(number))
    return str(number)


def _check_one_type(parts: Sequence[Part]) -> None:
    texts = [part for part in parts if part.values.dtype.kind == "U"]
    numbers = [part for part in parts if part.values.dtype.kind != "U"]
    if texts and numbers:
        odd, values = texts[0].where, texts[0].values
        spot = np.unravel_index(first_text(values.ravel()), values.shape)
        raise DataError(
            f"targets must be all numbers or all text, got {str(values[spot])!r} in "
            f"{at(int(spot[0]), odd, 'example')}, and numbers in {numbers[0].where}. "
            "Make them alike for all clients."
        )


def _proposed(
    parts: Sequence[Part], num_classes: int | None, in_tables: bool
) -> tuple[TargetKind, str | None]:
    types = {part.values.dtype.kind for part in parts}
    if num_classes is not None:
        return ("classes" if num_classes else "regression"), None
    if types == {"b"}:
        return "classes", None
    if types == {"U"}:
        return _text_is_classes(parts)
    if not all(np.array_equal(part.values, np.floor(part.values)) for part in parts):
        return "regression", None
    values = np.concatenate([part.values.ravel() for part in parts])
    distinct = np.unique(values)
    shape = parts[0].values.shape[1:]
    if len(shape) == 1 and shape[0] > 1 and set(distinct.tolist()) == {0, 1}:
        if "f" in types and not all((part.values.sum(axis=1) == 1).all() for part in parts):
            return "multilabel", f"{TAKEN} {shape[0]} labels an example, each 0 or 1"
        raise DataError(
            "rows of zeros and ones may be several labels an example or one-hot classes, got "
            f"targets of shape [examples, {shape[0]}] in {parts[0].where}. {_SAY_LABELS}"
        )
    repeats = len(distinct) <= 2 or len(values) >= 2 * len(distinct)
    if "f" in types:
        if len(distinct) > _MOST_IN_TABLES or len(distinct) < 2 or not repeats:
            return "regression", f"{TAKEN} quantities (a regression): they are floats"
        raise _either(parts, distinct, len(values), "floats that are all whole numbers")
    most = _MOST_IN_TABLES if in_tables else _MOST_IN_ARRAYS
    codes = distinct[distinct != IGNORED]
    if len(shape) > 1 and len(codes) > 0 and codes[0] >= 0 and codes[-1] < most and repeats:
        return "classes", (
            f"{TAKEN} maps of classes from 0 to {codes[-1]} (if they are quantities, say "
            'kind = "regression")'
        )
    if _are_codes(codes) and len(codes) <= most and repeats:
        left_out = f"; {IGNORED} is left out" * (len(codes) < len(distinct))
        return "classes", (
            f"{TAKEN} {len(codes)} classes: they are the whole numbers from 0 to "
            f'{len(codes) - 1}{left_out} (if they are quantities, say kind = "regression")'
        )
    raise _either(parts, distinct, len(values), "whole numbers")


def _text_is_classes(parts: Sequence[Part]) -> tuple[TargetKind, None]:
    values = np.concatenate([part.values.ravel() for part in parts])
    distinct = np.unique(values)
    if len(distinct) > max(_MOST_IN_TABLES, len(values) // 2):
        raise DataError(
            f"classes must repeat, got {len(distinct):,} different texts in {len(values):,} "
            f"targets, as {distinct[0]!r} (see {parts[0].where}). Name another target column; for "
            'numbers write them with a decimal point; if they are classes, say kind = "classes".'
        )
    return "classes", None


def _either(parts: Sequence[Part], distinct: Array, num: int, what: str) -> DataError:
    low, high = label_text(distinct[0]), label_text(distinct[-1])
    odd = distinct[0] if distinct[0] < 0 else distinct[-1]
    where = next(part.where for part in parts if (part.values == odd).any())
    return DataError(
        f"targets that are {what} may be classes or quantities, got {len(distinct):,} different "
        f"values from {low} to {high} in {num:,} examples (see {where}). {_SAY}"
    )


def _are_codes(distinct: Array) -> bool:
    """True if sorted distinct whole numbers are 0, 1, …, k − 1."""
    return len(distinct) > 0 and distinct[0] == 0 and int(distinct[-1]) == len(distinct) - 1


def _as_classes(parts: Sequence[Part], num_classes: int | None) -> tuple[list[Array], Meaning]:
    if parts[0].values.dtype.kind == "U":
        return _numbered(parts, num_classes)
    if all(part.values.dtype.kind == "b" for part in parts):
        values = [part.values.astype(np.int64) for part in parts]
        return values, Meaning("classes", max(2, num_classes or 2), ("False", "True"))
    whole = [Part(part.where, _whole(part)) for part in parts]
    if num_classes is None and whole[0].values.ndim == 1:
        distinct = np.unique(np.concatenate([part.values for part in whole]))
        codes = distinct[distinct != IGNORED]
        if len(codes) < len(distinct) and len(codes) > 0 and not _are_codes(codes):
            raise DataError(
                f"classes must be numbered from 0 beside labels of {IGNORED}, which losses leave "
                f"out, got label={label_text(codes[0])} in {whole[0].where}. Number them, or give "
                "text."
            )
        if not _are_codes(codes) and len(codes) > 0:
            return _numbered(whole, None)
        num_classes = len(codes)
    return _coded("classes", whole, num_classes)


def _as_symbols(parts: Sequence[Part], num_classes: int | None) -> tuple[list[Array], Meaning]:
    _check_numbers(parts, "text")
    return _coded("text", [Part(part.where, _whole(part)) for part in parts], num_classes)


def _coded(
    kind: TargetKind, whole: Sequence[Part], num_classes: int | None
) -> tuple[list[Array], Meaning]:
    """Codes from 0, of which not every one need occur: label maps, sequences."""
    if num_classes is None:
        num_classes = 1 + max(int(part.values.max(initial=0)) for part in whole)
    for part in whole:
        wrong = (part.values != IGNORED) & ((part.values < 0) | (part.values >= num_classes))
        must = f"labels must be from 0 to {num_classes - 1} (num_classes={num_classes})"
        _check(wrong, part, must, "Mend the label, or raise num_classes.", "label=")
    return [part.values for part in whole], Meaning(kind, num_classes)


def _numbered(parts: Sequence[Part], num_classes: int | None) -> tuple[list[Array], Meaning]:
    """Codes in sorted order, and the names."""
    labels = np.unique(np.concatenate([part.values.ravel() for part in parts]))
    if num_classes is not None and num_classes < len(labels):
        raise DataError(
            f"there must be at most num_classes={num_classes} classes, got {len(labels)}. "
            "Raise num_classes, or leave it out."
        )
    names = tuple(label_text(label) for label in labels.tolist())
    check_spaces(names, "classes", parts[0].where)
    values = [np.searchsorted(labels, part.values).astype(np.int64) for part in parts]
    return values, Meaning("classes", num_classes or len(labels), names)


def _as_quantities(parts: Sequence[Part], num_classes: int | None) -> tuple[list[Array], Meaning]:
    if num_classes:
        raise DataError(
            f"a regression has no classes, got num_classes={num_classes}. Leave it out, or say "
            'kind = "classes".'
        )
    _check_numbers(parts, "regression")
    with np.errstate(over="ignore"):  # what float32 cannot hold is inf
        values = [part.values.astype(np.float32) for part in parts]
    for part, numbers in zip(parts, values, strict=True):
        must = "targets must be finite in float32"
        _check(~np.isfinite(numbers), part, must, "Use another unit.")
    return values, Meaning("regression", 0)


def _as_many_labels(parts: Sequence[Part], num_classes: int | None) -> tuple[list[Array], Meaning]:
    _check_numbers(parts, "multilabel")
    num_labels = parts[0].values.shape[-1] if parts[0].values.ndim == 2 else 0
    for part in parts:
        if part.values.ndim != 2 or num_labels == 0 or num_classes not in (None, num_labels):
            wanted = "labels" if num_classes is None else num_classes
            raise DataError(
                f"targets of kind 'multilabel' must have the shape [examples, {wanted}], got "
                f"shape={part.values.shape} in {part.where}. Give a 0 or 1 for each label."
            )
        wrong = (part.values != 0) & (part.values != 1)
        _check(wrong, part, "targets of kind 'multilabel' must be 0 or 1", "Mend it.")
    return [part.values.astype(np.float32) for part in parts], Meaning("multilabel", num_labels)


def _check_label_shape(part: Part, columns: bool) -> None:
    values = part.values
    if values.ndim != 2:
        return
    if values.shape[1] == 1:
        if columns:
            return
        raise DataError(
            "a class must be one number an example, [examples], got targets of shape="
            f"{values.shape} in {part.where}. Give targets[:, 0]."
        )
    if values.dtype.kind != "U" and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
        raise DataError(
            "a class must be one number an example, [examples], got one-hot rows of shape="
            f"{values.shape} in {part.where}. Give targets.argmax(axis=1)."
        )


def _check_numbers(parts: Sequence[Part], kind: str) -> None:
    if parts[0].values.dtype.kind == "U":
        raise DataError(
            f"targets of kind {kind!r} must be numbers, got text, as "
            f"{str(parts[0].values.ravel()[0])!r} in {parts[0].where}. Write numbers, with a "
            'decimal point, or say kind = "classes"; a device has names of classes from the run.'
        )


def _whole(part: Part) -> Array:
    values = part.values
    if values.dtype.kind == "f":
        wrong = (values != np.floor(values)) | (np.abs(values) > _EXACT)
        must = "classes must be whole numbers or text"
        _check(wrong, part, must, "Mend it, or say kind = 'regression'.")
    return values.astype(np.int64)


def _check(wrong: Array, part: Part, must: str, advice: str, name: str = "") -> None:
    """Raises a `DataError` for the first target of a part that is wrong."""
    if wrong.any():
        row, *rest = (int(k) for k in np.unravel_index(wrong.argmax(), wrong.shape))
        got = f"{name}{part.values[(row, *rest)].item()!r}"
        if len(rest) == 1:
            got += f" for label {rest[0]}"
        raise DataError(f"{must}, got {got} in {at(row, part.where, 'example')}. {advice}")
