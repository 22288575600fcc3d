"""A run as it is in the database, whichever version of Potluck began it.

The values of the row count, never a default of today: a key that the experiment file leaves out
keeps the value that the run was begun with. A key that the file gives must have the run's value, or
the one that the file gave at the beginning where `potluck set` changed it since.

Compatibility: an unknown key is left out where it decides nothing: if it has no value, or is one of
the settings. Any other is named, and the run is not served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection, Row, inspect, select

from potluck.config.experiment import Experiment
from potluck.config.round_settings import RoundSettings
from potluck.core import RefusedError, Spec
from potluck.core.plain_json import flat, to_json
from potluck.server.storage.database import one
from potluck.server.storage.database_tables import runs
from potluck.server.storage.vectors import read_spec

M = TypeVar("M", bound=BaseModel)

_SHOWN = 3
_FOLLOW = ("task.path", "server.num_rounds")
"""Keys that are not compared: the data may move, and the number of rounds is `run.rounds`."""
_FIXED = ("selection", "goal_part", "num_rounds", "needs_charging", "needs_idle", "needs_unmetered")
CHANGEABLE = {"run.rounds", "run.evaluate_every"} | {
    f"server.{name}" for name in RoundSettings.model_fields if name not in _FIXED
}
"""The keys that decide no numbers of a model, and are not in its signed plan: `potluck set` changes
them in a run."""


class StoredRun(NamedTuple):
    """A run that goes on, with its own values, and in words those that its file has others of."""

    experiment: Experiment
    settings: RoundSettings
    told: list[str]


def experiment_of(run: Row[Any]) -> Experiment:
    """Returns the experiment that a run was begun with.

    Raises:
        RefusedError: conflict: another version began it, with what this one does not have.
    """
    return _experiment(run.experiment)


@lru_cache(maxsize=8)
def _experiment(text: str) -> Experiment:
    return read_stored(Experiment, text)


def given_of(experiment: Experiment, settings: RoundSettings) -> dict[str, Any]:
    """Returns the keys that a file gives, with their values; `runs.begun` holds the first ones."""
    return _values(experiment, settings, exclude_unset=True)


def find(db: Connection, name: str) -> Row[Any] | None:
    """Returns the row of a run, in a schema of any version.

    Raises:
        RefusedError: conflict: of a version before the first that this one goes on with.
    """
    found = inspect(db)
    if not found.has_table("runs"):
        return None
    there = {column["name"] for column in found.get_columns("runs")}
    columns = [column for column in runs.c if column.name in there]
    if "plan" not in there:
        raise RefusedError(
            "conflict",
            "the database must be of a version that this one goes on with, got an older one, "
            "without its plans. Finish its run with that version.",
        )
    return one(db, select(*columns).where(runs.c.name == name))


def run_of(db: Connection, run: str) -> Row[Any]:
    """Returns the row of a run by its id.

    Raises:
        RefusedError: not_found.
    """
    row = one(db, select(runs).where(runs.c.id == run))
    if row is None:
        raise RefusedError("not_found", f"no such run: {run!r}.")
    return row


def kept(
    run: Row[Any], experiment: Experiment, settings: RoundSettings, spec: Spec | None = None
) -> StoredRun:
    """Returns the values with which a run that is served again goes on.

    Raises:
        RefusedError: conflict: with the keys that it was begun with other values of.
    """
    old, rules = experiment_of(run), settings_of(run.settings)
    begun: dict[str, Any] = json.loads(getattr(run, "begun", None) or "{}")
    was, now = _values(old, rules), _values(experiment, settings)
    given = given_of(experiment, settings)
    different: dict[str, str] = {}
    told: list[str] = []
    for key in [key for key in {**was, **now} if was.get(key) != now.get(key)]:
        here, there = _value_in_words(was.get(key)), _value_in_words(now.get(key))
        is_left_out = key not in given and (key not in begun or key in CHANGEABLE)
        if is_left_out or (key in begun and begun[key] == now.get(key)):
            told.append(f"{key} = {here} in the run, and not {there}")
        else:
            different[key] = f"{key} = {here} and not {there}"
    if spec is not None and spec != read_spec(run.spec):
        different["model"] = "a model of other shapes"
    if different:
        raise RefusedError("conflict", _in_words(run.name, different))
    task = old.task.model_copy(update={"path": experiment.task.path})
    changes = {"task": task, "server": experiment.server}
    return StoredRun(old.model_copy(update=changes), rules, told)


def _in_words(name: str, different: Mapping[str, str]) -> str:
    first = list(different.values())
    more = f", and {len(first) - _SHOWN} more" if len(first) > _SHOWN else ""
    change = "Change them in the run with `potluck set`" if different.keys() <= CHANGEABLE else ""
    return (
        f"the run {name!r} in this folder was begun with {', '.join(first[:_SHOWN])}{more}. "
        f"{change or 'Go on with the old values'}, give the experiment another name, or begin anew "
        "with --fresh."
    )


def _values(
    experiment: Experiment, settings: RoundSettings, *, exclude_unset: bool = False
) -> dict[str, Any]:
    """Returns keys and values, but for those that follow from others."""
    values = flat(experiment.model_dump(mode="json", exclude_unset=exclude_unset))
    values |= flat(settings.model_dump(mode="json", exclude_unset=exclude_unset), "server.")
    return {key: value for key, value in values.items() if key not in _FOLLOW}


def _value_in_words(value: Any) -> str:
    return "(left out)" if value is None else to_json(value)


@lru_cache(maxsize=64)
def settings_of(text: str) -> RoundSettings:
    """Returns the settings of a run, from the JSON in its row."""
    return read_stored(RoundSettings, text)


def read_stored(model: type[M], text: str) -> M:
    """Reads an object as it was stored by this version or another.

    An unknown key is left out where it decides no numbers of a model: where
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
    """Removes an unknown key, if it decides nothing."""
    if detail["type"] != "extra_forbidden" or (
        detail["input"] is not None and model is not RoundSettings
    ):
        return False
    *path, last = detail["loc"]
    for part in path:
        content = content.get(part, content)  # the name of a section stands in the path, too
    return content.pop(last, content) is not content
