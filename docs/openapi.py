"""Write docs/openapi.json from the protocol's routes and messages: `python docs/openapi.py`.

It says in OpenAPI 3.1 what docs/protocol.md says in words; where they differ, that document counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from potluck.core.plain_json import to_json
from potluck.protocol import MESSAGES, ROUTES, STATUS, ErrorCode, Message, Route
from potluck.protocol.strict_json import MAX_INTEGER

_HEADERS = {
    "Potluck-Device": "^[0-9a-f]{32}$",
    "Potluck-Sequence": "^[1-9][0-9]{0,15}$",
    "Potluck-Time": "^[1-9][0-9]{0,15}$",
    "Potluck-Digest": "^[0-9a-f]{64}$",
    "Potluck-Signature": "^[0-9a-f]{128}$",
}
_ANYWHERE: tuple[ErrorCode, ...] = (
    "malformed", "unsigned", "unknown", "bad_signature", "replayed", "clock", "method",
    "too_large", "overloaded", "internal", "unavailable",
)  # fmt: skip
_OF_A_BODY: tuple[ErrorCode, ...] = ("digest", "media")
_OF_WORK: tuple[ErrorCode, ...] = ("not_found", "late", "conflict")
_ELSE: dict[str, tuple[ErrorCode, ...]] = {
    "POST /v1/preview": ("token",),
    "POST /v1/enrol": ("token", "conflict"),
    "POST /v1/check-in": ("not_found",),
    "GET /v1/models/{sha256}": ("not_found", "range"),
    "POST /v1/progress": _OF_WORK,
    "POST /v1/report": (*_OF_WORK, "wrong_length", "bounds"),
    "GET /v1/uploads/{upload}": (*_OF_WORK, "digest", "not_finite", "bounds", "offset"),
    "PUT /v1/uploads/{upload}": (*_OF_WORK, "not_finite", "bounds", "offset"),
    "POST /v1/evaluation": (*_OF_WORK, "bounds"),
    "POST /v1/failure": _OF_WORK,
}


def description() -> dict[str, Any]:
    """The OpenAPI description of what is answered at the devices' address."""
    wanted: list[Any] = [(kind, "validation") for kind in MESSAGES]
    _, found = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    schemas = found["$defs"]
    for kind in MESSAGES:  # the type has a default in Python, and must be there on the wire
        schemas[kind.__name__]["required"] = ["type", *schemas[kind.__name__].get("required", [])]
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path.partition("?")[0], {})[route.method.lower()] = _operation(route)
    health = {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}
    paths["/health"] = {
        "get": {
            "operationId": "GET /health",
            "summary": "Whether the server answers at all. Needs no signature.",
            "responses": {"200": _answer("It does.", {"application/json": {"schema": health}})}
            | _errors(("malformed", "method", "internal")),
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Potluck",
            "version": "1",
            "description": "What devices say to a server: docs/protocol.md. Every request but "
            "/health carries the five headers of its signature, once each.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(route: Route) -> dict[str, Any]:
    path = route.path.partition("?")[0]
    name = f"{route.method} {path}"
    codes = (*_ANYWHERE, *(_OF_A_BODY if route.request else ()), *_ELSE[name])
    made: dict[str, Any] = {
        "operationId": name,
        "summary": f"For a {route.caller}; at most {route.max_bytes} bytes.",
        "parameters": _parameters(route),
        "responses": _successes(route) | _errors(codes),
    }
    if route.request == "bytes":
        content: Any = {"application/octet-stream": {"schema": {"type": "string"}}}
        made["requestBody"] = {"required": True, "content": content}
    elif route.request is not None:
        content = {"application/json": {"schema": _reference(route.request)}}
        made["requestBody"] = {"required": True, "content": content}
    return made


def _parameters(route: Route) -> list[dict[str, Any]]:
    made = [
        _parameter("header", name, {"type": "string", "pattern": pattern})
        for name, pattern in _HEADERS.items()
    ]
    for name, length in (("sha256", 64), ("upload", 32)):
        if f"{{{name}}}" in route.path:
            pattern = f"^[0-9a-f]{{{length}}}$"
            made.append(_parameter("path", name, {"type": "string", "pattern": pattern}))
    if "?" in route.path:
        number = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
        made.append(_parameter("query", "offset", number))
    if route.answers == "bytes":
        made.append(_parameter("header", "Range", {"type": "string"}, required=False))
        made.append(_parameter("header", "If-Range", {"type": "string"}, required=False))
    return made


def _parameter(place: str, name: str, schema: Any, *, required: bool = True) -> dict[str, Any]:
    return {"in": place, "name": name, "required": required, "schema": schema}


def _successes(route: Route) -> dict[str, Any]:
    if route.answers == "bytes":
        content = {"application/octet-stream": {"schema": {"type": "string"}}}
        return {"200": _answer("The model.", content), "206": _answer("A part of it.", content)}
    schema: Any = [_reference(kind) for kind in route.answers]
    schema = schema[0] if len(schema) == 1 else {"oneOf": schema}
    return {"200": _answer("The answer.", {"application/json": {"schema": schema}})}


def _errors(codes: tuple[ErrorCode, ...]) -> dict[str, Any]:
    by_status: dict[int, set[str]] = {}
    for code in codes:
        by_status.setdefault(STATUS[code], set()).add(code)
    return {
        str(status): _answer(
            ", ".join(sorted(words)),
            {
                "application/json": {
                    "schema": {
                        "allOf": [{"$ref": "#/components/schemas/Error"}],
                        "properties": {"code": {"enum": sorted(words)}},
                    }
                }
            },
        )
        for status, words in sorted(by_status.items())
    }


def _answer(told: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": told, "content": content}


def _reference(kind: type[Message]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def text() -> str:
    """The text of docs/openapi.json."""
    return to_json(description(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("openapi.json")
    path.write_text(text(), encoding="utf-8")
    print(f"written: {path}")
