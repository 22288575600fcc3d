"""docs/protocol.md is true: every example, table and vocabulary in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from potluck.config.plan import Plan
from potluck.core import Spec, derive_seed
from potluck.protocol import (
    CODECS,
    FAILURE_REASONS,
    INLINE,
    INLINE_BYTES,
    LONG_POLL_SECONDS,
    MAX_ANSWER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_SKEW_MS,
    MESSAGES,
    ROUTES,
    STATUS,
    Assignment,
    CheckIn,
    Codec,
    Invitation,
    Message,
    Wait,
    encode_inline,
    encode_invitation,
    encode_message,
    encode_vector,
    fingerprint,
    parse_message,
    public_key,
    read_claim,
    sign_manifest,
    sign_request,
    verify_manifest,
)
from potluck.protocol.messages import type_of
from potluck.protocol.signing import signed_bytes
from potluck.protocol.strict_json import encode_json

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
DEVICE, SERVER = bytes(range(32)), bytes(range(32, 64))
NOW = 1767225600000
NUMBERS = {"sequence": 42, "time_ms": NOW}
VECTORS: dict[Codec, list[float]] = {
    "float32": [1.0, -2.5, 0.0, 0.25],
    "bfloat16": [1.0, -2.5, 0.0, 0.25],
    "int8": [127 / 64, -127 / 64, 1.0, 0.0, -1 / 64],
    "int4": [7 / 4, -7 / 4, 3 / 4, 0.0, -1 / 4],
}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)\n```$", TEXT, re.MULTILINE | re.DOTALL)


def rows(header: str) -> list[list[str]]:
    """The cells of all tables under such a header."""
    tables = re.findall(rf"^{re.escape(header)}\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]


EXAMPLES: dict[type[Message], Message] = {}
for block in blocks("json"):
    example = parse_message(block.encode(), *MESSAGES)
    EXAMPLES[type(example)] = example


def test_every_message_has_one_example() -> None:
    assert len(blocks("json")) == len(EXAMPLES)
    assert set(EXAMPLES) == set(MESSAGES)


def test_the_examples_of_bytes_are_true() -> None:
    check_in = encode_message(EXAMPLES[CheckIn])
    request = ("POST", "potluck.example:8443", "/v1/check-in")
    run_key = public_key(SERVER)
    headers = sign_request(DEVICE, *request, check_in, run_key=run_key, **NUMBERS)
    claim = read_claim([(k.encode(), v.encode()) for k, v in headers.items()])
    assignment = EXAMPLES[Assignment]
    assert isinstance(assignment, Assignment)
    manifest = verify_manifest(
        assignment.manifest.encode(),
        bytes.fromhex(assignment.signature),
        public_key(SERVER),
        run="digits",
        now_ms=NOW,
        last_seen_version=0,
    )
    data, signature = sign_manifest(SERVER, manifest)
    spec = Spec(("layer.weight", "layer.bias"), ((2, 3), (3,)))
    invitation = Invitation(
        token="T0ken-of_sixteen",
        run="digits",
        server_key=public_key(SERVER).hex(),
        certificate=None,
    )
    random = np.random.default_rng(0)
    vectors = [
        f"{codec:8}  {VECTORS[codec]!s:42}  "
        + encode_vector(np.array(VECTORS[codec], np.float32), codec, random).body.hex()
        for codec in CODECS
    ]
    assert blocks("http") == ["\n".join(f"{name}: {value}" for name, value in headers.items())]
    assert blocks("text") == [
        f"private key  {DEVICE.hex()}\npublic key   {public_key(DEVICE).hex()}\n"
        f"device       {fingerprint(public_key(DEVICE))}",
        signed_bytes(claim, run_key, *request).decode(),
        f"{encode_json(invitation.model_dump()).decode()}\n{encode_invitation(invitation)}",
        data.decode(),
        f"{(spec.names, spec.shapes)!r}\n{spec.digest()}",
        f"private key  {SERVER.hex()}\npublic key   {public_key(SERVER).hex()}\n"
        f"signature    {signature.hex()}",
        "\n".join(vectors),
        f"5/batches/3/17  {derive_seed(5, 'batches', 3, 17)}",
    ]


def test_the_table_of_paths_is_that_of_the_code() -> None:
    def named(kinds: Any) -> str:
        if kinds is None or kinds == "bytes":
            return kinds or ""
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        return ", ".join(f"`{type_of(kind)}`" for kind in kinds)

    assert rows("| method | path | caller | request | answer | at most (bytes) |") == [
        [
            route.method,
            f"`{route.path}`",
            route.caller,
            named(route.request),
            named(route.answers),
            str(route.max_bytes),
        ]
        for route in ROUTES
    ]


def test_the_table_of_error_codes_is_that_of_the_code() -> None:
    table = rows("| code | status | when | what the device does |")
    assert [(row[0].strip("`"), int(row[1])) for row in table] == list(STATUS.items())


def test_the_tables_of_reasons_are_those_of_the_code() -> None:
    wait = [row[0].strip("`") for row in rows("| reason | what it means |")]
    failed = [row[0].strip("`") for row in rows("| reason | what happened |")]
    assert tuple(wait) == get_args(Wait.model_fields["reason"].annotation)
    assert tuple(failed) == FAILURE_REASONS


def test_the_table_of_headers_is_that_of_the_code() -> None:
    names = list(sign_request(DEVICE, "GET", "localhost", "/", run_key=bytes(32), **NUMBERS))
    assert [row[0].strip("`") for row in rows("| header | form | what |")] == names


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_key_of_every_message_has_its_form(kind: type[Message]) -> None:
    keys = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows("| key | form |")))
    assert set(kind.model_fields) <= set(keys)


def test_every_key_of_a_manifest_has_its_form() -> None:
    keys = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows("| key | form and meaning |")))
    assignment = EXAMPLES[Assignment]
    assert isinstance(assignment, Assignment)
    assert sorted(json.loads(assignment.manifest)) == sorted(keys)


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    for fact in (
        f"A JSON answer is at most {MAX_ANSWER_BYTES:,} bytes",
        f"a manifest inside it at most {MAX_MANIFEST_BYTES:,}",
        f"a model of at most {INLINE_BYTES:,} bytes in `model`",
        f"the encoded bytes, at most {INLINE_BYTES:,}, in `update`",
        f"with padding, 4 to {len(encode_inline(bytes(INLINE_BYTES))):,} characters",
        f"perhaps `{INLINE}`",
        f"At most {MAX_SKEW_MS // 1000} s from the server's",
        f"for up to {LONG_POLL_SECONDS} s before it answers",
    ):
        assert fact in TEXT


def test_every_key_and_name_of_a_plan_is_told() -> None:
    schema = Plan.model_json_schema()
    told = {row[0] for row in rows("| key of a plan | form and meaning |")}
    for place in ("task.model", "algorithm.name"):  # or the table was not found
        assert f"`{place}`" in told
    task, needs = set(schema["$defs"]["PlannedTask"]["properties"]), {"needs", "data"}
    algorithms = ("FedAvg_fedavg", "FedAvg_fedsgd", "FedProx_fedprox")
    steps = {key for name in algorithms for key in schema["$defs"][name]["properties"]}
    keys = {f"`task.{key}`" for key in task} | {f"`algorithm.{key}`" for key in steps}
    joined = {key for cell in told for key in cell.split(", ")}
    assert keys | {f"`{key}`" for key in needs} <= joined
    schedules = {row[0] for row in rows("| `client_schedule.name` | its keys | f |")}
    names = ("constant", "exponential", "step", "linear", "cosine", "warmup")
    assert schedules == {f"`{name}`" for name in names}
    optimizers = rows(
        "| `client_optimizer.name` | its keys and what they are if missing | a step |"
    )
    names = ("sgd", "momentum", "nesterov", "adam", "adamw")
    assert [row[0] for row in optimizers] == [f"`{name}`" for name in names]
    words = schema["$defs"]["PlannedTask"]["properties"]["model"]["enum"]
    assert all(f"`{word}`" in TEXT for word in words)
