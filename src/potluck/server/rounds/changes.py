"""An operator's changes of a run that goes on: keys that decide no numbers, and its epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy import update

from potluck.config.experiment import RunSection
from potluck.config.round_settings import RoundSettings
from potluck.core import RefusedError
from potluck.core.plain_json import to_json
from potluck.server.rounds.state_machine import abandon_round, lock_run, open_round_of, rearm
from potluck.server.storage import audit
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import runs
from potluck.server.storage.stored_run import CHANGEABLE


def change(
    context: Context, run: str, changes: Mapping[str, Any], *, actor: str
) -> dict[str, list[Any]]:
    """Changes keys in a run, and returns the old and the new value of each.

    The open round keeps its goal, and its deadlines where they are not further away than the new
    ones. More rounds begin a run again that was finished.

    Raises:
        RefusedError: malformed: a key that decides numbers of a model, or a value out of range.
    """
    checked = {_key(name): value for name, value in changes.items()}
    done: dict[str, list[Any]] = {}
    now = context.now()
    with context.database.write() as db:
        row = lock_run(db, run)
        rules, experiment = json.loads(row.settings), json.loads(row.experiment)
        begun = json.loads(row.begun or "{}")
        for key, value in checked.items():
            section, _, name = key.partition(".")
            _check(section, name, value)
            content = rules if section == "server" else experiment[section]
            done[key] = [content.get(name), value]
            begun.setdefault(key, content.get(name))
            content[name] = value
        if "server.goal" in done:
            rules["goal_part"] = None  # now a count, and not a part of the devices
        state = row.state
        if "run.rounds" in done:
            rules["num_rounds"] = experiment["run"]["rounds"]
            if state == "finished" and rules["num_rounds"] > row.round:
                state = "running"
        values = {"settings": rules, "experiment": experiment, "begun": begun}
        texts = {name: to_json(value) for name, value in values.items()}
        db.execute(update(runs).where(runs.c.id == run).values(texts | {"state": state}))
        rearm(db, now)
        audit.append(db, now, actor, "set", run=run, changes=done)
    return done


def pause(context: Context, run: str, reason: str, *, actor: str) -> None:
    """Begins no round and select no device until `resume`; devices at work may finish."""
    _turn(context, run, "running", "paused", reason, actor, "pause")


def resume(context: Context, run: str, *, actor: str) -> None:
    """Goes on with a paused run."""
    _turn(context, run, "paused", "running", "", actor, "resume")


def _turn(
    context: Context, run: str, old: str, new: str, reason: str, actor: str, action: str
) -> None:
    with context.database.write() as db:
        row = lock_run(db, run)
        if row.state != old:
            raise RefusedError("conflict", f"the run must be {old}, it is {row.state}.")
        values = {"state": new, "reason": reason, "strikes": 0}
        db.execute(update(runs).where(runs.c.id == run).values(values))
        audit.append(db, context.now(), actor, action, run=run, reason=reason)


def begin_epoch(context: Context, run: str, *, actor: str) -> None:
    """Goes on after a restore: from here on devices accept older models than they have seen.

    The number follows the clock, so that it is a new one however often a backup is restored. The
    open round is given up: its devices work on a round that this database does not have.
    """
    now = context.now()
    with context.database.write() as db:
        row = lock_run(db, run)
        current = open_round_of(db, run, lock=True)
        if current is not None:
            abandon_round(db, row, current, "the server was restored", now, excused=True)
        epoch = max(row.epoch + 1, now // 1000)
        db.execute(update(runs).where(runs.c.id == run).values(epoch=epoch))
        audit.append(db, now, actor, "restored", run=run, epoch=epoch)


def _key(name: str) -> str:
    """Returns a key that may be changed; its section may be left out."""
    for key in (name, f"server.{name}", f"run.{name}"):
        if key in CHANGEABLE:
            return key
    raise RefusedError(
        "malformed",
        f"a key to set must be one that decides no numbers of the model, got {name!r:.80}. Set one "
        f"of {', '.join(sorted(CHANGEABLE))}; for another value of {name:.80} begin another run.",
    )


def _check(section: str, name: str, value: Any) -> None:
    try:
        if section == "server":
            RoundSettings.model_validate({"num_rounds": 1, name: value})
        else:
            RunSection.model_validate({"rounds": 1, name: value})
    except ValidationError as error:
        told = f"{section}.{name} must be right, got {value!r:.80}: {error.errors()[0]['msg']}"
        raise RefusedError("malformed", f"{told}. Nothing was changed.") from None
