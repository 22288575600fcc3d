"""What is wrong with an experiment file, in words: the key, what was expected, what was got.

Where a table's keys depend on its `name`, pydantic's paths hold that name between two keys; here
it tells which keys are right, and to which name a wrong one belongs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

from pydantic import BaseModel, Tag, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All that is wrong with the content of a `model`, one sentence each."""
    seen: dict[str, tuple[_Place, list[Any]]] = {}
    details = error.errors()
    for detail in details:
        if _is_other_shape(detail, details):
            continue
        # For a union pydantic reports every member that did not match: group them by key.
        is_known = detail["type"] != "extra_forbidden"
        place = _place(model, [str(part) for part in detail["loc"]], is_known)
        seen.setdefault(place.key, (place, []))[1].append(detail)
    return " ".join(_sentence(place, details) for place, details in seen.values())


class _Place(NamedTuple):
    """Where in an experiment something is wrong."""

    path: list[str]  # the keys that lead there
    section: type[BaseModel]  # the table around the last key
    union: dict[str, type[BaseModel]]  # the tables by name that could stand there
    tag: str | None  # the name by which `section` was chosen

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def name_key(self) -> str:
        """The key that chose the section."""
        return ".".join([*self.path[:-1], "name"])

    @property
    def owners(self) -> list[str]:
        """The tables of the union that have the last key."""
        return [name for name, table in self.union.items() if self.path[-1] in table.model_fields]


def _is_other_shape(detail: Any, details: list[Any]) -> bool:
    """Whether this says that a table is no number where more is known of the table itself."""
    around, is_table = detail["loc"][:-1], isinstance(detail["input"], dict)
    deeper = (d["loc"] for d in details if d["loc"][: len(around)] == around)
    return is_table and any(len(loc) > len(around) + 1 for loc in deeper)


def _place(model: type[BaseModel], loc: list[str], is_known: bool) -> _Place:
    """Follow pydantic's path, in which the name of a union's member stands between two keys.

    Args:
        is_known: whether the last key is one that the schema has.
    """
    path: list[str] = []
    section: type[BaseModel] | None = model
    around, union, tag = model, dict[str, type[BaseModel]](), None
    for part in loc:
        if section is not None and part == section.__name__:
            continue  # a table in a union of plain types
        if section is not None and is_known and part not in section.model_fields:
            break  # a plain type in a union with a table
        if section is None:
            if part not in union:
                break  # a member of a union of plain types
            section, tag = union[part], part
            continue
        path.append(part)
        around = section
        field = section.model_fields.get(part)
        if field is None:
            break
        section, members = None, _members((field.annotation, *field.metadata))
        if None in members:
            section = members[None]
        if members:
            union, tag = {name: m for name, m in members.items() if name is not None}, None
    return _Place(path, around, union, tag)


def _members(annotation: Any) -> dict[str | None, type[BaseModel]]:
    """The sections inside an annotation by their tags; under None one that has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {None: annotation}
    parts = cast(
        "tuple[Any, ...]", annotation if isinstance(annotation, tuple) else get_args(annotation)
    )
    tags = [part.tag for part in parts if isinstance(part, Tag)]
    found: dict[str | None, type[BaseModel]] = {}
    for part in parts:
        found |= _members(part)
    return {tags[0]: found[None]} if tags and None in found else found


def _sentence(place: _Place, details: list[Any]) -> str:
    detail = details[0]
    kind, value = detail["type"], detail["input"]
    key = place.key
    if kind == "extra_forbidden":
        return _unknown(place)
    if kind in ("union_tag_invalid", "union_tag_not_found") and isinstance(value, dict):
        names = ", ".join(map(repr, place.union))
        if kind == "union_tag_not_found":
            return f"{key}.name is missing: it must be one of {names}."
        name = cast("dict[str, Any]", value)["name"]
        return f"{key}.name must be one of {names}, got {key}.name = {name!r}."
    # What the table's name decides is said with it.
    everywhere = len(place.owners) == len(place.union) and kind != "literal_error"
    chosen = "" if place.tag is None or everywhere else f" with {place.name_key} = {place.tag!r}"
    if kind == "missing":
        return f"{key} is missing{chosen}: give it a value."
    expected = " or ".join(dict.fromkeys(_expected(d) for d in details))
    return f"{key} must be {expected}{chosen}, got {key} = {value!r}.{_nearest(details)}"


def _nearest(details: list[Any]) -> str:
    """The right word that a wrong one is most like."""
    expected = " ".join(d["ctx"]["expected"] for d in details if _is_word(d))
    words = re.findall(r"'([^']*)'", expected)
    near = difflib.get_close_matches(str(details[0]["input"]), words, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _is_word(detail: Any) -> bool:
    return detail["type"] == "literal_error" and isinstance(detail["input"], str)


def _unknown(place: _Place) -> str:
    *path, last = place.path
    fields = sorted(place.section.model_fields)
    near = [field for field in fields if last in field.split("_")]
    near += difflib.get_close_matches(last, fields, n=1)
    chosen = ""
    if place.tag is not None and place.owners:
        chosen = f" with {place.name_key} = {place.tag!r}"
        names = " or ".join(map(repr, place.owners))
        hint = f"remove it, or use {place.name_key} = {names}."
    elif near:
        hint = f"did you mean {'.'.join([*path, near[0]])}?"
    else:
        hint = "remove it."
    return f"unknown key {place.key}{chosen}: {hint} Known here: {', '.join(fields)}."


_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "greater_than": lambda c: f"above {c['gt']}",
    "greater_than_equal": lambda c: f"at least {c['ge']}",
    "less_than": lambda c: f"below {c['lt']}",
    "less_than_equal": lambda c: f"at most {c['le']}",
    "literal_error": lambda c: f"one of {c['expected']}".replace(" or ", ", "),
    "string_pattern_mismatch": lambda c: "letters, digits, dots, dashes and underscores",
    "finite_number": lambda c: "a finite number",
    "int_type": lambda c: "an integer",
    "float_type": lambda c: "a number",
    "bool_type": lambda c: "true or false",
    "string_type": lambda c: "a string",
    "list_type": lambda c: "a list",
    "too_short": lambda c: f"a list of at least {c['min_length']}",
    "too_long": lambda c: f"a list of at most {c['max_length']}",
    "model_type": lambda c: "a table",
    "model_attributes_type": lambda c: "a table",
    "union_tag_not_found": lambda c: "a table",
    "union_tag_invalid": lambda c: "a table",
}


def _expected(detail: dict[str, Any]) -> str:
    explain = _KINDS.get(detail["type"])
    return explain(detail.get("ctx", {})) if explain else str(detail["msg"])
