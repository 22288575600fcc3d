"""JSON that keeps to its standard: no NaN and no Infinity.

A number that is not finite becomes null, and a NumPy number or array the same number or list.
A null means that there was no result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from potluck.core.target import is_result


def to_json(value: Any, **layout: Any) -> str:
    """Returns a value as JSON text; `layout` is that of `json.dumps` (indent, sort_keys, …)."""
    return json.dumps(plain(value), allow_nan=False, **layout)


def read_results(text: str) -> dict[str, float]:
    """Returns scores by name as `to_json` wrote them, without those that were no result."""
    scores: dict[str, float | None] = json.loads(text)
    return {name: score for name, score in scores.items() if is_result(score)}


def plain(value: Any) -> Any:
    """Returns the same value in the types of JSON: dictionaries, lists, text, numbers, None."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(cast("Any", value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        content = cast("Mapping[Any, Any]", value)
        return {_key(key): plain(inner) for key, inner in content.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in cast("list[Any]", value)]
    return value


def _key(key: Any) -> Any:
    return cast("Any", key).item() if isinstance(key, np.generic) else key


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested tables by names with dots, as an experiment file has them."""
    pairs: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs |= flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            pairs[prefix + name] = value
    return pairs
