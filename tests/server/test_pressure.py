"""How long devices wait that are refused: longer the more of them come, and shorter again."""

import pytest

from potluck.server.http.admission import LEAST_SECONDS, MOST_SECONDS, REFUSALS, RetryAfter


def middle():
    return 0.5


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def refused(retry_after, clock, devices, seconds):
    """Devices that come again as told, evenly: what the last was told, and refusals a second in the
    last half minute."""
    told, count = LEAST_SECONDS, 0
    end = clock.seconds + seconds
    while clock.seconds < end:
        clock.seconds += told / devices
        told = retry_after.seconds()
        count += clock.seconds > end - 30
    return told, count / 30


def test_a_few_are_told_little_more_than_the_least(clock):
    told, rate = refused(RetryAfter(clock, middle), clock, 60, 60)
    assert told == pytest.approx(LEAST_SECONDS + 60 / REFUSALS, rel=0.03)
    assert rate == pytest.approx(60 / told, rel=0.1)


def test_many_wait_until_few_are_refused_in_a_second(clock):
    retry_after = RetryAfter(clock, middle)
    told, rate = refused(retry_after, clock, 2000, 60)
    assert told == pytest.approx(LEAST_SECONDS + 2000 / REFUSALS, rel=0.1)
    assert rate == pytest.approx(2000 / told, rel=0.1)
    assert refused(retry_after, clock, 10_000, 120)[1] < REFUSALS
    assert refused(retry_after, clock, 6, 120)[0] == pytest.approx(LEAST_SECONDS, rel=0.01)


def test_nobody_is_told_more_than_the_most(clock):
    assert refused(RetryAfter(clock, middle), clock, 200_000, 60)[0] == MOST_SECONDS


def test_who_is_refused_at_once_is_told_different_times(clock):
    retry_after = RetryAfter(clock, iter([0.0, 0.5, 0.75]).__next__)
    assert [retry_after.seconds() for _ in range(3)] == [1.0, 2.0, 2.5]
    drawn = [RetryAfter(clock).seconds() for _ in range(1000)]
    assert 1.0 <= min(drawn) < 1.1
    assert 2.9 < max(drawn) < 3.0
