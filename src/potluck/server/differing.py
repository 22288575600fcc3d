"""Which keys of an experiment differ from those that a run was begun with, and how."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

from pydantic import BaseModel, ValidationError

from potluck.core.plain_json import to_json

_SHOWN = 3


class Difference(NamedTuple):
    """A key with its values, as an experiment file writes them."""

    key: str
    old: str
    new: str


def differences(
    old: str, new: BaseModel, prefix: str = "", *, skipped: Collection[str] = ()
) -> list[Difference]:
    """The keys whose values differ; one that an older version did not have is at its default.

    Args:
        old: the JSON of another object of the same kind, perhaps of an older version.
    """
    try:
        before = type(new).model_validate_json(old).model_dump(mode="json")
    except ValidationError:  # of an older version, which had other keys
        before = json.loads(old)
    was, now = dict(_flat(before)), dict(_flat(new.model_dump(mode="json")))
    keys = [key for key in {**was, **now} if key not in skipped]
    return [
        Difference(prefix + key, _told(was.get(key)), _told(now.get(key)))
        for key in keys
        if was.get(key) != now.get(key)
    ]


def in_words(found: list[Difference]) -> str:
    """The first few of them, in a sentence's middle."""
    told = [f"{one.key} = {one.old} and not {one.new}" for one in found[:_SHOWN]]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(told) + more


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs


def _told(value: Any) -> str:
    return "(left out)" if value is None else to_json(value)
