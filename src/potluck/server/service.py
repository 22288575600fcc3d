"""The server without its sockets: one object that any number of threads may use.

    service = Service.open("sqlite:///potluck.db", "blobs", build=build_algorithm)
    run = service.create_run(experiment, weights, spec, RoundSettings(goal=10, num_rounds=50))
    token = service.issue_token(run, actor="admin")
    ...                       # devices: enrol, check_in, begin_report, append_chunk, finish_report
    service.tick()            # a few times a second, and after a report that reaches the goal

Everything that a method has answered survives `kill -9`; a process that is started again with the
same database and blobs goes on by itself. Several processes may share both: one of them leads
(`tick` says whether it is this one), all of them serve devices.

Methods raise `RefusedError` where a device or an operator must do something else, and
`StorageError` where the same request may succeed later.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from safetensors.numpy import save
from sqlalchemy import Connection, Row, and_, insert, select, update

from potluck.algorithms import Algorithm, with_statistics
from potluck.config.experiment import Experiment
from potluck.config.round_settings import RoundSettings
from potluck.core import RefusedError, Spec, Vector
from potluck.core.errors import LostError
from potluck.core.plain_json import read_results, to_json
from potluck.server.rounds import (
    audit_check,
    bounds,
    enrolment,
    inline_reports,
    leases,
    leaving,
    mending,
    scoring,
    state_machine,
    uploads,
)
from potluck.server.rounds import changes as changing
from potluck.server.rounds import commit as commits
from potluck.server.rounds.check_in import (
    Asked,
    Assigned,
    Attributes,
    Finished,
    Given,
    Look,
    Wait,
    open_round_of,
)
from potluck.server.rounds.coordinator import lead
from potluck.server.rounds.election import LEASE_SECONDS, Candidate, FencedError, follow
from potluck.server.storage import audit, fault_points
from potluck.server.storage.blobs import BlobStore, open_blobs
from potluck.server.storage.common_time import Clock, CommonTime, SystemClock
from potluck.server.storage.copy_database import upgrade
from potluck.server.storage.database import Database, as_dict, one
from potluck.server.storage.database_tables import devices, evaluations, ledger, models, runs
from potluck.server.storage.database_tables import rounds as all_rounds
from potluck.server.storage.state_folder import Life
from potluck.server.storage.stored_run import experiment_of, find, given_of, kept, settings_of
from potluck.server.storage.vectors import read_spec, read_vector, tries, write_spec

_LOG = logging.getLogger("potluck.server")


class Begun(NamedTuple):
    """What a run that was begun brings along."""

    id: str
    spec: Spec
    plan: dict[str, Any]
    experiment: Experiment
    settings: RoundSettings
    kept: list[str]
    """Keys of which the run has other values than the file: each one in words."""


class Service:
    """An open server: a database, blobs, and this process's part in leading."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        build: Callable[[Experiment], Algorithm],
        clock: Clock,
        lease_seconds: float = LEASE_SECONDS,
        life: Life | None = None,
    ) -> None:
        self.database = database
        self.blobs = blobs
        self.time = CommonTime(clock)
        self.on_goal: Callable[[], None] = lambda: None
        """Called, in any thread, when the leader has something to do: `tick`."""
        self.on_open: Callable[[str], None] = lambda _: None
        """Called, in any thread, with the id of a round as soon as devices may come to it."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called, in any thread, when something that was stored cannot be read any more."""
        self._build = build
        self._life = life
        names = {} if life is None else {"id": life.id, "predecessor": life.before}
        self._candidate = Candidate(self.time, lease_seconds, **names)
        self._lost: dict[str, set[int]] = {}  # run: versions that cannot be read
        self._evaluated: dict[str, int] = {}  # run: up to this version nothing is to be evaluated
        self._ticking, self._guard = threading.Lock(), threading.Lock()
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._works = commits.Works(
            database=database,
            blobs=blobs,
            check=self._candidate.check,
            now=self.time.now,
            opened=lambda id: self.on_open(id),
            lost=lambda: self.on_lost(),
        )

    @classmethod
    def open(
        cls,
        url: str,
        blobs: str,
        *,
        build: Callable[[Experiment], Algorithm],
        clock: Clock | None = None,
        lease_seconds: float = LEASE_SECONDS,
        life: Life | None = None,
        look: Callable[[Connection], object] = lambda _: None,
        aside: Path | None = None,
    ) -> Service:
        """Open, or begin, a server's state; older databases are brought up to date.

        Args:
            url: of the database, or the path of an SQLite file.
            blobs: a folder, or the URL of an object store.
            build: from an experiment to its algorithm (`potluck.simulation.build_algorithm`).
            life: this process's hold on its folder, given up by `close`; what the life before it
                led is taken over at once.
            look: is shown the database as it is; what it raises leaves it so.
            aside: the folder for a copy of a database that is brought up to date.
        """
        fault_points.arm()
        database = Database(url)
        try:
            with database.read() as db:
                look(db)
            upgrade(database, aside)
        except BaseException:
            database.close()
            raise
        clock = clock or SystemClock()
        service = cls(database, open_blobs(blobs), build, clock, lease_seconds, life)
        follow(database, service.time)
        return service

    def close(self) -> None:
        """Let another process lead at once, and close the database."""
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
        """Begin a run from its initial weights, or find the one that was begun. Returns its id.

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
        now = self.time.now()
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

    def resume_run(self, experiment: Experiment, settings: RoundSettings) -> Begun | None:
        """A run that was begun, by its name alone: it takes no data, no model and no PyTorch.

        Raises:
            RefusedError: conflict: it has another experiment or other settings.
        """
        with self.database.read() as db:
            old = find(db, experiment.name)
        if old is None:
            return None
        found = kept(old, experiment, settings)
        return Begun(str(old.id), read_spec(old.spec), json.loads(old.plan), *found)

    def issue_token(self, run: str, *, valid_seconds: float = 7 * 86400, actor: str) -> str:
        """A token with which one device can enrol."""
        return enrolment.issue_token(
            self.database, run, self.time.now(), valid_seconds=valid_seconds, actor=actor
        )

    def issue_tokens(
        self, run: str, count: int, *, valid_seconds: float = 7 * 86400, actor: str
    ) -> list[str]:
        """Many tokens at once."""
        return enrolment.issue_tokens(
            self.database, run, count, self.time.now(), valid_seconds=valid_seconds, actor=actor
        )

    def revoke(self, device: str, *, actor: str) -> None:
        """Throw a device out, for good."""
        enrolment.revoke(self.database, device, self.time.now(), actor=actor)

    def pause(self, run: str, reason: str, *, actor: str) -> None:
        """Begin no round and select no device until `resume`; devices at work may finish."""
        self._turn(run, "running", "paused", reason, actor, "pause")

    def abandon(self, run: str, reason: str, *, actor: str) -> None:
        """End the open attempt; the same round is tried again."""
        mending.abandon(self.database, run, reason, self.time.now(), actor=actor)

    def fall_back(self, run: str, version: int | None = None, *, actor: str) -> tuple[int, int]:
        """Go on with an older model, where the newest is lost: which, and its new version."""
        now = self.time.now()
        return mending.fall_back(self.database, self.blobs, run, now, version=version, actor=actor)

    def resume(self, run: str, *, actor: str) -> None:
        """Go on with a paused run."""
        self._turn(run, "paused", "running", "", actor, "resume")

    def begin_epoch(self, run: str, *, actor: str) -> None:
        """Go on after a restore from a backup."""
        changing.begin_epoch(self.database, run, self.time.now(), actor=actor)

    def change(self, run: str, changes: Mapping[str, Any], *, actor: str) -> dict[str, list[Any]]:
        """Change what decides no numbers; for each key its old and its new value."""
        return changing.change(self.database, run, changes, self.time.now(), actor=actor)

    def status(self, run: str) -> dict[str, Any]:
        """A run in numbers, for people and for a dashboard."""
        with self.database.read() as db:
            row = self._run(db, run)
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
        """The devices of a run, in the order of their enrolment, without their keys."""
        names = ("id", "client", "name", "device_class", "sequence", "enrolled_ms")
        names += ("revoked_ms", "left", "lowered", "lowered_round", "lowered_share")
        query = select(*(devices.c[name] for name in names)).where(devices.c.run == run)
        with self.database.read() as db:
            return [as_dict(row) for row in db.execute(query.order_by(devices.c.client))]

    def lowered(self, run: str) -> list[dict[str, Any]]:
        """The devices whose reports counted for less than they asked for."""
        with self.database.read() as db:
            return bounds.read_lowered(db, run)

    def find_run(self, name: str) -> str | None:
        """The id of the run with this name, if it was begun."""
        with self.database.read() as db:
            row = one(db, select(runs.c.id).where(runs.c.name == name))
        return None if row is None else str(row.id)

    def history(self, run: str) -> list[dict[str, Any]]:
        """The committed rounds, in order."""
        query = select(ledger).where(ledger.c.run == run)
        with self.database.read() as db:  # the evaluation of a round is after it
            rows = db.execute(query.order_by(ledger.c.number, ledger.c.kind.desc())).all()
        return [as_dict(row) for row in rows]

    def export(self, run: str, version: int | None = None, *, actor: str) -> bytes:
        """A model version (the newest) as safetensors, with the names of the model's tensors."""
        with self.database.write() as db:
            row = self._run(db, run)
            number = row.version if version is None else version
            audit.append(db, self.time.now(), actor, "export", run=run, version=number)
        try:
            weights = commits.load_weights(self.blobs, self._version(run, number))
        except LostError as error:
            raise RefusedError("unknown", f"{error} Name another one with --version.") from error
        told = {"run": run, "name": row.name, "version": str(number)}
        return save(read_spec(row.spec).unflatten(weights), told)

    def verify_audit(self, since: str | None = None) -> audit.Break | None:
        """Read the audit log, and the tables; None when nothing in them was changed, and the log
        goes on from the hash `since`."""
        return audit_check.check(self.database, self.blobs, since)

    def audit_head(self) -> tuple[int, str]:
        """How many rows the audit log has, and the hash of the last."""
        with self.database.read() as db:
            return audit.head(db)

    # What a device does.

    def check_token(self, token: str, public_key: bytes, *, into: str) -> None:
        """Refuse what this key could not enrol in a run with."""
        enrolment.check_token(self.database, token, public_key, self.time.now(), into=into)

    def newest(self, run: str) -> tuple[Row[Any], Row[Any]]:
        """A run, and the model version after its last committed round."""
        with self.database.read() as db:
            row = self._run(db, run)
        return row, self._version(run, row.version)

    def enrol(
        self,
        token: str,
        public_key: bytes,
        *,
        name: str = "",
        device_class: str = "",
        into: str | None = None,
    ) -> enrolment.Enrolled:
        """Take in a device, once for every token."""
        return enrolment.enrol(
            self.database,
            token,
            public_key,
            self.time.now(),
            name=name,
            device_class=device_class,
            into=into,
        )

    def claim_sequences(self, claims: Sequence[tuple[str, int]]) -> list[RefusedError | None]:
        """Note many (device, sequence number) at once: for each one None, or why not."""
        return enrolment.claim_sequences(self.database, claims, self.time.now())

    def claim_sequence(self, device: str, sequence: int) -> None:
        """Note the sequence number of a signed request, or refuse a replay."""
        enrolment.claim_sequence(self.database, device, sequence, self.time.now())

    def device(self, device: str) -> Row[Any]:
        """A device that may take part: its key, sequence number, run and client index."""
        with self.database.read() as db:
            return leases.find_device(db, device)[0]

    def device_key(self, device: str) -> Row[Any] | None:
        """A device's key, sequence number and run; None if it may not take part."""
        query = select(devices).where(devices.c.id == device, devices.c.revoked_ms.is_(None))
        with self.database.read() as db:
            return one(db, query)

    def assignment(self, device: str, assignment: str) -> Row[Any]:
        """A device's assignment, over or not: kind, number and attempt of its round."""
        with self.database.read() as db:
            return leases.known_assignment(db, device, assignment)

    def come_back(self, device: str) -> float:
        """Seconds after which a device that is done should check in."""
        return leases.come_back(self.database, device, self.time.now())

    def check_in(
        self, device: str, attributes: Attributes | None = None
    ) -> Assigned | Wait | Finished:
        """Work, a time to come back, or the end."""
        shown = attributes or Attributes()
        return leases.check_in(self.database, device, shown, self.time.now())

    def check_ins(self, asked: Sequence[Asked]) -> list[Given | None]:
        """Many check-ins at once: for each what it is given, or why it is refused; None where only
        the number of its request was to be noted."""
        return leases.check_ins(self.database, asked, self.time.now())

    def extend_lease(self, device: str, assignment: str) -> float:
        """Note progress. Returns the seconds until the device must be heard of again."""
        return leases.extend_lease(self.database, device, assignment, self.time.now())

    def fail(self, device: str, assignment: str, reason: str) -> None:
        """A device cannot do its work."""
        if reason == "manifest_rollback":
            _LOG.warning(
                "a device has seen a newer model than this server has. If the server was restored "
                "from a backup, start it with --restored",
                extra={"device": device},
            )
        leases.fail(self.database, device, assignment, reason, self.time.now())
        if reason == "model_digest":
            self._suspect(self.device(device).run)

    def begin_report(
        self, device: str, assignment: str, claims: uploads.Claims
    ) -> uploads.Upload | uploads.Accepted:
        """Announce an update."""
        return uploads.begin_report(self.database, self.blobs, device, assignment, claims)

    def find_report(
        self, device: str, upload: str
    ) -> tuple[uploads.Upload | uploads.Accepted, int]:
        """Where an upload stands, and how many bytes it will have."""
        return uploads.find_report(self.database, self.blobs, device, upload)

    def append_chunk(
        self, device: str, upload: str, offset: int, data: bytes | bytearray
    ) -> uploads.Upload:
        """Send a chunk of it."""
        return uploads.append_chunk(
            self.database, self.blobs, device, upload, offset, data, self.time.now()
        )

    def finish_report(self, device: str, upload: str) -> uploads.Accepted:
        """Have it checked and accepted; who repeats a request waits for the one that is at it."""
        with self._guard:
            turn = self._turns.setdefault(upload, threading.Lock())
        with turn:
            now = self.time.now()
            answer = uploads.finish_report(self.database, self.blobs, device, upload, now)
        return self._accepted(answer)

    def take_in(self, arrived: Sequence[inline_reports.Arrival]) -> list[inline_reports.Outcome]:
        """Reports that bring their updates with them, many at once."""
        outcomes = inline_reports.take_in(self.database, arrived, self.time.now())
        if any(
            isinstance(outcome, inline_reports.Taken) and outcome.is_goal for outcome in outcomes
        ):
            self.on_goal()
        return outcomes

    def report_metrics(
        self, device: str, assignment: str, metrics: Mapping[str, tuple[float, float]]
    ) -> uploads.Accepted:
        """Report a federated evaluation."""
        now = self.time.now()
        return self._accepted(
            uploads.report_metrics(self.database, device, assignment, metrics, now)
        )

    def after_report(self, device: str, round: str) -> tuple[int, int, float]:
        """Number and attempt of a reported round, and after how many seconds to check in."""
        query = select(all_rounds.c.number, all_rounds.c.attempt).where(all_rounds.c.id == round)
        with self.database.read() as db:
            number, attempt = db.execute(query).one()
            look = Look(db, [device], self.time.now())
            return number, attempt, look.retry_after(device)

    def find_model(self, run: str, sha256: str) -> Row[Any]:
        """The model of a run with this digest: num_bytes, and its key or content."""
        query = select(models).where(models.c.run == run, models.c.sha256 == sha256).limit(1)
        with self.database.read() as db:
            row = one(db, query)
        if row is None:
            raise RefusedError("unknown", f"no such model: sha256={sha256!r}.")
        return row

    def model(self, run: str, version: int) -> Row[Any]:
        """A model version: digest, key, num_bytes."""
        return self._version(run, version)

    def read_model(
        self, run: str, version: int, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]:
        """The bytes [start, stop) of a version's weights, little-endian float32, in pieces."""
        return self.pieces(run, self._version(run, version), start, stop)

    def pieces(
        self, run: str, model: Row[Any], start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]:
        """The same, of a model that was found; where it is lost, the leader looks at it, too."""
        try:
            yield from read_vector(self.blobs, model, start, stop)
        except LostError:
            self._suspect(run)
            raise

    def _suspect(self, run: str) -> None:
        self._works.suspects.add(run)
        self.on_goal()

    # What the server does by itself.

    def tick(self) -> bool:
        """Lead, if it is ours to: do all that is due, and nothing that is not.

        Returns whether this process leads.
        """
        return self.move() and self.sweep()

    def move(self) -> bool:
        """The part of a tick that devices wait for: rounds go on."""
        with self._ticking:
            if not self._candidate.beat(self.database):
                return False
            return self._lead(lambda: lead(self._works, self._build, taken=self._candidate.taken))

    def sweep(self) -> bool:
        """The other part, by whoever leads: what is of no more use is removed."""
        with self._ticking:
            return self.is_leader and self._lead(lambda: commits.sweep(self._works))

    def _lead(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except FencedError:
            self._candidate.fence = 0
            return False
        return True

    @property
    def is_leader(self) -> bool:
        """Whether this process led at its last tick."""
        return self._candidate.fence > 0

    def pending_evaluations(self, run: str) -> list[tuple[int, int]]:
        """(round, version) of the rounds whose central evaluation is due and not done."""
        to = self._evaluated.get(run, -1)
        with self.database.read() as db:
            row = self._run(db, run)
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
        """Do the central evaluations that are due, with a function from weights to metrics."""
        for number, version in self.pending_evaluations(run):
            row = self._version(run, version)
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
                    now = self.time.now()
                    scoring.insert_evaluation(db, run, number, "central", metrics, now)

    def evaluations(self, run: str) -> list[dict[str, Any]]:
        """What was evaluated: round, kind, metrics."""
        query = select(evaluations).where(evaluations.c.run == run).order_by(evaluations.c.round)
        with self.database.read() as db:
            rows = db.execute(query.order_by(evaluations.c.kind)).all()
        told = ("metrics", "medians")
        return [
            as_dict(row) | {name: read_results(getattr(row, name) or "{}") for name in told}
            for row in rows
        ]

    def _note_lost(self, run: str, version: int, reason: str) -> None:
        """A model that cannot be read is not evaluated, until the server is started again."""
        self._lost.setdefault(run, set()).add(version)
        with self.database.write() as db:
            told = {"version": version, "reason": reason}
            audit.append(db, self.time.now(), "leader", "lost", run=run, **told)
        self.on_lost()

    def _accepted(self, answer: uploads.Accepted) -> uploads.Accepted:
        if answer.is_goal:
            self.on_goal()
        return answer

    def _turn(self, run: str, old: str, new: str, reason: str, actor: str, action: str) -> None:
        with self.database.write() as db:
            row = self._run(db, run)
            here = (runs.c.id == run) & (runs.c.state == old)
            changes = {"state": new, "reason": reason, "strikes": 0}
            if db.execute(update(runs).where(here).values(changes)).rowcount == 0:
                raise RefusedError("conflict", f"the run must be {old}, it is {row.state}.")
            audit.append(db, self.time.now(), actor, action, run=run, reason=reason)

    def _version(self, run: str, version: int) -> Row[Any]:
        query = select(models).where(models.c.run == run, models.c.version == version)
        with self.database.read() as db:
            row = one(db, query)
        if row is None:
            raise RefusedError(
                "unknown",
                f"no such model: run={run!r}, version={version}. `potluck status` shows the last.",
            )
        return row

    @staticmethod
    def _run(db: Any, run: str) -> Row[Any]:
        row = one(db, select(runs).where(runs.c.id == run))
        if row is None:
            raise RefusedError("unknown", f"no such run: {run!r}.")
        return row
