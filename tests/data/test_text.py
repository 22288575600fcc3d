"""Lines as rows of symbols: by hand, and there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core import DataError
from potluck.data.lines import (
    PADDING,
    START,
    SYMBOLS,
    encode_lines,
    line_corpus,
    rows_per_line,
)
from potluck.data.partitions import by_group
from rows_of_bytes import decode

LINES = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=8)


def test_two_lines_by_hand() -> None:
    inputs, targets = encode_lines([b"ab", b""], 4)
    assert inputs.tolist() == [[START, 97, 98, PADDING], [START, PADDING, PADDING, PADDING]]
    assert targets.tolist() == [[97, 98, 10, PADDING], [10, PADDING, PADDING, PADDING]]
    assert inputs.dtype == targets.dtype == np.int16


def test_a_long_line_goes_on_in_the_next_row() -> None:
    inputs, targets = encode_lines([b"abcd", b"xyz", b"e"], 4)
    assert rows_per_line([b"abcd", b"xyz", b"e"], 4).tolist() == [2, 1, 1]
    assert inputs.tolist() == [
        [START, 97, 98, 99],
        [100, PADDING, PADDING, PADDING],
        [START, 120, 121, 122],
        [START, 101, PADDING, PADDING],
    ]
    assert targets.tolist() == [
        [97, 98, 99, 100],
        [10, PADDING, PADDING, PADDING],
        [120, 121, 122, 10],
        [101, 10, PADDING, PADDING],
    ]


@given(lines=LINES, steps=st.integers(1, 12))
def test_decoding_gives_the_text_back(lines: list[bytes], steps: int) -> None:
    inputs, targets = encode_lines(lines, steps)
    assert decode(targets) == b"".join(line + b"\n" for line in lines)
    rows = rows_per_line(lines, steps)
    assert len(inputs) == len(targets) == rows.sum()
    last = np.cumsum(rows)
    for line, start, end in zip(lines, last - rows, last, strict=True):
        assert decode(inputs[start:end]) == line
        assert decode(targets[start:end]) == line + b"\n"


@given(lines=LINES, steps=st.integers(1, 12))
def test_every_character_counts_once_and_is_the_next_input(lines: list[bytes], steps: int) -> None:
    inputs, targets = encode_lines(lines, steps)
    counted = targets != PADDING
    assert counted.sum() == sum(len(line) + 1 for line in lines)
    assert ((inputs != PADDING) == counted).all()
    assert (counted[:, :-1] >= counted[:, 1:]).all()  # padding is at the end of a row
    assert (inputs == START).sum() == len(lines)
    both = counted[:, 1:]
    assert (inputs[:, 1:][both] == targets[:, :-1][both]).all()


def test_symbols_are_the_bytes_and_two_more() -> None:
    inputs, targets = encode_lines([bytes(set(range(256)) - {10})], 300)
    assert np.unique(targets[targets != PADDING]).tolist() == list(range(256))
    assert {START, PADDING} == {SYMBOLS - 2, SYMBOLS - 1}
    assert inputs.max() == PADDING


def test_lines_with_newlines_and_rows_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not contain a newline, got line=b'b\\nc'"):
        encode_lines([b"a", b"b\nc"])
    with pytest.raises(ValueError, match="steps must be at least 1, got steps=0"):
        encode_lines([b"a"], 0)


def test_a_corpus_tests_on_the_last_fifth_of_each_clients_lines() -> None:
    lines = [b"%d" % i for i in range(11)]
    data = line_corpus("made", {"z": lines, "a": lines[:3]}, checksums={"made": "1"}, steps=8)
    assert (data.num_classes, data.padding, data.checksums) == (SYMBOLS, PADDING, {"made": "1"})
    assert data.groups is not None
    assert data.test_groups is not None
    assert data.groups.tolist() == ["z"] * 9 + ["a"] * 2
    assert data.test_groups.tolist() == ["z"] * 2 + ["a"]
    assert decode(data.train.targets) == b"0\n1\n2\n3\n4\n5\n6\n7\n8\n0\n1\n"
    assert decode(data.test.targets) == b"9\n10\n2\n"
    federated = by_group(data)
    assert federated.padding == PADDING
    assert federated.clients == ("a", "z")
    assert decode(federated.client_test(0).targets) == b"2\n"
    assert decode(federated.client_test(1).targets) == b"9\n10\n"


def test_both_rows_of_a_long_line_belong_to_its_client() -> None:
    clients = {"a": [b"x" * 9, b"y"], "b": [b"z", b"z" * 17]}
    data = line_corpus("made", clients, checksums={}, steps=8)
    assert data.groups is not None
    assert data.test_groups is not None
    assert data.groups.tolist() == ["a", "a", "b"]
    assert data.test_groups.tolist() == ["a", "b", "b", "b"]


def test_a_corpus_of_nobody_is_refused() -> None:
    with pytest.raises(DataError, match="'made' must have at least one client with lines, got 0"):
        line_corpus("made", {}, checksums={})
