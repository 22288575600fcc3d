"""Checks of counts and numbers, for every public function that takes one.

NumPy's integers are integers and its floats are floats: counts come out of `len(np.unique(…))` and
`np.ceil` all the time. Truth values and text are neither. Each check returns Python's own `int` or
`float`, which can be written as JSON and compared everywhere.
"""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from functools import cache
from typing import (
    Annotated,
    Any,
    NamedTuple,
    SupportsFloat,
    SupportsIndex,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Interval

_BOUNDS = {
    "gt": (operator.gt, "above"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "below"),
    "le": (operator.le, "at most"),
}


def is_integer(value: object) -> bool:
    """Returns whether this is an integer of Python, NumPy or PyTorch; truth values are none."""
    if type(value) is int:
        return True
    if _is_truth(value):
        return False
    try:
        operator.index(cast(SupportsIndex, value))
    except TypeError:
        return False
    return True


def as_integer(name: str, value: Any, advice: str = "") -> int:
    """Returns the integer as an `int`.

    Raises:
        TypeError: it is none: text, a truth value, or a float, even a whole one.
    """
    if not is_integer(value):
        advice = advice or "Give a whole number."
        raise TypeError(_words(f"{name} must be an integer", name, value, advice))
    return operator.index(value)


def as_count(name: str, value: Any, minimum: int = 1, advice: str = "") -> int:
    """Returns the count as an `int`, which is at least `minimum`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below the minimum.
    """
    count = as_integer(name, value, advice)
    if count < minimum:
        raise ValueError(_words(f"{name} must be at least {minimum}", name, value, advice))
    return count


def as_real(name: str, value: Any, advice: str = "") -> float:
    """Returns the number as a `float`; it may be infinite or NaN.

    Raises:
        TypeError: it is none: text, a truth value, an array.
    """
    if type(value) is float:
        return value
    # Text and complex numbers have no __float__.
    is_number = isinstance(value, SupportsFloat) and getattr(value, "ndim", 0) == 0
    if not is_number or _is_truth(value):
        raise TypeError(_words(f"{name} must be a number", name, value, advice))
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def as_seed(value: Any) -> int:
    """Returns the seed of a run, a partition or a stream as an `int`; any integer is one."""
    return as_integer("seed", value, "Give an integer, such as 0.")


def check_ranges(thing: object) -> None:
    """Refuses a dataclass with a number outside the range that its annotation says.

        tau: Annotated[float, Interval(gt=0), "Start with 0.001."]

    The text is the advice for the user. Integers are kept as Python's own.

    Raises:
        TypeError: a field is no number, or no integer.
        ValueError: it is out of range, or NaN.
    """
    for name, number, is_optional, limits, advice in _ranges(type(thing)):
        value = getattr(thing, name)
        if value is None and is_optional:
            continue
        if number is int:
            value = as_integer(name, value, advice)
            object.__setattr__(thing, name, value)
        real = as_real(name, value, advice)
        if not all(_BOUNDS[key][0](real, limit) for key, limit in limits.items()):
            expected = " and ".join(f"{_BOUNDS[key][1]} {limits[key]:g}" for key in limits)
            raise ValueError(_words(f"{name} must be {expected}", name, value, advice))


class _Range(NamedTuple):
    """The range in the annotation of a field."""

    name: str
    number: type  # float or int
    is_optional: bool
    limits: dict[str, float]
    advice: str


@cache
def _ranges(kind: type) -> list[_Range]:
    """Returns the fields of a dataclass that have a range."""
    hints: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        with suppress(NameError):  # names that a user's module has for type checkers alone
            hints |= get_type_hints(each, include_extras=True)
    found: list[_Range] = []
    for name, hint in hints.items():
        for part in (hint, *get_args(hint)):  # X, or X | None
            about = get_args(part)[1:] if get_origin(part) is Annotated else ()
            advice = "".join(each for each in about if isinstance(each, str))
            for interval in about:
                if isinstance(interval, Interval):
                    limits = {key: getattr(interval, key) for key in _BOUNDS}
                    limits = {key: limit for key, limit in limits.items() if limit is not None}
                    found.append(_Range(name, get_args(part)[0], part is not hint, limits, advice))
    return found


def plain(content: Any) -> Any:
    """Returns the same dictionaries and lists, with NumPy's numbers and texts as Python's."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in cast("dict[Any, Any]", content).items()}
    if isinstance(content, list):
        return [plain(value) for value in cast("list[Any]", content)]
    if hasattr(content, "dtype") and getattr(content, "ndim", None) == 0:
        return content.item()
    return content


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _words(expected: str, name: str, value: object, advice: str) -> str:
    return f"{expected}, got {name}={value!r}.{' ' * bool(advice)}{advice}"
