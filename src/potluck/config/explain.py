"""Words the errors in a file of tables: the key, what was expected, what was got.

Where a table's keys depend on its `name`, pydantic's paths hold that name between two keys. From it
follow the right keys, and the name to which a wrong one belongs.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple, cast, get_args

from pydantic import BaseModel, Tag, ValidationError

_Tables = dict[str, type[BaseModel]]


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Returns a sentence for each error in the content of a `model`."""
    seen: dict[str, tuple[_Location, list[Any]]] = {}
    details = error.errors()
    for detail in details:
        if not _is_other_shape(detail, details):
            # For a union pydantic reports every member that did not match: group them by key.
            place = _place(model, detail)
            seen.setdefault(place.key, (place, []))[1].append(detail)
    return " ".join(_sentence(place, details) for place, details in seen.values())


class _Location(NamedTuple):
    """The place of an error in a file."""

    key: str  # dotted
    section: type[BaseModel]  # the table around the last key
    tables: _Tables  # the tables by name that could stand there
    tag: str | None  # the name by which `section` was chosen

    @property
    def last(self) -> str:
        return self.key.rpartition(".")[2]

    def beside(self, key: str) -> str:
        """Another key of the table."""
        return self.key[: -len(self.last)] + key

    def chosen(self, *, if_owned: bool) -> str:
        """The name that chose the table, in words; "" if it does not matter."""
        owners = len(self.owners)
        is_said = self.tag and (owners > 0 if if_owned else owners < len(self.tables))
        return f" with {self.beside('name')} = {self.tag!r}" if is_said else ""

    @property
    def owners(self) -> list[str]:
        """The names whose tables have the last key."""
        return [name for name, table in self.tables.items() if self.last in table.model_fields]


def _is_other_shape(detail: Any, details: list[Any]) -> bool:
    """True if an error says that a table is no number, while others are about the table itself."""
    around, is_table = detail["loc"][:-1], isinstance(detail["input"], dict)
    deeper = (d["loc"] for d in details if d["loc"][: len(around)] == around)
    return is_table and any(len(loc) > len(around) + 1 for loc in deeper)


def _place(model: type[BaseModel], detail: Any) -> _Location:
    """Follows pydantic's path, which also holds names of tables and of plain types."""
    path: list[str] = []
    section: type[BaseModel] | None = model
    around, tables, tag = model, _Tables(), None
    unknown = detail["loc"][-1] if detail["type"] == "extra_forbidden" else None
    for part in map(str, detail["loc"]):
        if section is None and part in tables:
            section, tag = tables[part], part
        elif section is not None and (part in section.model_fields or part == unknown):
            path.append(part)
            around, field = section, section.model_fields.get(part)
            found = {} if field is None else _tables((field.annotation, *field.metadata))
            section = found.pop("", None)
            if found or section is not None:
                tables, tag = found, None
    return _Location(".".join(path), around, tables, tag)


def _tables(annotation: Any) -> _Tables:
    """The tables inside an annotation by name; under "" one that has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    parts = cast(
        "tuple[Any, ...]", annotation if isinstance(annotation, tuple) else get_args(annotation)
    )
    found: _Tables = {}
    for part in parts:
        found |= _tables(part)
    tags = [part.tag for part in parts if isinstance(part, Tag)]
    return {tags[0]: found[""]} if tags else found


def _sentence(place: _Location, details: list[Any]) -> str:
    kind, value, key = details[0]["type"], details[0]["input"], place.key
    if kind == "extra_forbidden":
        return _unknown(place)
    if kind.startswith("union_tag") and isinstance(value, dict):
        names = ", ".join(map(repr, place.tables))
        if kind == "union_tag_not_found":
            return f"{key}.name is missing: it must be one of {names}."
        name = cast("dict[str, Any]", value)["name"]
        return f"{key}.name must be one of {names}, got {key}.name = {name!r}."
    if kind == "missing":
        return f"{key} is missing{place.chosen(if_owned=False)}: give it a value."
    chosen = "" if kind == "literal_error" else place.chosen(if_owned=False)
    expected = " or ".join(dict.fromkeys(map(_expected, details)))
    words = re.findall(r"'([^']*)'", expected) if isinstance(value, str) else []
    near = difflib.get_close_matches(str(value), words, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key} must be {expected}{chosen}, got {key} = {value!r}.{hint}"


def _unknown(place: _Location) -> str:
    fields = sorted(place.section.model_fields)
    near = [field for field in fields if place.last in field.split("_")]
    near += difflib.get_close_matches(place.last, fields, n=1)
    chosen = place.chosen(if_owned=True)
    if chosen:
        names = " or ".join(map(repr, place.owners))
        hint = f"remove it, or use {place.beside('name')} = {names}."
    else:
        hint = f"did you mean {place.beside(near[0])}?" if near else "remove it."
    return f"unknown key {place.key}{chosen}: {hint} Known here: {', '.join(fields)}."


_KINDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_type": "a string",
}


def _expected(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind.startswith(("model_", "union_tag")):
        return "a table"
    if kind == "literal_error":
        return f"one of {context['expected']}".replace(" or ", ", ")
    if kind == "string_pattern_mismatch" and "A-Z" not in context["pattern"]:
        return f"like {context['pattern']}"
    if kind in _KINDS:
        return _KINDS[kind].format(**context)
    return str(detail["msg"]).removeprefix("Input should be ")
