"""Codecs: layouts by hand, exact lengths, unbiased rounding, error feedback, streams."""

from __future__ import annotations

import math
import pickle
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from potluck.core import ProtocolError
from potluck.protocol import (
    BLOCK,
    CODECS,
    Codec,
    decode_blocks,
    decode_vector,
    encode_vector,
    encoded_bytes,
)

LOSSY: tuple[Codec, ...] = ("bfloat16", "int8", "int4")
SIZES = (1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 64 * BLOCK, 64 * BLOCK + 7, 150_001)

# Entries that the codec holds exactly, so that no random number matters.
GOLDEN: dict[Codec, tuple[list[float], str]] = {
    "float32": ([1.0, -2.5, 0.0, 0.1], "0000803f000020c000000000cdcccc3d"),
    "bfloat16": ([1.0, -2.5, 0.0, 0.10009765625], "803f20c00000cd3d"),
    # scale 1/64 = 0x3c800000, then 127, −127, 64, 0, −1
    "int8": ([127 / 64, -127 / 64, 1.0, 0.0, -1 / 64], "0000803c7f814000ff"),
    # scale 1/4 = 0x3e800000, then 7 and −7, 3 and 0, −1 and nothing
    "int4": ([7 / 4, -7 / 4, 3 / 4, 0.0, -1 / 4], "0000803e97030f"),
}


def vector(dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("codec", CODECS)
def test_golden_bytes(codec: Codec) -> None:
    entries, body = GOLDEN[codec]
    values = np.array(entries, np.float32)
    encoded = encode_vector(values, codec, rng())
    assert encoded.body.hex() == body
    assert encoded.residual.tolist() == [0.0] * len(entries)
    assert decode_vector(bytes.fromhex(body), codec, len(entries)).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("codec", "dim", "num_bytes"),
    [
        ("float32", 1025, 4100),
        ("bfloat16", 1025, 2050),
        ("int8", 1024, 4 + 1024),
        ("int8", 1025, 4 + 1024 + 4 + 1),
        ("int4", 1023, 4 + 512),
        ("int4", 1025, 4 + 512 + 4 + 1),
        ("int4", 2048, 2 * (4 + 512)),
    ],
)
def test_lengths_by_hand(codec: Codec, dim: int, num_bytes: int) -> None:
    assert encoded_bytes(codec, dim) == num_bytes
    assert len(encode_vector(vector(dim), codec, rng()).body) == num_bytes


def test_the_lossy_codecs_save_what_they_promise() -> None:
    dim = 1_663_370  # the paper's CNN
    share = {codec: encoded_bytes(codec, dim) / (4 * dim) for codec in CODECS}
    assert share["int8"] <= 0.26
    assert share["int4"] <= 0.14


@pytest.mark.parametrize("dim", SIZES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_decoded_vector_is_near_and_its_residual_is_the_rest(codec: Codec, dim: int) -> None:
    values = vector(dim)
    encoded = encode_vector(values, codec, rng())
    decoded = decode_vector(encoded.body, codec, dim)
    assert decoded.dtype == np.float32
    assert decoded.shape == (dim,)
    np.testing.assert_allclose(decoded + encoded.residual, values, atol=1e-6)
    largest = np.abs(values).max()
    step = {"float32": 0, "bfloat16": largest / 128, "int8": largest / 127, "int4": largest / 7}
    assert np.abs(encoded.residual).max() <= step[codec] * (1 + 1e-5)


@pytest.mark.parametrize("codec", CODECS)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 40) | st.just(BLOCK + 1),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_any_finite_vector_survives(codec: Codec, values: np.ndarray) -> None:
    encoded = encode_vector(values, codec, rng())
    decoded = decode_vector(encoded.body, codec, values.size)
    assert np.isfinite(decoded).all()
    assert np.isfinite(encoded.residual).all()
    if codec == "float32":
        assert decoded.tobytes() == values.tobytes()
    again = encode_vector(decoded, codec, rng())
    if codec in ("float32", "bfloat16"):
        assert again.body == encoded.body


@pytest.mark.parametrize("codec", LOSSY)
def test_rounding_is_unbiased_and_not_by_chance(codec: Codec) -> None:
    """The mean of n roundings is normal around the value: within 5 deviations over all entries,
    and a codec that rounded down would be off by hundreds."""
    values = vector(200)
    num = 4000
    repeated = np.tile(values, (num, 1))
    random = rng(1)
    decoded = np.stack(
        [decode_vector(encode_vector(row, codec, random).body, codec, 200) for row in repeated]
    ).astype(np.float64)
    deviation = decoded.std(axis=0)
    moved = deviation > 0
    assert moved.mean() > 0.9
    scores = (decoded.mean(axis=0) - values)[moved] / (deviation[moved] / math.sqrt(num))
    assert np.abs(scores).max() < 5
    assert 0.8 < scores.std() < 1.25
    lower = decoded.min(axis=0)[moved]
    biased = (lower - values[moved]) / (deviation[moved] / math.sqrt(num))
    assert np.median(np.abs(biased)) > 20


@pytest.mark.parametrize("codec", CODECS)
def test_with_error_feedback_nothing_is_lost_but_the_last_residual(codec: Codec) -> None:
    random = rng(2)
    residual = None
    inputs, outputs = np.zeros(BLOCK + 5), np.zeros(BLOCK + 5)
    for round in range(50):
        values = vector(BLOCK + 5, seed=round)
        encoded = encode_vector(values, codec, random, residual)
        residual = encoded.residual
        inputs += values
        outputs += decode_vector(encoded.body, codec, values.size)
    assert residual is not None
    np.testing.assert_allclose(outputs + residual, inputs, atol=5e-5)
    if codec == "int4":  # without feedback the errors of 50 rounds would add up
        assert np.abs(outputs - inputs).max() < 2.0


