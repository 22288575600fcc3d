"""The messages of a round, as strict frozen models ⇄ JSON.

    Preview → Previewed                          what the run of a token asks of a device's data
    Enrol → Enrolled                             once, with a token
    CheckIn → Assignment | Wait | Finished       a device offers itself, and may be given work
    Progress → Lease                             still at it
    Report → Upload | Accepted                   announces an update; chunks follow, or it is inside
    Evaluation → Accepted                        metrics of a federated evaluation
    Failed → Wait                                gives the work back
    Error                                        instead of any answer

Every message has its name in `type`. Every number is bounded and finite, every string has a form.

Compatibility: within one `VERSION` no key is added, removed or changed; a new key is a new version,
served under its own path. An offer may hold names that are unknown to a server, which ignores them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from potluck.core import Codec
from potluck.protocol.error_codes import ErrorCode, FailureReason
from potluck.protocol.inline import MAX_INLINE
from potluck.protocol.strict_json import MAX_INTEGER, encode_json, parse_json, refuse

VERSION = 1
MAX_REQUEST_BYTES = 65_536
"""The limit of a JSON body that a device sends."""
MAX_ANSWER_BYTES = 1_048_576
"""The limit of a JSON body that a server sends."""
MAX_MANIFEST_BYTES = 262_144

DEVICE_NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Id: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Token: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{16,128}$")]
Inline: TypeAlias = Annotated[
    str, Field(min_length=4, max_length=MAX_INLINE, pattern=r"^[A-Za-z0-9+/]+={0,2}$")
]
Signature: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Count: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Milliseconds: TypeAlias = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Number: TypeAlias = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
RoundNumber: TypeAlias = Annotated[int, Field(ge=1, le=10**9)]
Attempt: TypeAlias = Annotated[int, Field(ge=1, le=10**6)]
NumBytes: TypeAlias = Annotated[int, Field(ge=1, le=2**40)]
RetryAfter: TypeAlias = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Lasting: TypeAlias = Annotated[int, Field(ge=1, le=604_800)]
MetricName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
# JSON has no tuples: an array is taken for one, strictly inside.
Sum: TypeAlias = Annotated[tuple[Number, Count], Field(strict=False)]

WaitReason: TypeAlias = Literal[
    "not_selected", "full", "between_rounds", "ineligible", "unsupported", "paused", "noted"
]


class Message(BaseModel):
    """The common base of all messages: nothing unknown, nothing converted, nothing changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Runtime(Message):
    """The name and version of the library that a device trains with."""

    name: Name
    version: Name


class Eligibility(Message):
    """The state of a device as far as it is known; unknown fields are left out."""

    charging: bool | None = None
    idle: bool | None = None
    unmetered: bool | None = None
    free_memory_bytes: Count | None = None


class Preview(Message):
    """Asks what a token's run does with which data, without using the token."""

    type: Literal["preview"] = "preview"
    token: Token
    public_key: Key


class Previewed(Message):
    """The manifest of the run as it stands, for a newcomer to try its data on."""

    type: Literal["previewed"] = "previewed"
    manifest: Annotated[str, Field(min_length=2, max_length=MAX_MANIFEST_BYTES)]
    signature: Signature
    server_time_ms: Milliseconds


class Enrol(Message):
    """The key of a new device, with the token that admits it. Signed with that key."""

    type: Literal["enrol"] = "enrol"
    token: Token
    public_key: Key
    name: Annotated[str, Field(pattern=DEVICE_NAME)] | None = None
    runtime: Runtime
    device_class: Name


class Enrolled(Message):
    """Confirms the enrolment. The device pins `server_key`."""

    type: Literal["enrolled"] = "enrolled"
    device: Id
    run: Name
    server_key: Key
    server_time_ms: Milliseconds


class CheckIn(Message):
    """Offers a device for a round, or an evaluation."""

    type: Literal["check_in"] = "check_in"
    run: Name
    accepts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16, strict=False)]
    """The codecs that the device can encode, the preferred first; and `inline`."""
    runtime: Runtime
    eligibility: Eligibility


class Assignment(Message):
    """One device's work in one attempt at one round."""

    type: Literal["assignment"] = "assignment"
    run: Name
    round: RoundNumber
    attempt: Attempt
    assignment: Id
    kind: Literal["train", "evaluate"]
    manifest: Annotated[str, Field(min_length=2, max_length=MAX_MANIFEST_BYTES)]
    """The signed bytes, as the UTF-8 of this string."""
    signature: Signature
    codec: Codec
    lease_seconds: Lasting
    deadline_ms: Milliseconds
    client: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """The index of this device's client in the run: with `seed` it decides all random streams."""
    seed: Count
    model: Inline | None = None
    """The manifest's model, if it is small, for a device that offered `inline`."""


