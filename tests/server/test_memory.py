"""Memory that a server gives back: when, and that it is the system's that it gives."""

import gc
import subprocess
import sys
import weakref

import pytest

from potluck.server.memory import (
    COLLECT_PART,
    GROWTH_BYTES,
    GcScheduler,
    Trimmer,
    only_young_collections,
)


def test_memory_is_given_back_when_it_has_grown_and_not_otherwise():
    sizes = [100, GROWTH_BYTES, 90, 91, GROWTH_BYTES + 89, GROWTH_BYTES + 90, 90]
    given = []
    trimmer = Trimmer(lambda: sizes.pop(0), given.append)
    assert [trimmer.poll() for _ in range(5)] == [False, True, False, False, True]
    assert given == [0, 0]
    assert sizes == []


GIVEN_BACK = """from potluck.server.memory import Trimmer, resident_bytes, share_heaps

share_heaps()
pieces = [bytes(60_000) for _ in range(3000)]
before = resident_bytes()
pieces = pieces[::100]  # most are free, and none at the end of the heap
assert Trimmer().poll()
print(before - resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_was_freed_between_what_is_in_use_goes_back():
    """In a process of its own: what other tests left in this one's heaps hides it."""
    command = [sys.executable, "-c", GIVEN_BACK]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) > 100 * 10**6


FAULTS = """import ctypes
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which few faults make many
import resource, sys
import numpy as np
from potluck.core.allocator import keep_freed

if sys.argv[1] == "keep":
    keep_freed()
for step in range(20):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [np.ones(size << 18) for size in (3, 40, 7, 11)]  # 2 to 80 MiB
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_what_a_step_freed_is_there_for_the_next_one():
    def faults(word: str) -> int:
        command = [sys.executable, "-c", FAULTS, word]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("give") > 5_000


class Cycle:
    def __init__(self):
        self.me = self


def old_cycle():
    """A cycle that nobody uses, too old to be found by itself; whether it is there."""
    cycle = Cycle()
    gc.collect(1)
    return weakref.ref(cycle)


@pytest.fixture
def frozen():
    old = gc.get_threshold()
    with only_young_collections():
        assert gc.get_threshold()[:2] == old[:2]
        assert gc.get_threshold()[2] > 10**6
        yield
    assert gc.get_threshold() == old
    assert gc.get_freeze_count() == 0


def test_cycles_are_looked_for_when_there_is_more_memory(frozen):
    size = [10 * GROWTH_BYTES]
    scheduler = GcScheduler(lambda: size[0])
    gone = old_cycle()
    gc.collect(1)
    size[0] = 11 * GROWTH_BYTES - 1
    assert not scheduler.poll()
    assert gone() is not None
    size[0] += 1
    assert scheduler.poll()
    assert gone() is None
    assert not scheduler.poll()


def test_what_was_alive_at_a_look_is_looked_at_again_when_memory_has_doubled(frozen):
    size, now = [10 * GROWTH_BYTES], [0.0]
    scheduler = GcScheduler(lambda: size[0], lambda: now[0])
    cycle = Cycle()
    gone = weakref.ref(cycle)
    size[0] = 11 * GROWTH_BYTES
    assert scheduler.poll()
    del cycle
    size[0] = 20 * GROWTH_BYTES - 1
    assert scheduler.poll()
    assert gone() is not None
    size[0] += 1
    assert scheduler.poll()
    assert gone() is None
    assert not scheduler.poll()
    now[0] += 3600.0
    assert scheduler.poll()


def test_the_next_look_comes_the_later_the_longer_the_last_one_took(frozen):
    now, size = [0.0], [10 * GROWTH_BYTES]

    def resident():
        now[0] += 0.5  # the time of a look, between the clock's
        return size[0]

    scheduler = GcScheduler(resident, lambda: now[0])
    size[0] = 12 * GROWTH_BYTES
    assert scheduler.poll()
    size[0], begin = 14 * GROWTH_BYTES, now[0]
    while not scheduler.poll():
        pass
    assert now[0] - begin == pytest.approx(1.0 / COLLECT_PART, rel=0.1)
