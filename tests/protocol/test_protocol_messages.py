"""Messages ⇄ bytes: golden bytes of every kind, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core import ProtocolError
from potluck.protocol import (
    CHUNK_BYTES,
    FAILURE_REASONS,
    INLINE_BYTES,
    MAX_REQUEST_BYTES,
    MESSAGES,
    ROUTES,
    STATUS,
    Accepted,
    Assignment,
    CheckIn,
    Eligibility,
    Enrol,
    Enrolled,
    Error,
    ErrorCode,
    Evaluation,
    Failed,
    Finished,
    Lease,
    Message,
    Preview,
    Previewed,
    Progress,
    Report,
    Runtime,
    Upload,
    Wait,
    decode_inline,
    encode_inline,
    encode_message,
    parse_message,
    parse_offset,
)

A, D, K = "0123456789abcdef" * 2, "d" * 64, "a" * 64
TORCH = Runtime(name="torch", version="2.13.0")

GOLDEN: list[tuple[Message, bytes]] = [
    (
        Preview(token="T0ken-of_sixteen", public_key=K),
        b'{"public_key":"%s","token":"T0ken-of_sixteen","type":"preview"}' % K.encode(),
    ),
    (
        Previewed(manifest="{}", signature="b" * 128, server_time_ms=1767225600000),
        b'{"manifest":"{}","server_time_ms":1767225600000,"signature":"%s","type":"previewed"}'
        % (b"b" * 128),
    ),
    (
        Enrol(
            token="T0ken-of_sixteen",
            public_key=K,
            name="Ward 3",
            runtime=TORCH,
            device_class="laptop",
        ),
        b'{"device_class":"laptop","name":"Ward 3","public_key":"%s","runtime":{"name":"torch",'
        b'"version":"2.13.0"},"token":"T0ken-of_sixteen","type":"enrol"}' % K.encode(),
    ),
    (
        Enrolled(device=A, run="digits", server_key=K, server_time_ms=1767225600000),
        b'{"device":"%s","run":"digits","server_key":"%s","server_time_ms":1767225600000,'
        b'"type":"enrolled"}' % (A.encode(), K.encode()),
    ),
    (
        CheckIn(
            run="digits",
            accepts=("int8", "float32"),
            runtime=TORCH,
            eligibility=Eligibility(charging=True, unmetered=False, free_memory_bytes=2**31),
        ),
        b'{"accepts":["int8","float32"],"eligibility":{"charging":true,'
        b'"free_memory_bytes":2147483648,"unmetered":false},"run":"digits","runtime":{'
        b'"name":"torch","version":"2.13.0"},"type":"check_in"}',
    ),
    (
        Assignment(
            run="digits",
            round=3,
            attempt=1,
            assignment=A,
            kind="train",
            manifest="{}",
            signature="b" * 128,
            codec="int8",
            lease_seconds=600,
            deadline_ms=1767226200000,
            client=17,
            seed=5,
            model="AACAPw==",
        ),
        b'{"assignment":"%s","attempt":1,"client":17,"codec":"int8","deadline_ms":1767226200000,'
        b'"kind":"train","lease_seconds":600,"manifest":"{}","model":"AACAPw==","round":3,'
        b'"run":"digits","seed":5,'
        b'"signature":"%s","type":"assignment"}' % (A.encode(), b"b" * 128),
    ),
    (
        Wait(retry_after_seconds=12.5, reason="not_selected"),
        b'{"reason":"not_selected","retry_after_seconds":12.5,"type":"wait"}',
    ),
    (Finished(run="digits", rounds=50), b'{"rounds":50,"run":"digits","type":"finished"}'),
    (
        Progress(assignment=A, phase="train", fraction=0.25),
        b'{"assignment":"%s","fraction":0.25,"phase":"train","type":"progress"}' % A.encode(),
    ),
    (Lease(lease_seconds=600), b'{"lease_seconds":600,"type":"lease"}'),
    (
        Report(
            assignment=A,
            round=3,
            attempt=1,
            codec="int8",
            length_bytes=2028,
            sha256=D,
            weight=600.0,
            loss=0.5,
            num_steps=60,
            metrics={"accuracy": 0.75},
            update="AAECA/8=",
        ),
        b'{"assignment":"%s","attempt":1,"codec":"int8","length_bytes":2028,"loss":0.5,'
        b'"metrics":{"accuracy":0.75},"num_steps":60,"round":3,"sha256":"%s","type":"report",'
        b'"update":"AAECA/8=","weight":600.0}' % (A.encode(), D.encode()),
    ),
    (
        Upload(upload=A, offset=4194304, chunk_bytes=4194304),
        b'{"chunk_bytes":4194304,"offset":4194304,"type":"upload","upload":"%s"}' % A.encode(),
    ),
    (
        Accepted(round=3, attempt=1, sha256=D, retry_after_seconds=30.0),
        b'{"attempt":1,"retry_after_seconds":30.0,"round":3,"sha256":"%s","type":"accepted"}'
        % D.encode(),
    ),
    (
        Evaluation(
            assignment=A,
            round=3,
            attempt=1,
            metrics={"correct": (57.0, 60), "loss": (31.25, 60)},
        ),
        b'{"assignment":"%s","attempt":1,"metrics":{"correct":[57.0,60],"loss":[31.25,60]},'
        b'"round":3,"type":"evaluation"}' % A.encode(),
    ),
    (
        Failed(assignment=A, reason="out_of_memory"),
        b'{"assignment":"%s","reason":"out_of_memory","type":"failed"}' % A.encode(),
    ),
    (
        Error(code="clock", message="Wrong time.", server_time_ms=1767225600000),
        b'{"code":"clock","message":"Wrong time.","server_time_ms":1767225600000,"type":"error"}',
    ),
]

names = [type(message).__name__ for message, _ in GOLDEN]


def refused(body: bytes, *kinds: type[Message]) -> str:
    with pytest.raises(ProtocolError) as caught:
        parse_message(body, *(kinds or MESSAGES))
    assert len(str(caught.value)) < 600
    return caught.value.code


def changed(base: Message, /, **changes: Any) -> bytes:
    """The message with keys changed, or left out (None)."""
    content = {**json.loads(encode_message(base)), **changes}
    return json.dumps({k: v for k, v in content.items() if v is not None}).encode()


def test_every_kind_of_message_has_golden_bytes() -> None:
    assert tuple(type(message) for message, _ in GOLDEN) == MESSAGES


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=names)
def test_golden_bytes(message: Message, golden: bytes) -> None:
    assert encode_message(message) == golden
    assert parse_message(golden, *MESSAGES) == message
    assert parse_message(json.dumps(json.loads(golden), indent=2).encode(), *MESSAGES) == message


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=names)
def test_a_message_must_be_of_the_kind_that_is_asked_for(message: Message, golden: bytes) -> None:
    others = [kind for kind in MESSAGES if kind is not type(message)]
    assert refused(golden, *others) == "malformed"


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=names)
def test_every_key_counts(message: Message, golden: bytes) -> None:
    for key in json.loads(golden):
        optional = ("name", "server_time_ms", "model", "update")
        if key not in optional or isinstance(message, (Enrolled, Previewed)):
            assert refused(changed(message, **{key: None})) == "malformed", key
        if key not in ("metrics", "eligibility"):
            assert refused(changed(message, **{key: {}})) == "malformed", key
        assert refused(changed(message, **{key: [[]]})) == "malformed", key
        if key not in ("message", "manifest"):
            assert refused(changed(message, **{key: "é\n"})) == "malformed", key
    assert refused(changed(message, surplus=1)) == "malformed"
    assert refused(golden + b"\n{}") == "malformed"
    assert refused(golden[:-1]) == "malformed"


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=names)
def test_messages_do_not_change(message: Message, golden: bytes) -> None:
    with pytest.raises(ValueError, match="frozen"):
        message.type = "wait"  # type: ignore[attr-defined]


REPORT = next(message for message, _ in GOLDEN if isinstance(message, Report))
CHECK_IN = next(message for message, _ in GOLDEN if isinstance(message, CheckIn))
ENROL = next(message for message, _ in GOLDEN if isinstance(message, Enrol))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (REPORT, {"weight": 0}),
        (REPORT, {"weight": -1.0}),
        (REPORT, {"weight": 1e10}),
        (REPORT, {"weight": "600"}),
        (REPORT, {"weight": True}),
        (REPORT, {"loss": 1e31}),
        (REPORT, {"round": 0}),
        (REPORT, {"round": 3.0}),
        (REPORT, {"round": 10**10}),
        (REPORT, {"round": 2**64}),
        (REPORT, {"length_bytes": -1}),
        (REPORT, {"num_steps": -1}),
        (REPORT, {"codec": "int2"}),
        (REPORT, {"sha256": "D" * 64}),
        (REPORT, {"sha256": "d" * 63}),
        (REPORT, {"sha256": "d" * 64 + "\n"}),
        (REPORT, {"assignment": "../" + "0" * 29}),
        (REPORT, {"metrics": {"Loss": 1.0}}),
        (REPORT, {"metrics": {f"m{i}": 1.0 for i in range(33)}}),
        (REPORT, {"metrics": {"accuracy": "1"}}),
        (REPORT, {"type": "Report"}),
        (REPORT, {"type": ["report"]}),
        (CHECK_IN, {"accepts": []}),
        (CHECK_IN, {"accepts": ["float32"] * 17}),
        (CHECK_IN, {"accepts": "float32"}),
        (CHECK_IN, {"accepts": {"float32": 1}}),
        (CHECK_IN, {"accepts": [1]}),
        (CHECK_IN, {"run": ".."}),
        (CHECK_IN, {"run": "a/b"}),
        (CHECK_IN, {"run": "x" * 65}),
        (CHECK_IN, {"eligibility": {"charging": 1}}),
        (CHECK_IN, {"eligibility": {"free_memory_bytes": -1}}),
        (CHECK_IN, {"eligibility": {"battery": 1}}),
        (ENROL, {"token": "short"}),
        (ENROL, {"name": "two\nlines"}),
        (ENROL, {"public_key": "a" * 62}),
    ],
)
def test_values_out_of_range_or_form_are_malformed(
    message: Message, changes: dict[str, Any]
) -> None:
    assert refused(changed(message, **changes)) == "malformed"


def test_the_refusal_names_the_key_and_what_was_got() -> None:
    with pytest.raises(ProtocolError, match=r"weight: .* greater than 0, got 0\. Send what docs"):
        parse_message(changed(REPORT, weight=0), Report)


def test_integers_are_taken_for_numbers_but_not_the_other_way() -> None:
    assert parse_message(changed(REPORT, weight=600, loss=1), Report).weight == 600.0
    assert refused(changed(REPORT, num_steps=60.0)) == "malformed"


def test_unknown_names_in_an_offer_are_no_error() -> None:
    message = parse_message(changed(CHECK_IN, accepts=["ternary", "float32"]), CheckIn)
    assert message.accepts == ("ternary", "float32")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"null", b'"report"', b"{}", pickle.dumps(1), b"\x1f\x8b" * 9]
)
def test_what_is_no_object_with_a_type_is_malformed(body: bytes) -> None:
    assert refused(body) == "malformed"


def test_a_body_above_the_limit_is_too_large() -> None:
    body = changed(REPORT) + b" " * MAX_REQUEST_BYTES
    assert refused(body) == "too_large"
    assert parse_message(changed(REPORT).ljust(MAX_REQUEST_BYTES), Report) == REPORT


reports = st.builds(
    Report,
    assignment=st.binary(min_size=16, max_size=16).map(bytes.hex),
    round=st.integers(1, 10**9),
    attempt=st.integers(1, 10**6),
    codec=st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    length_bytes=st.integers(1, 2**40),
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
    weight=st.floats(0, 1e9, exclude_min=True),
    loss=st.floats(-1e30, 1e30),
    num_steps=st.integers(0, 10**9),
    metrics=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True), st.floats(-1, 1), max_size=32
    ),
)


@given(reports)
def test_any_report_survives(report: Report) -> None:
    assert parse_message(encode_message(report), Report) == report


@given(st.sampled_from([golden for _, golden in GOLDEN]), st.data())
def test_a_changed_byte_gives_a_message_or_a_protocol_error(
    golden: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(golden) - 1))
    byte = data.draw(st.integers(0, 255))
    body = golden[:at] + bytes([byte]) + golden[at + 1 :]
    try:
        message, code = parse_message(body, *MESSAGES), None
    except ProtocolError as error:
        message, code = None, error.code
    assert code in (None, "malformed")
    if message is not None:
        assert parse_message(encode_message(message), *MESSAGES) == message


def test_every_code_has_a_status_and_the_other_way_round() -> None:
    assert set(STATUS) == set(get_args(ErrorCode))
    assert all(400 <= status < 600 for status in STATUS.values())
    for code in STATUS:
        assert Error(code=code, message="").code == code
    for reason in FAILURE_REASONS:
        assert Failed(assignment=A, reason=reason).reason == reason


def test_every_message_has_a_place_in_the_routes() -> None:
    used: set[Any] = {Error}
    for route in ROUTES:
        used |= {route.request} | set(route.answers if route.answers != "bytes" else ())
        assert route.path.startswith("/v1/")
        assert (route.max_bytes > 0) == (route.request is not None)
    assert used - {None, "bytes"} == set(MESSAGES)
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    assert [route.caller for route in ROUTES].count("newcomer") == 2


def test_the_offset_of_a_chunk() -> None:
    assert parse_offset(b"offset=0") == 0
    assert parse_offset(b"offset=%d" % (3 * CHUNK_BYTES)) == 12_582_912
    for wrong in (b"", b"offset=", b"offset=-1", b"offset=01", b"offset=1&x=2", b"offset=1e3"):
        with pytest.raises(ProtocolError, match="must be offset=N"):
            parse_offset(wrong)
    with pytest.raises(ProtocolError, match="must be offset=N"):
        parse_offset(b"offset=9999999999999999")


def test_a_protocol_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ProtocolError("late", "The round is over.")))
    assert (error.code, str(error)) == ("late", "The round is over.")


def test_the_protocol_needs_no_torch() -> None:
    code = "import sys, potluck.protocol; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("length", [1, 2, 3, 2600, INLINE_BYTES])
def test_a_vector_inside_a_message_comes_out_as_it_was(length: int) -> None:
    vector = bytes(i % 251 for i in range(length))
    text = encode_inline(vector)
    assert decode_inline(text, length) == vector
    base = next(message for message, _ in GOLDEN if isinstance(message, Report))
    assert parse_message(changed(base, update=text), Report).update == text


@pytest.mark.parametrize(
    ("text", "length", "code"),
    [
        ("AAAA", 4, "wrong_length"),
        ("AAAA", 2, "wrong_length"),
        ("AAB=", 2, "malformed"),  # bits that are left over
        ("AA-_", 3, "malformed"),  # of another alphabet
        ("AAA", 2, "malformed"),
        ("AA==AAAA", 4, "malformed"),
    ],
)
def test_a_vector_inside_a_message_has_one_form(text: str, length: int, code: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_inline(text, length)
    assert caught.value.code == code


def test_a_vector_that_is_too_long_is_no_part_of_a_message() -> None:
    base = next(message for message, _ in GOLDEN if isinstance(message, Report))
    long = encode_inline(bytes(INLINE_BYTES + 3))
    for text in (long, "", "AA\n=", "AA==="):
        assert refused(changed(base, update=text), Report) == "malformed"
