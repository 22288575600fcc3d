"""Kinds of devices to simulate, by name: phones, browsers, hospitals, and ideal ones.

Every device of a fleet is drawn once in a run, from the run's seed. Its speed and its bandwidths
are lognormal around those of the middle device. Its windows follow the habits of its kind. All
figures are round ones of our choice, except three. Phones drop out of 8 % of their assignments, the
middle of the 6 to 10 % that were reported for a large deployment. There about four times as many
phones were free at the best hour as at the worst, and the habits of phones here come near that (K.
Bonawitz et al.: Towards Federated Learning at Scale: System Design. MLSys 2019). And they look for
work every 15 minutes, the shortest period at which Android runs the periodic work of an
application.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from potluck.core import stream
from potluck.core.validate import as_count
from potluck.simulation.virtual_time.fleet import Fleet

_HOUR = 3600.0


class Habit(NamedTuple):
    """A daily window of some of the devices; start and length are drawn uniformly."""

    earliest_hour: float  # local time
    latest_hour: float
    shortest_hours: float
    longest_hours: float
    share: float  # of the devices that have it


ALWAYS = Habit(0.0, 0.0, 24.0, 24.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The distributions of the devices of one kind.

    The spreads are the standard deviations of the natural logarithm: with 0.5, two devices in
    three are between 0.6 and 1.6 times as fast as the middle one.
    """

    examples_per_second: float  # of the middle device, with a small model
    speed_spread: float
    uplink_bytes_per_second: float
    downlink_bytes_per_second: float
    link_spread: float
    dropout: float
    check_in_seconds: float  # how often a free device looks for work; 0: it waits at the server
    habits: tuple[Habit, ...]


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "ideal": Profile(
            examples_per_second=1000.0,
            speed_spread=0.0,
            uplink_bytes_per_second=10e6,
            downlink_bytes_per_second=10e6,
            link_spread=0.0,
            dropout=0.0,
            check_in_seconds=0.0,
            habits=(ALWAYS,),
        ),
        "hospitals": Profile(
            examples_per_second=1000.0,
            speed_spread=0.5,
            uplink_bytes_per_second=5e6,
            downlink_bytes_per_second=10e6,
            link_spread=0.5,
            dropout=0.01,
            check_in_seconds=0.0,
            habits=(ALWAYS,),
        ),
        "phones": Profile(
            examples_per_second=100.0,
            speed_spread=0.5,
            uplink_bytes_per_second=0.5e6,
            downlink_bytes_per_second=2e6,
            link_spread=0.8,
            dropout=0.08,
            check_in_seconds=900.0,
            habits=(
                Habit(21.0, 24.0, 6.0, 9.0, 0.7),  # charged at night
                Habit(4.0, 22.0, 2.0, 6.0, 1.0),  # once at day
            ),
        ),
        "browsers": Profile(
            examples_per_second=100.0,
            speed_spread=0.7,
            uplink_bytes_per_second=0.5e6,
            downlink_bytes_per_second=2e6,
            link_spread=0.8,
            dropout=0.25,
            check_in_seconds=0.0,
            habits=(Habit(8.0, 22.0, 0.1, 0.7, 1.0),) * 3,  # a page is open three times a day
        ),
    }
)


def draw_fleet(
    profile: Profile,
    population: int,
    *,
    seed: int,
    examples_per_second: float | None = None,
    utc_offsets: Sequence[float] = (0.0,),
    start_hour: float = 0.0,
) -> Fleet:
    """The devices of one run.

    Args:
        examples_per_second: of the middle device, with the model that is trained; instead of the
            profile's.
        utc_offsets: hours; every device is in one of these time zones, drawn evenly.
        start_hour: the hour of the day, UTC, at virtual time 0.
    """
    population = as_count("population", population)
    random = stream(seed, "devices")
    speed = profile.examples_per_second if examples_per_second is None else examples_per_second
    # In a fixed order, so that no key changes what another draws.
    speeds, uplinks, downlinks = random.standard_normal((3, population))
    zones = np.asarray(utc_offsets, np.float64)[random.integers(len(utc_offsets), size=population)]
    starts = np.empty((population, len(profile.habits)))
    lengths = np.empty_like(starts)
    for j, habit in enumerate(profile.habits):
        begin, length, has = random.random((3, population))
        local = habit.earliest_hour + begin * (habit.latest_hour - habit.earliest_hour)
        hours = habit.shortest_hours + length * (habit.longest_hours - habit.shortest_hours)
        starts[:, j] = (local - zones - start_hour) * _HOUR
        lengths[:, j] = np.where(has < habit.share, hours, 0.0) * _HOUR
    return Fleet(
        examples_per_second=speed * np.exp(profile.speed_spread * speeds),
        uplink_bytes_per_second=profile.uplink_bytes_per_second
        * np.exp(profile.link_spread * uplinks),
        downlink_bytes_per_second=profile.downlink_bytes_per_second
        * np.exp(profile.link_spread * downlinks),
        dropout=np.full(population, profile.dropout),
        check_in_seconds=np.full(population, profile.check_in_seconds),
        starts=starts,
        lengths=lengths,
    )
