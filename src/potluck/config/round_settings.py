"""What decides how the rounds of a served run go: the figures, with their defaults."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from potluck.config.experiment import Experiment
from potluck.core import RefusedError
from potluck.core.cohorts import cohort_size
from potluck.core.plain_json import to_json
from potluck.core.validate import plain

M = TypeVar("M", bound=BaseModel)

Seconds = Annotated[float, Field(gt=0, le=10**7)]
DIVIDED = ("iid", "shards", "dirichlet", "unbalanced")
"""Partitions whose number of clients the experiment says; the others follow from their data."""


class RoundSettings(BaseModel):
    """How devices are selected, how long they have, and when a round counts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    _plain = model_validator(mode="before")(plain)  # NumPy's numbers

    selection: Literal["open", "sampled"] = "open"
    """Open: whoever checks in is selected, until the slots are taken. Sampled: the cohort is drawn
    among the enrolled devices as the simulation draws it, with as many slots as the goal."""
    goal: Annotated[int, Field(ge=1, le=10**6)] = 100
    """Reports at which a round is closed early."""
    goal_part: Annotated[float, Field(ge=0, le=1)] | None = None
    """Instead of `goal`: the part of the enrolled devices whose reports close a round."""
    minimum: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The part of the goal without which a round is abandoned."""
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.3
    """Slots of an open round, as a multiple of the goal."""
    population: Annotated[int, Field(ge=1)] = 1
    """Devices that must have enrolled before the first round."""
    num_rounds: Annotated[int, Field(ge=1)]
    selection_seconds: Seconds = 120.0
    """From the first selected device on."""
    report_seconds: Seconds = 600.0
    """From the end of the selection on."""
    lease_seconds: Seconds | None = None
    """How long a device may be silent before its slot is free again; None: `report_seconds`."""
    pace_seconds: Seconds = 10.0
    """The widest window over which waiting devices come back, however long rounds are."""
    attempts: Annotated[int, Field(ge=1)] = 3
    """Abandoned attempts in a row after which the run is paused."""
    federated_every: Annotated[int, Field(ge=0)] = 0
    """Federated evaluation after every so many rounds, as a round of its own; 0: never."""
    max_weight: Annotated[float, Field(gt=0, le=1e9)] = 1e6
    max_norm: Annotated[float, Field(gt=0, le=1e9)] = 1e4
    """The largest ‖Δ‖₂ that is accepted."""
    max_weight_times: Annotated[float, Field(ge=1, le=1e9)] = 5.0
    """The weight with which a report counts at most, in medians of its round; see `bounds`."""
    max_pull_times: Annotated[float, Field(ge=1, le=1e9)] = 2.0
    """The same of weight · ‖Δ‖₂."""
    needs_charging: bool = False
    needs_idle: bool = False
    needs_unmetered: bool = False
    needs_memory_bytes: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def sampled(cls, experiment: Experiment, **changes: object) -> RoundSettings:
        """Those under which a served run has the cohorts of the experiment's simulation."""
        clients = experiment.partition.clients
        values: dict[str, object] = {
            "selection": "sampled",
            "goal": cohort_size(clients, experiment.run.cohort),
            "population": clients,
            "num_rounds": experiment.run.rounds,
        }
        return cls.model_validate(values | changes)

    @classmethod
    def served(cls, experiment: Experiment) -> RoundSettings:
        """Those of an experiment's [server] section.

        The goal is the experiment's cohort if none is given. A fraction is one of the devices that
        are enrolled when a round opens. A count waits for the devices that its minimum needs.
        """
        section = experiment.server
        given = section.model_dump(exclude_none=True, exclude={"long_poll_seconds", "test"})
        if section.selection == "sampled" and experiment.partition.kind in DIVIDED:
            return cls.sampled(experiment, **given).given_as(section.model_fields_set)
        given = {"num_rounds": experiment.run.rounds} | given
        if "goal" not in given:
            cohort = experiment.run.cohort
            given["goal_part" if isinstance(cohort, float) else "goal"] = cohort
        settings = cls.model_validate(given)
        if section.population is None and settings.goal_part is None:
            needed = settings.minimum_of(settings.goal)
            settings = settings.model_copy(update={"population": needed})
        return settings.given_as(section.model_fields_set)

    def given_as(self, names: set[str]) -> RoundSettings:
        """The same, of which these were given, and the others follow or are at their defaults."""
        return self.model_construct(names & set(dict(self)), **dict(self))

    def goal_of(self, num_devices: int) -> int:
        """The goal of a round that opens with so many devices."""
        if self.goal_part is None:
            return self.goal
        return cohort_size(max(num_devices, 1), self.goal_part)

    def minimum_of(self, goal: int) -> int:
        """Reports that a round with this goal needs."""
        return max(math.ceil(goal * self.minimum - 1e-9), 1)

    @property
    def lease_ms(self) -> int:
        seconds = self.report_seconds if self.lease_seconds is None else self.lease_seconds
        return milliseconds(seconds)


def in_words(settings: RoundSettings) -> list[tuple[str, str]]:
    """What an operator should know before the first round: names and sentences."""
    part, sampled = settings.goal_part, settings.selection == "sampled"
    least = f"{100 * settings.minimum:g} % of them"
    if part is None:
        goal, least = _reports(settings.goal), _reports(settings.minimum_of(settings.goal))
        slots = math.ceil(settings.goal * settings.over_selection - 1e-9)
        assigned = f"at most {_devices(slots)} a round"
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


@lru_cache(maxsize=64)
def settings_of(text: str) -> RoundSettings:
    """Those of a run, from the JSON in its row."""
    return read_stored(RoundSettings, text)


def read_stored(model: type[M], text: str) -> M:
    """What an object was stored as, by this version or another.

    A key that this version does not know is left out where it decides no numbers of a model: where
    it has no value, and in settings.

    Raises:
        RefusedError: conflict: there is something else that this version does not have.
    """
    content = json.loads(text)
    while True:
        try:
            return model.model_validate_json(to_json(content))
        except ValidationError as error:
            if any(_drop(model, content, detail) for detail in error.errors()):
                continue
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise RefusedError(
                "conflict",
                "the run must have been begun by a version that this one knows, got "
                f"{place} = {first['input']!r:.80} ({first['msg']}). Serve it with that version.",
            ) from None


def _drop(model: type[BaseModel], content: Any, detail: Any) -> bool:
    """Remove a key that this version does not know, if it decides nothing."""
    if detail["type"] != "extra_forbidden" or (
        detail["input"] is not None and model is not RoundSettings
    ):
        return False
    *path, last = detail["loc"]
    for part in path:
        content = content.get(part, content)  # the name of a section stands in the path, too
    return content.pop(last, content) is not content


def milliseconds(seconds: float) -> int:
    """Whole milliseconds."""
    return round(seconds * 1000)
