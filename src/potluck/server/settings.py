"""What decides how the rounds of a served run go: the figures, with their defaults."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from potluck.core.cohorts import cohort_size
from potluck.core.validate import plain
from potluck.experiment import Experiment

Seconds = Annotated[float, Field(gt=0, le=10**7)]


class RoundSettings(BaseModel):
    """How devices are selected, how long they have, and when a round counts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    _plain = model_validator(mode="before")(plain)  # NumPy's numbers

    selection: Literal["open", "sampled"] = "open"
    """Open: whoever checks in is selected, until the slots are taken. Sampled: the cohort is drawn
    among the enrolled devices as the simulation draws it, with as many slots as the goal."""
    goal: Annotated[int, Field(ge=1, le=10**6)] = 100
    """Reports at which a round is closed early."""
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
        """Those of an experiment's [server] section; the goal is its cohort if none is given."""
        section = experiment.server
        given = section.model_dump(exclude_none=True, exclude={"long_poll_seconds"})
        if section.selection == "sampled":
            return cls.sampled(experiment, **given)
        goal = cohort_size(experiment.partition.clients, experiment.run.cohort)
        return cls.model_validate({"goal": goal, "num_rounds": experiment.run.rounds} | given)

    def minimum_of(self, goal: int) -> int:
        """Reports that a round with this goal needs."""
        return max(math.ceil(goal * self.minimum - 1e-9), 1)

    @property
    def lease_ms(self) -> int:
        seconds = self.report_seconds if self.lease_seconds is None else self.lease_seconds
        return milliseconds(seconds)


@lru_cache(maxsize=64)
def settings_of(text: str) -> RoundSettings:
    """Those that a run was begun with, from the JSON in its row."""
    return RoundSettings.model_validate_json(text)


def milliseconds(seconds: float) -> int:
    """Whole milliseconds."""
    return round(seconds * 1000)
