"""JSON on the wire: what is refused before anything looks inside."""

from __future__ import annotations

import json
import math
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core import ProtocolError
from potluck.protocol.strict_json import MAX_DEPTH, MAX_INTEGER, encode_json, parse_json

LIMIT = 1 << 20

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(values.filter(lambda value: depth(value) <= MAX_DEPTH))
def test_what_is_written_reads_back_the_same(value: object) -> None:
    data = encode_json(value)
    assert parse_json(data, LIMIT) == value
    assert encode_json(parse_json(data, LIMIT)) == data
    assert parse_json(json.dumps(value).encode(), LIMIT) == value


def test_canonical_bytes_are_sorted_and_have_no_spaces() -> None:
    value = {"b": [1, 0.1, 1e300, -2.5e-9, True, None], "a": 'é\n"', "Z": {}}
    assert encode_json(value) == (
        b'{"Z":{},"a":"\xc3\xa9\\n\\"","b":[1,0.1,1e+300,-2.5e-09,true,null]}'
    )


REFUSED = {
    "nothing": b"",
    "a space": b" ",
    "two values": b"{} {}",
    "trailing bytes": b"{}\x00",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"a":"\xff"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "half a surrogate pair": b'{"a":"\\ud800"}',
    "half a surrogate pair as a key": b'{"\\udc00":1}',
    "NaN": b"[NaN]",
    "Infinity": b"[Infinity]",
    "-Infinity": b"[-Infinity]",
    "a number above every double": b"[1e999]",
    "2^53 + 1": b"[9007199254740993]",
    "-2^53": b"[-9007199254740992]",
    "a million digits": b"9" * 1_000_000,
    "a key twice": b'{"a":1,"a":2}',
    "a key twice, once escaped": b'{"a":1,"\\u0061":2}',
    "a key twice, deep inside": b'{"x":[{"a":1,"a":1}]}',
    "a comma too many": b"[1,]",
    "a leading zero": b"[01]",
    "single quotes": b"{'a':1}",
    "a control character": b'["\n"]',
    "a string that does not end": b'["',
    "a stray backslash": b"[\\",
    "depth 17": b"[" * 17 + b"]" * 17,
    "depth 10,000": b"[" * 10_000 + b"]" * 10_000,
    "depth 10,000 of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "depth 100,000 without an end": b"[" * 100_000,
    "a pickle": pickle.dumps({"a": 1}),
    "the start of a gzip file": b"\x1f\x8b\x08\x00" + bytes(100),
    "the start of a zip file": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_strict_json_is_malformed(body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_json(body, LIMIT)
    assert caught.value.code == "malformed"
    assert len(str(caught.value)) < 400


def test_the_limits_themselves_are_accepted() -> None:
    assert parse_json(b"[" * 16 + b"]" * 16, LIMIT) is not None
    assert parse_json(b"[9007199254740991,-9007199254740991]", LIMIT) == [2**53 - 1, 1 - 2**53]
    assert parse_json(b'"\\ud83c\\udf72"', LIMIT) == "\N{POT OF FOOD}"
    assert parse_json(b'["[[[[[[[[[[[[[[[[[[[[", "\\"[[[[[[[[[[[[[[[[[[[["]', LIMIT)
    assert parse_json(b"[1]", 3) == [1]


def test_a_body_above_its_limit_is_too_large_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="at most 3 bytes, got 4") as caught:
        parse_json(b"[1] ", 3)
    assert caught.value.code == "too_large"


@given(st.binary(max_size=200) | st.text('[]{}",:\\u0aeE+-.19 tfn\n', max_size=200).map(str.encode))
def test_any_bytes_give_a_value_or_a_protocol_error(body: bytes) -> None:
    try:
        value, code = parse_json(body, LIMIT), None
    except ProtocolError as error:
        value, code = None, error.code
    assert code in (None, "malformed")
    assert encode_json(value)
    assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(
    "body", [b'["' + b'\\"' * 500_000, b'"' * 1_000_000, b"\\" * 1_000_000, b'"a"' * 300_000]
)
def test_hostile_bodies_take_linear_time(body: bytes) -> None:
    start = time.process_time()
    with pytest.raises(ProtocolError):
        parse_json(body, LIMIT)
    assert time.process_time() - start < 1.0
