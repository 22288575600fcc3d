"""Every path of the protocol, as data that server, device, documents and tests share."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal, NamedTuple, TypeAlias

from potluck.protocol.messages import (
    MAX_REQUEST_BYTES,
    VERSION,
    Accepted,
    Assignment,
    CheckIn,
    Enrol,
    Enrolled,
    Evaluation,
    Failed,
    Finished,
    Lease,
    Message,
    Preview,
    Previewed,
    Progress,
    Report,
    Upload,
    Wait,
)
from potluck.protocol.strict_json import MAX_INTEGER, refuse

CHUNK_BYTES = 4 * 2**20
"""The size of every chunk of an upload but the last."""
LONG_POLL_SECONDS = 30
"""The longest time that a server may hold a check-in before it answers."""

Caller: TypeAlias = Literal["newcomer", "device"]
"""The permitted callers: the holder of a token and its new key, or an enrolled device of the
run."""

_OFFSET = re.compile(rb"offset=(0|[1-9][0-9]{0,15})")


class Route(NamedTuple):
    """One method on one path. `None` as request: no body; `"bytes"`: a part of a vector."""

    method: str
    path: str
    caller: Caller
    request: type[Message] | Literal["bytes"] | None
    answers: tuple[type[Message], ...] | Literal["bytes"]
    max_bytes: int
    """The limit of the request's body."""


def _post(
    name: str,
    request: type[Message],
    *answers: type[Message],
    caller: Caller = "device",
    max_bytes: int = MAX_REQUEST_BYTES,
) -> Route:
    return Route("POST", f"/v{VERSION}/{name}", caller, request, answers, max_bytes)


ROUTES: tuple[Route, ...] = (
    _post("preview", Preview, Previewed, caller="newcomer", max_bytes=4096),
    _post("enrol", Enrol, Enrolled, caller="newcomer", max_bytes=4096),
    _post("check-in", CheckIn, Assignment, Wait, Finished, max_bytes=4096),
    Route("GET", f"/v{VERSION}/models/{{sha256}}", "device", None, "bytes", 0),
    _post("progress", Progress, Lease, max_bytes=4096),
    _post("report", Report, Upload, Accepted),
    Route("GET", f"/v{VERSION}/uploads/{{upload}}", "device", None, (Upload, Accepted), 0),
    Route(
        "PUT",
        f"/v{VERSION}/uploads/{{upload}}?offset={{offset}}",
        "device",
        "bytes",
        (Upload, Accepted),
        CHUNK_BYTES,
    ),
    _post("evaluation", Evaluation, Accepted),
    _post("failure", Failed, Wait, max_bytes=4096),
)


def parse_offset(query: bytes) -> int:
    """Returns the offset in the query of a chunk, which must be nothing but that.

    Raises:
        ProtocolError: "malformed".
    """
    match = _OFFSET.fullmatch(query)
    if match is None or int(match[1]) > MAX_INTEGER:
        refuse(f"the query of a chunk must be offset=N, got {query[:40]!r}")
    return int(match[1])


def is_loopback(host: str) -> bool:
    """Returns whether an address is this machine's own: plain HTTP is for such alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
