"""TOML files whose tables are checked strictly: experiments, and the policies of devices.

An unknown key, a wrong type or a value out of range is refused with its name, what was expected
and, for an unknown key, the nearest right one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError, model_validator

from potluck.config.explain import explain
from potluck.core import ConfigError
from potluck.core.text_files import read_text
from potluck.core.validate import plain

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A table of a file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    _plain = model_validator(mode="before")(plain)  # NumPy's numbers


def named(default: str | None = None) -> Discriminator:
    """Tells the sections of a union apart by their `name`."""

    def name_of(value: Any) -> str | None:
        if isinstance(value, dict):
            given = cast("dict[str, Any]", value).get("name", default)
            return None if given is None else str(given)
        return getattr(value, "name", None)

    return Discriminator(name_of)


def read_toml(path: Path, what: str, if_missing: str, if_other: str) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: it cannot be read, with what to do.
    """
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(
            f"{what} must be a readable file, got path={str(path)!r} ({error.strerror}). "
            f"{if_missing}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}. {if_other}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def validated(section: type[S], content: dict[str, Any], origin: str) -> S:
    """The content of a file as a `section`.

    Raises:
        ConfigError: all that is wrong with it, in words.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error, section)}") from None


def override(content: dict[str, Any], change: str) -> None:
    """Changes a value ("run.rounds=20") in the content of a file.

    Raises:
        ConfigError: the text is not of that form.
    """
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"an override must look like run.rounds=20, got {change!r}. Put = between the two."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *path, last = key.strip().split(".")
    table: dict[str, Any] = content
    for part in path:
        inner: Any = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{part} must be a table, got override={change!r}.")
        table = cast("dict[str, Any]", inner)
    table[last] = value