@pytest.mark.parametrize("codec", LOSSY)
def test_the_random_stream_decides_the_bytes(codec: Codec) -> None:
    values = vector(3000)
    assert encode_vector(values, codec, rng(3))[0] == encode_vector(values, codec, rng(3))[0]
    assert encode_vector(values, codec, rng(3))[0] != encode_vector(values, codec, rng(4))[0]


def chunks(body: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize("size", [1000, 65_537, 4 << 20])
@pytest.mark.parametrize("dim", SIZES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_stream_decodes_to_the_same_vector(codec: Codec, dim: int, size: int) -> None:
    body = encode_vector(vector(dim), codec, rng()).body
    pieces = list(decode_blocks(chunks(body, size), codec, dim))
    assert max(piece.size for piece in pieces) <= 65_536
    np.testing.assert_array_equal(np.concatenate(pieces), decode_vector(body, codec, dim))


def test_a_stream_takes_memory_that_does_not_depend_on_its_length() -> None:
    dim = 8_000_000
    zeros = bytes(1 << 16)

    def body() -> Iterator[bytes]:
        whole, rest = divmod(4 * dim, len(zeros))
        for _ in range(whole):
            yield zeros
        yield zeros[:rest]

    tracemalloc.start()
    total = sum(piece.size for piece in decode_blocks(body(), "float32", dim))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == dim
    assert peak < 3_000_000  # of a body of 32 MB


def codes(body: bytes, codec: Codec, dim: int) -> set[str]:
    """The codes with which all three readers refuse a body."""
    found = set()
    with pytest.raises(ProtocolError) as caught:
        decode_vector(body, codec, dim)
    found.add(caught.value.code)
    for size in (1, len(body) or 1):
        with pytest.raises(ProtocolError) as caught:
            list(decode_blocks(chunks(body, size), codec, dim))
        found.add(caught.value.code)
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_another_length_is_refused(codec: Codec) -> None:
    body = encode_vector(vector(1030), codec, rng()).body
    for wrong in (b"", body[:-1], body + b"\0", body + body, body[:4]):
        assert codes(wrong, codec, 1030) == {"wrong_length"}
    with pytest.raises(ProtocolError, match=r"must be \d+ bytes"):
        decode_vector(pickle.dumps(vector(1030)), codec, 1030)


@pytest.mark.parametrize(
    ("codec", "body", "dim", "code"),
    [
        ("float32", "0000c07f", 1, "not_finite"),
        ("float32", "0000803f" + "0000807f", 2, "not_finite"),
        ("float32", "0000803f" + "010080ff", 2, "not_finite"),
        ("bfloat16", "c07f", 1, "not_finite"),
        ("bfloat16", "80ff", 1, "not_finite"),
        ("int8", "0000807f" + "00", 1, "not_finite"),  # a scale of infinity
        ("int8", "0000c07f" + "01", 1, "not_finite"),  # a scale of NaN
        ("int8", "ffff7f7f" + "7f", 1, "not_finite"),  # 127 times the largest float32
        ("int4", "ffff7f7f" + "07", 1, "not_finite"),
        ("int8", "0000803f" + "80", 1, "malformed"),  # −128
        ("int8", "000080bf" + "01", 1, "malformed"),  # a negative scale
        ("int4", "0000803f" + "08", 1, "malformed"),  # −8
        ("int4", "0000803f" + "10", 1, "malformed"),  # something in the half left over
    ],
)
def test_bodies_that_encode_never_writes_are_refused(
    codec: Codec, body: str, dim: int, code: str
) -> None:
    assert codes(bytes.fromhex(body), codec, dim) == {code}


@pytest.mark.parametrize("codec", CODECS)
@given(st.binary(min_size=1, max_size=60), st.integers(1, 60))
def test_any_bytes_give_a_finite_vector_or_a_protocol_error(
    codec: Codec, body: bytes, dim: int
) -> None:
    try:
        decoded, code = decode_vector(body, codec, dim), None
    except ProtocolError as error:
        decoded, code = np.zeros(0), error.code
    assert code in (None, "wrong_length", "not_finite", "malformed")
    assert np.isfinite(decoded).all()
    assert (code == "wrong_length") == (len(body) != encoded_bytes(codec, dim))


@pytest.mark.parametrize("codec", CODECS)
def test_a_vector_that_is_not_finite_is_not_sent(codec: Codec) -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ProtocolError, match="must be finite"):
            encode_vector(np.array([1.0, wrong], np.float32), codec, rng())
    large = np.array([3e38], np.float32)
    with pytest.raises(ProtocolError, match="must be finite"):
        encode_vector(large, codec, rng(), residual=large)


def test_mistakes_of_the_caller_are_value_errors() -> None:
    with pytest.raises(ValueError, match="codec must be one of float32, bfloat16, int8, int4"):
        encoded_bytes("int2", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one entry, got dim=0"):
        encode_vector(np.empty(0, np.float32), "int8", rng())
    with pytest.raises(ValueError, match=r"residual must have the vector's shape \(3,\)"):
        encode_vector(vector(3), "int8", rng(), vector(4))


@pytest.mark.parametrize("codec", CODECS)
def test_ten_megabytes_take_less_than_a_fifth_of_a_second(codec: Codec) -> None:
    values = vector(2_500_000)
    times = []
    for _ in range(3):
        start = time.process_time()
        body = encode_vector(values, codec, rng()).body
        decode_vector(body, codec, values.size)
        times.append(time.process_time() - start)
    assert min(times) < 0.2
