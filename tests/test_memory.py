"""Memory that a server gives back: when, and that it is the system's that it gives."""

import gc
import sys
import weakref

import pytest

from potluck.memory import (
    GROWN_PART,
    GROWTH_BYTES,
    LOOK_PART,
    Looker,
    Trimmer,
    no_long_looks,
    resident_bytes,
    share_heaps,
)


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


def test_a_long_look_comes_the_later_the_longer_the_last_one_took():
    now, took, size = [0.0], [0.5, 0.01, 0.01], [10 * GROWTH_BYTES]

    def look():
        now[0] += took.pop(0)

    looker = Looker(lambda: size[0], lambda: now[0], look)
    assert looker.look()
    for after, is_made in ((0.0, False), (0.5 / LOOK_PART - 0.1, False), (0.2, True), (0.0, False)):
        now[0] += after
        assert looker.look() is is_made
    now[0] += 0.01 / GROWN_PART + 1e-6
    size[0] = 11 * GROWTH_BYTES - 1
    assert not looker.look()
    size[0] += 1
    assert looker.look()
    assert not looker.look()


def test_cycles_are_found_by_the_looker_and_afterwards_by_python_again():
    class Cycle:
        def __init__(self):
            self.me = self

    old = gc.get_threshold()
    with no_long_looks():
        assert gc.get_threshold()[:2] == old[:2]
        assert gc.get_threshold()[2] > 10**6
        cycle = Cycle()
        gone = weakref.ref(cycle)
        gc.collect(1)  # it is old
        del cycle
        gc.collect(1)
        assert gone() is not None
        assert Looker().look()
        assert gone() is None
    assert gc.get_threshold() == old
    assert gc.get_freeze_count() == 0
