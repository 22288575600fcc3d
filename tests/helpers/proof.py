"""Whether a run that was disturbed has every acknowledged report, once, and nobody else's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sqlalchemy import select

from fleet import Clock, fingerprint
from messages import arrival
from potluck.config.algorithm_section import build_algorithm
from potluck.config.experiment import Experiment
from potluck.core import Spec
from potluck.protocol import Accepted, Eligibility
from potluck.server import RoundSettings, Service
from potluck.server.rounds.check_in import Assigned, CheckInRequest, check_ins
from potluck.server.rounds.commit import load_version
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.rounds.inline_reports import accept_batch
from potluck.server.rounds.mending import fall_back
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import (
    audit,
    devices,
    ledger,
    models,
    reports,
    rounds,
    runs,
)


class Proof(NamedTuple):
    """What was counted."""

    committed: int
    abandoned: int
    reports: int
    lost: int  # acknowledged to a device, and not stored
    double: int  # of one device in one attempt of a round
    foreign: int  # stored, and never acknowledged to its device
    differing: int  # models that an undisturbed run over the same accepted sets does not have

    @property
    def holds(self) -> bool:
        return not (self.lost or self.double or self.foreign or self.differing)


def prove(
    url: str,
    blobs: str,
    acknowledged: Mapping[str, list[tuple[int, int]]],
    folder: Path,
    sent: Mapping[int, tuple[np.ndarray, float]] | None = None,
) -> Proof:
    """Compare what devices were told with what is stored, and the models with a run in `folder`.

    Nobody serves the database any more. `sent` has vector and weight of clients that send others.
    """
    service = Service.open(url, blobs, build=build_algorithm)
    with service.database.read() as db:
        run = db.execute(select(runs)).one()
        columns = (reports.c.device, rounds.c.number, rounds.c.attempt)
        training = rounds.c.kind == "train"
        joined = select(*columns).join(rounds, rounds.c.id == reports.c.round).where(training)
        stored = [tuple(row) for row in db.execute(joined)]
        states = list(db.scalars(select(rounds.c.state).where(training)))
        count = len(db.execute(select(devices.c.id)).all())
        kept = select(ledger, reports.c.client, rounds.c.version.label("base"))
        kept = kept.join(reports, reports.c.round == ledger.c.round)
        kept = kept.join(rounds, rounds.c.id == ledger.c.round)
        committed: dict[int, tuple[str, str, set[int], int]] = {}
        for row in db.execute(kept.where(ledger.c.kind == "train")):
            place = committed.setdefault(
                row.number, (row.model_sha256, row.accepted_sha256, set(), row.base)
            )
            place[2].add(row.client)
        falls = db.scalars(select(audit.c.detail).where(audit.c.action == "fall back"))
        fallen = [(one["version"], one["of"]) for one in map(json.loads, falls)]
        base = load_version(
            service.blobs, db.execute(select(models).where(models.c.version == 0)).one()
        )
    service.close()
    told = {(device, *place) for device, places in acknowledged.items() for place in places}
    assert sorted(committed) == list(range(1, states.count("COMMITTED") + 1))
    return Proof(
        committed=len(committed),
        abandoned=states.count("ABANDONED"),
        reports=len(stored),
        lost=len(told - set(stored)),
        double=len(stored) - len(set(stored)),
        foreign=len(set(stored) - told),
        differing=_replayed(run, base.weights, committed, count, folder, sent or {}, fallen),
    )


def stored_reports(url: str) -> set[tuple[str, tuple[int, int]]]:
    """(device, (round, attempt)) of the reports of training that a database has."""
    database = Database(url)
    columns = (reports.c.device, rounds.c.number, rounds.c.attempt)
    joined = select(*columns).join(rounds, rounds.c.id == reports.c.round)
    with database.read() as db:
        found = {(d, (n, a)) for d, n, a in db.execute(joined.where(rounds.c.kind == "train"))}
    database.close()
    return found


def _replayed(run, weights, committed, count: int, folder: Path, sent, fallen) -> int:
    """Do the run again without disturbance; how many of its models are others."""
    experiment = Experiment.model_validate_json(run.experiment)
    settings = RoundSettings.model_validate_json(run.settings)
    changes = {"population": count, "lease_seconds": None, "federated_every": 0}
    settings = settings.model_copy(update=changes)
    spec = Spec(*zip(*((n, tuple(shape)) for n, shape in json.loads(run.spec)), strict=True))
    clock = Clock()
    folder.mkdir(parents=True)
    service = Service.open(
        str(folder / "db"), str(folder / "blobs"), build=build_algorithm, clock=clock
    )
    id = service.create_run(experiment, weights, spec, settings)
    names, back = [], sorted(fallen)
    for i in range(count):
        key = i.to_bytes(2, "little") * 16
        names.append(enrol(service, issue_tokens(service, id, actor="proof")[0], key).id)
    for number in sorted(committed):
        while back and back[0][0] <= committed[number][3]:
            fall_back(service, id, version=back.pop(0)[1], actor="proof")
        service.tick()
        told = {
            names[client]: sent.get(client) or (fingerprint(client, spec.dim), 1.0)
            for client in sorted(committed[number][2])
        }
        _take_part(service, number, told)
        for seconds in (0, settings.selection_seconds, settings.report_seconds):
            clock.pass_(seconds)  # where fewer than the goal reported, until the deadline
            service.tick()
    differing = 0
    history = {row["number"]: row for row in service.history(id)}
    for number, (model, accepted, *_) in committed.items():
        row = history.get(number, {})
        differing += (row.get("model_sha256"), row.get("accepted_sha256")) != (model, accepted)
    service.close()
    shutil.rmtree(folder)
    return differing


def _take_part(service: Service, number: int, told) -> None:
    """The reports of a round, all in one transaction: device → (vector, weight)."""
    given = check_ins(service, [CheckInRequest(device, Eligibility()) for device in told])
    came = []
    for work, (device, (vector, weight)) in zip(given, told.items(), strict=True):
        assert isinstance(work, Assigned), work
        said = {"sequence": number, "weight": weight}
        came.append(arrival(service, device, work.assignment, vector, **said))
    outcomes = accept_batch(service, came, "float32")
    assert all(isinstance(one, Accepted) for one in outcomes), outcomes
