"""What is a count and what is a number, for every public function that takes one.

NumPy's integers are integers and its floats are floats: counts come out of `len(np.unique(…))` and
`np.ceil` all the time. Truth values and text are neither. What is taken is returned as Python's own
`int` or `float`, so that it can be written as JSON and compared everywhere.
"""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsFloat, SupportsIndex, cast


def is_integer(value: object) -> bool:
    """Whether this is an integer of Python, NumPy or PyTorch; truth values are none."""
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
    """The integer as an `int`.

    Raises:
        TypeError: it is none: text, a truth value, or a float, even a whole one.
    """
    if not is_integer(value):
        advice = advice or "Give a whole number."
        raise TypeError(_words(f"{name} must be an integer", name, value, advice))
    return operator.index(value)


def as_count(name: str, value: Any, minimum: int = 1, advice: str = "") -> int:
    """The count as an `int`, of which there are at least `minimum`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below the minimum.
    """
    count = as_integer(name, value, advice)
    if count < minimum:
        raise ValueError(_words(f"{name} must be at least {minimum}", name, value, advice))
    return count


def as_real(name: str, value: Any, advice: str = "") -> float:
    """The number as a `float`; it may be infinite or NaN.

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
    """The seed of a run, a partition or a stream as an `int`; any integer is one."""
    return as_integer("seed", value, "Give an integer, such as 0.")


def plain(content: Any) -> Any:
    """The same dictionaries and lists, with NumPy's numbers and texts as Python's."""
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
