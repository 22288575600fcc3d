"""Opens a server for an experiment, whose run is begun, or goes on from the database."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection

from potluck.config.algorithm_section import build_algorithm
from potluck.config.experiment import Experiment, load_experiment
from potluck.config.plan import Need
from potluck.config.round_settings import RoundSettings
from potluck.core import ConfigError
from potluck.server.evaluator import (
    Beginning,
    EvaluatorProcess,
    RunEvaluator,
    evaluator_of,
    is_evaluated,
)
from potluck.server.http.handlers import ServedRun
from potluck.server.http.listening import Listen
from potluck.server.process import Server
from potluck.server.rounds.changes import begin_epoch
from potluck.server.service import Service
from potluck.server.storage.state_folder import StateFolder
from potluck.server.storage.stored_run import find, kept
from potluck.server.storage.vectors import read_spec

_NEEDS: tuple[Need, ...] = ("charging", "idle", "unmetered")


def open_server(
    file: Path,
    overrides: list[str],
    folder: Path,
    listen: Listen,
    database: str | None = None,
    blobs: str | None = None,
    show: Callable[[str], None] | None = None,
    *,
    restored: bool = False,
) -> Server:
    """Returns a server for an experiment file, bound to its sockets.

    Args:
        folder: the server's own.
        database, blobs: instead of those in the folder.
        show: is given a line for a person about each round.
        restored: the state comes from a backup; devices take its older models.
    """
    experiment, home = load_experiment(file, overrides), StateFolder(folder)
    settings = RoundSettings.served(experiment)
    asked: list[RunEvaluator | EvaluatorProcess] = []

    def begin() -> Beginning:
        if restored:
            raise ConfigError(
                f"--restored goes on with a run that was begun, got none named {experiment.name!r} "
                "there. Restore it first, or leave out --restored."
            )
        asked.append(evaluator_of(experiment))
        needs: tuple[Need, ...] = tuple(
            need for need in _NEEDS if getattr(settings, f"needs_{need}")
        )
        return asked[0].begin(needs)

    served = open_run(experiment, settings, home, begin, database=database, blobs=blobs)
    try:
        if restored:
            begin_epoch(served.service, served.id, actor="admin")
        evaluator = (
            asked[0] if asked else evaluator_of(served.experiment)
        )  # the first has loaded the data
        evaluate = evaluator.evaluate if is_evaluated(experiment) else None
        seconds = experiment.server.long_poll_seconds
        return Server(served, home, listen, seconds, evaluate, evaluator.cancel, show)
    except BaseException:
        served.service.close()
        raise


def open_run(
    experiment: Experiment,
    settings: RoundSettings,
    home: StateFolder,
    begin: Callable[[], Beginning],
    *,
    database: str | None = None,
    blobs: str | None = None,
) -> ServedRun:
    """Goes on with the run of an experiment, without its data and so at once, or begins it.

    Args:
        begin: loads data and model, where there is no run of this name.
    """
    service = _open_service(experiment, settings, home, database, blobs)
    try:
        found = service.resume_run(experiment, settings)
        if found is None:
            weights, spec, plan = begin()
            home.run_key(experiment.name, is_new=True)
            service.create_run(experiment, weights, spec, settings, plan=plan)
            found = service.resume_run(experiment, settings)
            assert found is not None
        run, values = found
        return ServedRun(
            service=service,
            id=run.id,
            key=home.run_key(experiment.name, is_new=False),
            spec=read_spec(run.spec),
            plan=json.loads(run.plan),
            experiment=values.experiment,
            settings=values.settings,
            kept=values.told,
        )
    except BaseException:
        service.close()
        raise


def _open_service(
    experiment: Experiment,
    settings: RoundSettings,
    home: StateFolder,
    database: str | None,
    blobs: str | None,
) -> Service:
    algorithm = build_algorithm(experiment)
    if algorithm.vectors != 1 or algorithm.client_vectors != 0:
        raise ConfigError(
            "algorithm.name must be one whose clients keep nothing and send one vector, "
            f"got algorithm.name = {experiment.algorithm.name!r}. Use 'fedavg' or 'fedprox'."
        )
    if len(experiment.name) > 64:
        raise ConfigError(f"name must have at most 64 characters, got {len(experiment.name)}.")

    def check(db: Connection) -> None:
        """Refuses what cannot go on, while the database is as it was."""
        run = find(db, experiment.name)
        if run is not None:
            kept(run, experiment, settings)
            home.run_key(experiment.name, is_new=False)

    life = home.begin()
    try:
        return Service.open(
            database or home.database,
            blobs or home.blobs,
            build=build_algorithm,
            life=life,
            check=check,
            aside=home.folder,
        )
    except BaseException:
        life.close()
        raise
