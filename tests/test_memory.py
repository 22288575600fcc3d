"""Memory that a server gives back: when, and that it is the system's that it gives."""

import sys

import pytest

from potluck.memory import GROWTH_BYTES, Trimmer, resident_bytes, share_heaps


def test_memory_is_given_back_when_it_has_grown_and_not_otherwise():
    sizes = [100, GROWTH_BYTES, 90, 91, GROWTH_BYTES + 89, GROWTH_BYTES + 90, 90]
    given = []
    trimmer = Trimmer(lambda: sizes.pop(0), given.append)
    assert [trimmer.look() for _ in range(5)] == [False, True, False, False, True]
    assert given == [0, 0]
    assert sizes == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_was_freed_between_what_is_in_use_goes_back():
    share_heaps()
    pieces = [bytes(60_000) for _ in range(3000)]
    before = resident_bytes()
    pieces = pieces[::100]  # most are free, and none at the end of the heap
    assert Trimmer().look()
    assert resident_bytes() < before - 100 * 10**6
