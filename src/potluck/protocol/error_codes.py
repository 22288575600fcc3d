"""The codes of refusals: one word for programs, and the HTTP status that carries it."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

ErrorCode: TypeAlias = Literal[
    "malformed",
    "digest",
    "wrong_length",
    "not_finite",
    "bounds",
    "unsigned",
    "unknown",
    "bad_signature",
    "replayed",
    "clock",
    "token",
    "not_found",
    "method",
    "conflict",
    "late",
    "offset",
    "too_large",
    "media",
    "range",
    "misdirected",
    "overloaded",
    "internal",
    "unavailable",
]
"""The codes of a server's answers."""

STATUS: dict[ErrorCode, int] = {
    "malformed": 400,  # not what the protocol describes
    "digest": 400,  # the body is not the one that was signed or announced
    "wrong_length": 400,  # not the exact length of a vector of this model in this codec
    "not_finite": 400,  # a vector with NaN or infinity
    "bounds": 400,  # weight or norm beyond what the run accepts
    "unsigned": 401,  # no signature headers
    "unknown": 401,  # no such device in this run, or revoked
    "bad_signature": 401,
    "replayed": 401,  # a sequence number that is not above the last one
    "clock": 401,  # the time is off by more than MAX_SKEW_MS; `server_time_ms` tells the right one
    "token": 403,  # an enrolment token that is unknown, used or expired
    "not_found": 404,  # no such path or id, or another device's
    "method": 405,
    "conflict": 409,  # this round and attempt has a report with another digest
    "late": 409,  # the lease has expired, or the round is over
    "offset": 409,  # a chunk that does not start where the upload stands
    "too_large": 413,
    "media": 415,  # a content type or encoding that the route does not take
    "range": 416,  # a download that starts beyond the end
    "misdirected": 421,  # the authority is none of the server's names
    "overloaded": 429,
    "internal": 500,
    "unavailable": 503,  # starting, stopping, or out of space
}

FailureReason: TypeAlias = Literal[
    "manifest_malformed",
    "manifest_signature",
    "manifest_expired",
    "manifest_rollback",
    "manifest_foreign",
    "model_digest",
    "unsupported",
    "no_data",
    "declined",
    "ineligible",
    "diverged",
    "out_of_memory",
    "stopped",
    "error",
]
"""The reasons for which a device gives an assignment back, with the codes of `verify_manifest`."""

FAILURE_REASONS: tuple[FailureReason, ...] = get_args(FailureReason)
