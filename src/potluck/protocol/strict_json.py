"""JSON on the wire: strict when read, canonical when written.

Hostile bytes may hold depth that overflows a stack, or numbers that a double cannot hold. They may
hold a key twice, which means one thing to one parser and another to the next. All of that is
refused, as `ProtocolError`, before the content is used.

Compatibility: whatever `encode_json` writes, `parse_json` reads, with the same content.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from potluck.core import ProtocolError

MAX_DEPTH = 16
"""The most objects and arrays inside one another."""

MAX_INTEGER = 2**53 - 1
"""The largest integer below which a double holds every integer exactly."""

# A string that does not end matches too: a scan that starts again at every quote is quadratic.
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse_json(body: bytes, limit: int) -> Any:
    """Reads one JSON value of at most `limit` bytes that fills `body`.

    Raises:
        ProtocolError: "too_large" above the limit, else "malformed".
    """
    if len(body) > limit:
        raise ProtocolError(
            "too_large", f"the body must be at most {limit} bytes, got {len(body)}. Send less."
        )
    try:
        text = body.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_number,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair fails
    except UnicodeError:
        refuse("the body must be UTF-8 without unpaired surrogates")
    except json.JSONDecodeError as error:
        refuse(f"the body must be one JSON value, got an error at character {error.pos}")
    return value


def encode_json(value: Any) -> bytes:
    """Returns the canonical bytes of a value.

    They are UTF-8, with keys in the order of their code points and no spaces. Numbers are as Python
    writes them: the shortest decimal that reads back as the same double.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def refuse(what: str) -> NoReturn:
    """Raises the error for a body or header that is not what the protocol says."""
    raise ProtocolError("malformed", f"{what}. Send what docs/protocol.md describes.")


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKENS.finditer(text):
        first = text[token.start()]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                refuse(f"JSON must be at most {MAX_DEPTH} levels deep, got more")
        elif first in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        refuse("each key of an object must be there once, got a key twice")
    return value


def _constant(text: str) -> NoReturn:
    refuse(f"numbers must be finite, got {text}")


def _integer(text: str) -> int:
    # The length first: converting a million digits takes quadratic time.
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        refuse(f"integers must be between ±{MAX_INTEGER}, got {text[:24]}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        refuse(f"numbers must fit into a double, got {text[:24]}")
    return value
