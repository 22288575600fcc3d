"""The settings of rounds of devices, simulated or real: each once, with default and range."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Protocol, Self, TypeAlias

from pydantic import Field

from potluck.config.section import Section
from potluck.core.cohorts import cohort_size

Seconds: TypeAlias = Annotated[float, Field(gt=0, le=10**7)]
_Medians: TypeAlias = Annotated[float, Field(ge=1, le=1e9)]
DIVIDED = ("iid", "shards", "dirichlet", "unbalanced")
"""Partitions whose number of clients is in the experiment; the others follow from their data."""


class RoundRules(Section):
    """The rules of selection, of deadlines, and of the minimum for a round to count."""

    selection: Literal["open", "sampled"] = "open"
    """Open: every device that checks in is selected, until the slots are taken. Sampled: the cohort
    is drawn as the simulation without devices draws it, with as many slots as the goal."""
    minimum: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The part of the goal without which a round is abandoned."""
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.3
    """Slots of an open round, as a multiple of the goal."""
    selection_seconds: Seconds = 120.0
    """From the first selected device on."""
    report_seconds: Seconds = 600.0
    """From the end of the selection on."""
    lease_seconds: Seconds | None = None
    """The silence of a device after which its slot is free again; None: `report_seconds`."""
    pace_seconds: Seconds = 10.0
    """The widest window over which waiting devices come back, however long rounds are."""
    attempts: Annotated[int, Field(ge=1)] = 3
    """Abandoned attempts in a row after which the run is paused, or the simulation stops."""

    def minimum_of(self, goal: int) -> int:
        """Reports that a round with this goal needs."""
        return max(math.ceil(goal * self.minimum - 1e-9), 1)

    def slots_of(self, goal: int) -> int:
        """Devices that an open round with this goal selects."""
        return math.ceil(goal * self.over_selection - 1e-9)

    @property
    def silence_seconds(self) -> float:
        """The time that a device may be silent."""
        return self.report_seconds if self.lease_seconds is None else self.lease_seconds


class ServerRules(RoundRules):
    """The further rules of a server."""

    goal: Annotated[int, Field(ge=1, le=10**6)] = 100
    """Reports at which a round is closed early."""
    population: Annotated[int, Field(ge=1)] = 1
    """Devices that must have enrolled before the first round."""
    federated_every: Annotated[int, Field(ge=0)] = 0
    """Federated evaluation after every so many rounds, as a round of its own; 0: never."""
    max_weight: Annotated[float, Field(gt=0, le=1e9)] = 1e6
    max_norm: Annotated[float, Field(gt=0, le=1e9)] = 1e4
    """The largest ‖Δ‖₂ that is accepted."""
    max_weight_times: _Medians = 5.0
    """The weight with which a report counts at most, in medians of its round; see `bounds`."""
    max_pull_times: _Medians = 2.0
    """The same of weight · ‖Δ‖₂."""
    needs_charging: bool = False
    needs_idle: bool = False
    needs_unmetered: bool = False
    needs_memory_bytes: Annotated[int, Field(ge=0)] = 0


class ServeSection(ServerRules):
    """[server]: the settings of `potluck serve`, which decide no numbers of a model.

    `goal` and `population` follow from the experiment's cohort where they are left out.
    """

    test: str | None = None
    """A file of which all examples are for evaluation on the server, relative to the experiment
    file; None: the data set's own test examples, of which there are none with data = "devices"."""
    long_poll_seconds: Annotated[float, Field(ge=0, le=30)] = 25.0
    """The longest wait of a check-in for work."""


class _Experiment(Protocol):
    @property
    def partition(self) -> Any: ...
    @property
    def run(self) -> Any: ...
    @property
    def server(self) -> ServeSection: ...


class RoundSettings(ServerRules):
    """The settings of a served run, as its row in the database keeps them."""

    goal_part: Annotated[float, Field(ge=0, le=1)] | None = None
    """Instead of `goal`: the part of the enrolled devices whose reports close a round."""
    num_rounds: Annotated[int, Field(ge=1)]

    @classmethod
    def sampled(cls, experiment: _Experiment, **changes: object) -> Self:
        """Returns settings under which a served run has the cohorts of the experiment's
        simulation."""
        clients = experiment.partition.clients
        values: dict[str, object] = {
            "selection": "sampled",
            "goal": cohort_size(clients, experiment.run.cohort),
            "population": clients,
            "num_rounds": experiment.run.rounds,
        }
        return cls.model_validate(values | changes)

    @classmethod
    def served(cls, experiment: _Experiment) -> Self:
        """Returns the settings of an experiment's [server] section.

        The goal is the experiment's cohort if none is given. A fraction is one of the devices that
        are enrolled when a round opens. A count waits for the devices that its minimum needs.
        """
        section, cohort = experiment.server, experiment.run.cohort
        given = section.model_dump(exclude_unset=True, exclude={"long_poll_seconds", "test"})
        if section.selection == "sampled" and experiment.partition.kind in DIVIDED:
            return cls.sampled(experiment, **given).given_as(section.model_fields_set)
        values = {"num_rounds": experiment.run.rounds} | given
        if "goal" not in given:
            values["goal_part" if isinstance(cohort, float) else "goal"] = cohort
        settings = cls.model_validate(values)
        if "population" not in given and settings.goal_part is None:
            needed = settings.minimum_of(settings.goal)
            settings = settings.model_copy(update={"population": needed})
        return settings.given_as(section.model_fields_set)

    def given_as(self, names: set[str]) -> Self:
        """The same, of which these were given, and the others follow or are at their defaults."""
        return self.model_construct(names & set(dict(self)), **dict(self))

    def goal_of(self, num_devices: int) -> int:
        """The goal of a round that opens with so many devices."""
        if self.goal_part is None:
            return self.goal
        return cohort_size(max(num_devices, 1), self.goal_part)

    @property
    def lease_ms(self) -> int:
        return milliseconds(self.silence_seconds)


def in_words(settings: RoundSettings) -> list[tuple[str, str]]:
    """Returns what an operator should know before the first round: names and sentences."""
    part, sampled = settings.goal_part, settings.selection == "sampled"
    least = f"{100 * settings.minimum:g} % of them"
    if part is None:
        goal, least = _reports(settings.goal), _reports(settings.minimum_of(settings.goal))
        assigned = f"at most {_devices(settings.slots_of(settings.goal))} a round"
    else:
        goal = "a report of every enrolled device"
        if part < 1.0:
            goal = f"reports of {100 * part:g} % of the enrolled devices (at least one)"
        assigned = f"at most {settings.over_selection:g} times as many devices a round"
    if sampled:
        assigned = "the devices that are drawn for a round, among those that are enrolled"
    begin = f"when {_devices(settings.population)} {'has' if settings.population == 1 else 'have'}"
    return [
        ("goal", f"{goal} close a round" if part != 1.0 else f"{goal} closes a round"),
        ("minimum", f"{least}; with fewer a round is tried again"),
        ("assigned", assigned),
        ("first round", f"{begin} enrolled (server.population)"),
    ]


def _reports(number: int) -> str:
    return f"{number} report{'s' * (number != 1)}"


def _devices(number: int) -> str:
    return f"{number} device{'s' * (number != 1)}"


def milliseconds(seconds: float) -> int:
    """Whole milliseconds."""
    return round(seconds * 1000)
