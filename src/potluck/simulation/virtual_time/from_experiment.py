"""The devices that an experiment simulates, from its [devices]."""

from __future__ import annotations

from potluck.config.experiment import Experiment
from potluck.simulation.virtual_time.profiles import PROFILES, draw_fleet
from potluck.simulation.virtual_time.timeline import VirtualTime
from potluck.simulation.virtual_time.trace import read_trace


def build_virtual_time(experiment: Experiment, population: int, seed: int) -> VirtualTime | None:
    """The devices of a run with this seed; None where the experiment has no [devices].

    Raises:
        ConfigError: a trace file that cannot be used.
    """
    section = experiment.devices
    if section is None:
        return None
    if section.trace is not None:
        fleet = read_trace(
            section.trace, population, days=section.trace_days, start_hour=section.start_hour
        )
    else:
        assert section.profile is not None  # checked when the experiment was read
        fleet = draw_fleet(
            PROFILES[section.profile],
            population,
            seed=seed,
            examples_per_second=section.examples_per_second,
            utc_offsets=section.utc_offsets,
            start_hour=section.start_hour,
        )
    return VirtualTime(fleet=fleet, rules=section, passes=experiment.algorithm.local_epochs)
