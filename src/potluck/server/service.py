"""The server without its sockets: one object that any number of threads may use.

    service = Service.open("sqlite:///potluck.db", "blobs", build=build_algorithm)
    run = service.create_run(experiment, weights, spec, RoundSettings(goal=10, num_rounds=50))
    [token] = issue_tokens(service, run, actor="admin")
    ...                       # devices: enrol, check_ins, report, add_chunk, accept_batch
    service.tick()            # a few times a second, and after a report that reaches the goal

The rest are functions in modules by subject (`enrolment`, `check_in`, `uploads`, `inline_reports`,
`changes`, `mending`), whose first argument is the service, their `Context`. Everything that was
answered survives `kill -9`. A process that is started again with the same database and blobs goes
on by itself. Several processes may share both. One of them leads (`tick` returns whether it is this
one), and all of them serve devices.

After a `RefusedError` a device or an operator must do something else. After a `StorageError` the
same request may succeed later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import save
from sqlalchemy import Connection, Row, and_, insert, select

from potluck.algorithms import Algorithm, with_statistics
from potluck.config.experiment import Experiment
from potluck.config.round_settings import RoundSettings
from potluck.core import RefusedError, Spec, Vector
from potluck.core.errors import LostError
from potluck.core.plain_json import read_results, to_json
from potluck.server.rounds import bounds, enrolment, leaving, scoring, state_machine
from potluck.server.rounds import commit as commits
from potluck.server.rounds.coordinator import lead
from potluck.server.rounds.election import LEASE_SECONDS, Candidate, FencedError, follow
from potluck.server.rounds.state_machine import open_round_of
from potluck.server.storage import audit, fault_points
from potluck.server.storage.blobs import BlobStore, open_blobs
from potluck.server.storage.common_time import CommonTime, SystemTimeSource, TimeSource
from potluck.server.storage.context import Context
from potluck.server.storage.copy_database import upgrade
from potluck.server.storage.database import Database, as_dict, one
from potluck.server.storage.database_tables import devices, evaluations, ledger, models, runs
from potluck.server.storage.state_folder import FolderLock
from potluck.server.storage.stored_run import (
    StoredRun,
    experiment_of,
    find,
    given_of,
    kept,
    run_of,
    settings_of,
)
from potluck.server.storage.vectors import find_version, read_spec, tries, write_spec


class Service(Context):
    """An open server: its context, and this process's part in leading."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        build: Callable[[Experiment], Algorithm],
        clock: TimeSource,
        lease_seconds: float = LEASE_SECONDS,
        life: FolderLock | None = None,
    ) -> None:
        time = CommonTime(clock)
        names = {} if life is None else {"id": life.id, "predecessor": life.before}
        self._candidate = Candidate(time, lease_seconds, **names)
        super().__init__(
            database=database,
            blobs=blobs,
            time=time,
            now=time.now,
            check=self._candidate.check,
        )
        self._build = build
        self._algorithms: dict[tuple[str, str], Algorithm] = {}  # by a run's experiment and spec
        self._life = life
        self._lost: dict[str, set[int]] = {}  # run: versions that cannot be read
        self._evaluated: dict[str, int] = {}  # run: up to this version nothing is to be evaluated
        self._ticking = threading.Lock()

    @classmethod
    def open(
        cls,
        url: str,
        blobs: str,
        *,
        build: Callable[[Experiment], Algorithm],
        clock: TimeSource | None = None,
        lease_seconds: float = LEASE_SECONDS,
        life: FolderLock | None = None,
        check: Callable[[Connection], object] = lambda _: None,
        aside: Path | None = None,
    ) -> Service:
        """Opens, or begins, a server's state; older databases are brought up to date.

        Args:
            url: of the database, or the path of an SQLite file.
            blobs: a folder, or the URL of an object store.
            build: from an experiment to its algorithm (`build_algorithm` of `config`).
            life: this process's lock on its folder, released by `close`; the lead of the process
                before is taken over at once.
            check: is called with the database as it is; an error leaves it so.
            aside: the folder for a copy of a database that is brought up to date.
        """
        fault_points.arm()
        database = Database(url)
        try:
            with database.read() as db:
                check(db)
            upgrade(database, aside)
        except BaseException:
            database.close()
            raise
        clock = clock or SystemTimeSource()
        service = cls(database, open_blobs(blobs), build, clock, lease_seconds, life)
        follow(database, service.time)
        return service

    def close(self) -> None:
        """Lets another process lead at once, and closes the database."""
        with self._ticking:
            self._candidate.resign(self.database)
        self.database.close()
        if self._life is not None:
            self._life.close()

    # What an operator does.

    def create_run(
        self,
        experiment: Experiment,
        weights: Vector,
        spec: Spec,
        settings: RoundSettings,
        *,
        plan: Mapping[str, Any] | None = None,
        actor: str = "admin",
    ) -> str:
        """Begins a run from its initial weights, or finds the one that was begun. Returns its id.

        Args:
            plan: what devices do with the model, kept for `resume_run`.

        Raises:
            RefusedError: conflict: a run of this name has another experiment or other settings.
        """
        if len(weights) != spec.dim:
            raise ValueError(
                f"weights must have the length of the spec ({spec.dim}), got {len(weights)}. "
                "Take both from one model."
            )
        values = {
            "name": experiment.name,
            "experiment": experiment.model_dump_json(),
            "settings": settings.model_dump_json(),
            "spec": write_spec(spec),
            "plan": to_json(plan or {}),
            "begun": to_json(given_of(experiment, settings)),
        }
        with self.database.read() as db:
            old = find(db, experiment.name)
        if old is not None:
            kept(old, experiment, settings, spec)
            return str(old.id)
        fault_points.reach("run.before-model")
        state = with_statistics(self._build(experiment), spec).server_init(weights)
        made = commits.store_version(self.blobs, state)
        fault_points.reach("run.before-row")
        now = self.now()
        numbers = {"round": 0, "version": 0, "evaluated": 0, "attempt": 1, "strikes": 0}
        id = enrolment.new_id()
        with self.database.write() as db:
            place = {"id": id, "seed": experiment.run.seed, "created_ms": now}
            db.execute(
                insert(runs).values(values | numbers | place | {"state": "running", "reason": ""})
            )
            commits.insert_version(db, id, 0, 0, made, now)
            audit.append(db, now, actor, "create", run=id, name=experiment.name, model=made.sha256)
        fault_points.reach("run.after-row")
        return id

    def resume_run(
        self, experiment: Experiment, settings: RoundSettings
    ) -> tuple[Row[Any], StoredRun] | None:
        """Finds a run that was begun by its name alone, without data, model and PyTorch.

        Raises:
            RefusedError: conflict: it has another experiment or other settings.
        """
        with self.database.read() as db:
            old = find(db, experiment.name)
        return None if old is None else (old, kept(old, experiment, settings))

    def status(self, run: str) -> dict[str, Any]:
        """Returns a run in numbers, for people and for a dashboard."""
        with self.database.read() as db:
            row = run_of(db, run)
            current = open_round_of(db, run)
            counted = None if current is None else state_machine.count(db, current)._asdict()
            enrolled, left = leaving.counted(db, run)
            names = ("name", "state", "reason", "round", "version", "attempt")
            return {name: getattr(row, name) for name in names} | {
                "devices": enrolled,
                "left": left,
                "population": settings_of(row.settings).population,
                "open": None if current is None else as_dict(current) | (counted or {}),
                "is_leader": self.is_leader,
                "audit": audit.head(db),
                "alarms": bounds.count_alarms(db, run),
            }

    def devices(self, run: str) -> list[dict[str, Any]]:
        """Returns the devices of a run, in the order of their enrolment, without their keys."""
        names = ("id", "client", "name", "device_class", "sequence", "enrolled_ms")
        names += ("revoked_ms", "left", "lowered", "lowered_round", "lowered_share")
        query = select(*(devices.c[name] for name in names)).where(devices.c.run == run)
        with self.database.read() as db:
            return [as_dict(row) for row in db.execute(query.order_by(devices.c.client))]

    def history(self, run: str) -> list[dict[str, Any]]:
        """Returns the committed rounds, in order."""
        query = select(ledger).where(ledger.c.run == run)
        with self.database.read() as db:  # the evaluation of a round is after it
            rows = db.execute(query.order_by(ledger.c.number, ledger.c.kind.desc())).all()
        return [as_dict(row) for row in rows]

    def export(self, run: str, version: int | None = None, *, actor: str) -> bytes:
        """Returns a model version (the newest) as safetensors, with the names of the tensors."""
        with self.database.write() as db:
            row = run_of(db, run)
            number = row.version if version is None else version
            audit.append(db, self.now(), actor, "export", run=run, version=number)
        try:
            weights = commits.load_weights(self.blobs, find_version(self, run, number))
        except LostError as error:
            raise RefusedError("not_found", f"{error} Name another one with --version.") from error
        told = {"run": run, "name": row.name, "version": str(number)}
        return save(read_spec(row.spec).unflatten(weights), told)

    # What the server does by itself.

    def tick(self) -> bool:
        """Does all that is due, and nothing that is not, if this process leads.

        Returns whether this process leads.
        """
        return self.move() and self.sweep()

    def move(self) -> bool:
        """Does the part of a tick that devices wait for: rounds go on."""
        with self._ticking:
            if not self._candidate.beat(self.database):
                return False
            return self._lead(lambda: lead(self, self._algorithm, taken=self._candidate.taken))

    def _algorithm(self, run: Row[Any]) -> Algorithm:
        key = (run.experiment, run.spec)
        if key not in self._algorithms:
            made = self._build(experiment_of(run))
            self._algorithms[key] = with_statistics(made, read_spec(run.spec))
        return self._algorithms[key]

    def sweep(self) -> bool:
        """Does the other part of a tick, if this process leads: removes what is of no more use."""
        with self._ticking:
            return self.is_leader and self._lead(lambda: commits.sweep(self))

    def _lead(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except FencedError:
            self._candidate.fence = 0
            return False
        return True

    @property
    def is_leader(self) -> bool:
        """True if this process led at its last tick."""
        return self._candidate.fence > 0

    def pending_evaluations(self, run: str) -> list[tuple[int, int]]:
        """Returns (round, version) of rounds whose central evaluation is due and not done."""
        to = self._evaluated.get(run, -1)
        with self.database.read() as db:
            row = run_of(db, run)
            every, last = (
                experiment_of(row).run.evaluate_every,
                settings_of(row.settings).num_rounds,
            )
            here, due = models.c.round == evaluations.c.round, evaluations.c.kind == "central"
            query = (
                select(models.c.round, models.c.version)
                .outerjoin(evaluations, and_(here, due, evaluations.c.run == run))
                .where(models.c.run == run, models.c.version > to, evaluations.c.round.is_(None))
                .order_by(models.c.round, models.c.version)
            )
            made = {row.round: row.version for row in db.execute(query)}  # the newest of each
        pending = [
            (number, version)
            for number, version in made.items()
            if (number % every == 0 or number == last) and version not in self._lost.get(run, ())
        ]
        self._evaluated[run] = min((v - 1 for _, v in pending), default=row.version)
        return pending

    def evaluate(self, run: str, evaluate: Callable[[Vector], Mapping[str, float]]) -> None:
        """Does the central evaluations that are due, with a function from weights to metrics."""
        for number, version in self.pending_evaluations(run):
            row = find_version(self, run, version)
            try:
                weights = tries(partial(commits.load_weights, self.blobs, row))
            except LostError as error:
                self._note_lost(run, version, str(error))
                continue
            metrics = evaluate(weights)
            with self.database.write() as db:
                place = (evaluations.c.run == run) & (evaluations.c.round == number)
                central = evaluations.c.kind == "central"
                if one(db, select(evaluations.c.round).where(place & central)) is None:
                    now = self.now()
                    scoring.insert_evaluation(db, run, number, "central", metrics, now)

    def evaluations(self, run: str) -> list[dict[str, Any]]:
        """Returns the evaluations: round, kind, metrics."""
        query = select(evaluations).where(evaluations.c.run == run).order_by(evaluations.c.round)
        with self.database.read() as db:
            rows = db.execute(query.order_by(evaluations.c.kind)).all()
        told = ("metrics", "medians")
        return [
            as_dict(row) | {name: read_results(getattr(row, name) or "{}") for name in told}
            for row in rows
        ]

    def _note_lost(self, run: str, version: int, reason: str) -> None:
        """Skips the evaluation of a model that cannot be read, until the server is started
        again."""
        self._lost.setdefault(run, set()).add(version)
        with self.database.write() as db:
            told = {"version": version, "reason": reason}
            audit.append(db, self.now(), "leader", "lost", run=run, **told)
        self.on_lost()
