"""Names of clients as text, made of any key in the user's data.

NumPy's integers, dates, missing values and tuples (pandas' keys of a group) become the text that
Python prints for them, and bytes are read as UTF-8. Two clients never share a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from potluck.core import DataError
from potluck.core.validate import plain


def client_names(keys: Iterable[Any]) -> dict[Any, str]:
    """Returns the name of each client, in the same order."""
    names: dict[Any, str] = {}
    keys_of: dict[str, Any] = {}
    for key in keys:
        name = client_name(key)
        if name in keys_of:
            raise DataError(
                f"clients must have different names, got {keys_of[name]!r} and {key!r}, which are "
                f"both called {name!r}. Rename one."
            )
        names[key], keys_of[name] = name, key
    return names


def client_name(key: Any) -> str:
    """Returns the name of one client."""
    if isinstance(key, bytes):
        key = key.decode("utf-8", "surrogateescape")
    elif isinstance(key, tuple):
        key = tuple(map(plain, cast("tuple[Any, ...]", key)))
    name = str(key)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"the name of a client must be Unicode text, got client={name!r}, which has bytes of "
            "another encoding. Rename it."
        ) from None
    return name