class Wait(Message):
    """Tells a device that there is no work now."""

    type: Literal["wait"] = "wait"
    retry_after_seconds: RetryAfter
    reason: WaitReason


class Finished(Message):
    """Tells a device that the run is over. It need not come back."""

    type: Literal["finished"] = "finished"
    run: Name
    rounds: Count


class Progress(Message):
    """Asks for a longer lease, as the work goes on."""

    type: Literal["progress"] = "progress"
    assignment: Id
    phase: Literal["download", "train", "evaluate", "upload"]
    fraction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Lease(Message):
    """Gives the slot to the device for so long, counted from this answer."""

    type: Literal["lease"] = "lease"
    lease_seconds: Lasting


class Report(Message):
    """Announces an update that is ready for upload. Idempotent by (device, round, attempt)."""

    type: Literal["report"] = "report"
    assignment: Id
    round: RoundNumber
    attempt: Attempt
    codec: Codec
    length_bytes: NumBytes
    sha256: Digest
    weight: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    loss: Number
    num_steps: Annotated[int, Field(ge=0, le=10**9)]
    metrics: Annotated[dict[MetricName, Number], Field(max_length=32)]
    update: Inline | None = None
    """The encoded bytes, if the assignment brought its model in the same way."""


class Upload(Message):
    """The state of an upload: the next chunk starts at `offset`."""

    type: Literal["upload"] = "upload"
    upload: Id
    offset: Count
    chunk_bytes: Annotated[int, Field(ge=1, le=2**26)]


class Accepted(Message):
    """Confirms that the report counts: once, however often it was sent."""

    type: Literal["accepted"] = "accepted"
    round: RoundNumber
    attempt: Attempt
    sha256: Digest
    retry_after_seconds: RetryAfter


class Evaluation(Message):
    """A device's metrics on its own examples: name → (sum, number of examples)."""

    type: Literal["evaluation"] = "evaluation"
    assignment: Id
    round: RoundNumber
    attempt: Attempt
    metrics: Annotated[dict[MetricName, Sum], Field(min_length=1, max_length=32)]


class Failed(Message):
    """Gives an assignment back, with the reason."""

    type: Literal["failed"] = "failed"
    assignment: Id
    reason: FailureReason


class Error(Message):
    """The one shape of every answer that is not a success."""

    type: Literal["error"] = "error"
    code: ErrorCode
    message: Annotated[str, Field(max_length=1000)]
    retry_after_seconds: RetryAfter | None = None
    server_time_ms: Milliseconds | None = None


MESSAGES: tuple[type[Message], ...] = (
    Preview,
    Previewed,
    Enrol,
    Enrolled,
    CheckIn,
    Assignment,
    Wait,
    Finished,
    Progress,
    Lease,
    Report,
    Upload,
    Accepted,
    Evaluation,
    Failed,
    Error,
)

M = TypeVar("M", bound=Message)


def type_of(kind: type[Message]) -> str:
    """Returns the name of a kind of message on the wire."""
    return str(kind.model_fields["type"].default)


def encode_message(message: Message) -> bytes:
    """Returns the canonical bytes of a message, without the keys that have no value."""
    return encode_json(message.model_dump(exclude_none=True))


def parse_message(body: bytes, *kinds: type[M], limit: int = MAX_REQUEST_BYTES) -> M:
    """Reads one message, which must be of one of `kinds`.

    Raises:
        ProtocolError: "too_large" or "malformed".
    """
    content = parse_json(body, limit)
    named = {type_of(kind): kind for kind in kinds}
    if not isinstance(content, dict) or "type" not in content:
        refuse("a message must be a JSON object with a type, got none")
    found = cast("dict[str, Any]", content)["type"]
    if not isinstance(found, str) or found not in named:
        refuse(f"the type must be one of {', '.join(named)}, got type={found!r:.40}")
    return validate(named[found], content)


def validate(kind: type[M], content: Any) -> M:
    """Checks parsed JSON against a model.

    Raises:
        ProtocolError: "malformed", with the first thing that is wrong.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "the message"
        refuse(f"{place}: {first['msg'][:200]}, got {first['input']!r:.40}")
