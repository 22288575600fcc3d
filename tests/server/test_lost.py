"""Whatever is stored is removed, cut short or changed, at any moment: the run goes on.

At most the commands are given that the run's own message names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import obstore
import pytest
from safetensors.numpy import load
from sqlalchemy import select, update
from typer.testing import CliRunner

from fleet import Fleet
from messages import arrival, begin, check_in, claims, read_version
from potluck.cli.main import app
from potluck.core import RefusedError, StorageError
from potluck.core.errors import LostError
from potluck.protocol import Accepted
from potluck.server.rounds import audit_check
from potluck.server.rounds.changes import pause, resume
from potluck.server.rounds.check_in import Assigned
from potluck.server.rounds.inline_reports import accept_batch
from potluck.server.rounds.leases import fail
from potluck.server.rounds.mending import abandon, fall_back
from potluck.server.rounds.uploads import append_chunk, finish_report
from potluck.server.storage.blobs import FolderStore
from potluck.server.storage.database_tables import assignments, audit, ledger, models, reports
from potluck.server.storage.object_store import ObjectStore
from potluck.server.storage.vectors import find_version
from remote import Served

KINDS = ("update", "update in its row", "model", "model in its row", "optimizer", "part")
DAMAGES = {
    "removed": lambda body: None,
    "short": lambda body: body[: len(body) // 2],
    "flipped": lambda body: body[:-1] + bytes([body[-1] ^ 64]),
    "long": lambda body: body + b"\0" * 8,
}
MOMENTS = ("between rounds", "at work", "sending", "reported", "committed")
WIDE = 9_000  # floats: too large for a row


def in_row(kind: str) -> bool:
    return kind.endswith("row")


def damage_blob(fleet: Fleet, key: str, damage) -> None:
    blobs = fleet.service.blobs
    if isinstance(blobs, ObjectStore):
        body = damage(bytes(obstore.get(blobs._store, key).bytes()))
        obstore.delete(blobs._store, key)
        if body is not None:
            obstore.put(blobs._store, key, body)
        return
    path = Path(fleet.blobs) / key
    body = damage(path.read_bytes())
    path.unlink()  # not the file that a link elsewhere is of
    if body is not None:
        path.write_bytes(body)


def damage_row(fleet: Fleet, table, damage) -> None:
    with fleet.service.database.write() as db:
        order = table.c.version.desc() if table is models else table.c.client
        row = db.execute(select(table).where(table.c.content.is_not(None)).order_by(order)).first()
        if row is not None:
            here = table.primary_key.columns
            same = [column == getattr(row, column.name) for column in here]
            body = damage(bytes(row.content))
            db.execute(update(table).where(*same).values(content=body))


def spoil(fleet: Fleet, kind: str, damage) -> None:
    """Damage what there is of a kind now: the newest model, the first update."""
    if in_row(kind):
        damage_row(fleet, models if "model" in kind else reports, damage)
        return
    prefix = {"update": "reports/", "part": "parts/"}.get(kind)
    if prefix is not None:
        keys = sorted(key for key in fleet.stored() if key.startswith(prefix))
    else:
        newest = find_version(fleet.service, fleet.run, fleet.status()["version"])
        keys = [newest.key if kind == "model" else newest.optimizer_key]
    for key in keys[:1]:
        damage_blob(fleet, key, damage)


class Line:
    """Devices that do their part however the server answers."""

    def __init__(self, fleet: Fleet, kind: str) -> None:
        self.fleet, self.inside = fleet, in_row(kind)

    def fetch(self, device: str):
        """The device's work, if it has some and could receive the model."""
        service = self.fleet.service
        work = check_in(service, device)
        if not isinstance(work, Assigned):
            return None
        try:
            body = work.model or b"".join(read_version(service, self.fleet.run, work.version))
        except StorageError:
            return None  # it asks again, until the round is over
        if hashlib.sha256(body).hexdigest() != work.model_sha256:
            fail(service, device, work.assignment, "model_digest")
            return None
        return work

    def begin(self, device: str, work) -> str | None:
        """Send half of an update."""
        found = claims(self.fleet.vector(device))
        if self.inside:
            return None
        upload = begin(self.fleet.service, device, work.assignment, found).upload
        body = self.fleet.vector(device).tobytes()
        append_chunk(self.fleet.service, device, upload, 0, body[: len(body) // 2])
        return upload

    def finish(self, device: str, work) -> None:
        """Send the rest, as often as the server says that it lacks something."""
        service, vector = self.fleet.service, self.fleet.vector(device)
        body, found = vector.tobytes(), claims(vector)
        if self.inside:
            accept_batch(service, [arrival(service, device, work.assignment, vector)], "float32")
            return
        for _ in range(3):
            answer = begin(service, device, work.assignment, found)
            try:
                if not isinstance(answer, Accepted):
                    rest = body[answer.offset :]
                    append_chunk(service, device, answer.upload, answer.offset, rest)
                    finish_report(service, device, answer.upload)
                return
            except RefusedError as error:
                if error.code not in ("digest", "offset"):
                    raise
        raise AssertionError("the update was refused three times")


def play(places, kind: str, damage, moment: str) -> Fleet:
    """Two good rounds, one that is disturbed at this moment, and what it takes to commit two
    more."""
    optimizer = {"server": {"name": "momentum", "momentum": 0.5}}
    dim = 3 if in_row(kind) else WIDE
    fleet = Fleet(*places(), count=3, dim=dim, minimum=0.5, algorithm=optimizer)
    line, service, lost = Line(fleet, kind), fleet.service, []
    service.on_lost = lambda: lost.append(kind)
    for _ in range(2):
        fleet.round()
    if moment == "between rounds":  # the server was stopped, and no round is open
        pause(service, fleet.run, "the test", actor="test")
        abandon(service, fleet.run, "the test", actor="test")
        spoil(fleet, kind, damage)
        resume(service, fleet.run, actor="test")
    service.tick()
    works = {device: line.fetch(device) for device in fleet.devices}
    if moment == "at work":
        spoil(fleet, kind, damage)
    for device, work in works.items():
        if work is not None:
            line.begin(device, work)
    if moment == "sending":
        spoil(fleet, kind, damage)
    for device, work in works.items():
        if work is not None:
            line.finish(device, work)
    if moment == "reported":
        spoil(fleet, kind, damage)
    service.tick()
    if moment == "committed":
        spoil(fleet, kind, damage)
    commands = []
    for _ in range(12):
        status = fleet.status()
        if status["round"] >= 5:
            break
        if status["state"] == "paused":
            assert "potluck fall-back" in status["reason"], status
            commands.append(fall_back(service, fleet.run, actor="test"))
            resume(service, fleet.run, actor="test")
        service.tick()
        for device in fleet.devices:
            work = line.fetch(device)
            if work is not None:
                line.finish(device, work)
        fleet.clock.pass_(fleet.settings.report_seconds)
        service.tick()
    status = fleet.status()
    assert (status["round"] >= 5, status["state"]) == (True, "running"), status
    assert len(commands) <= 1
    assert audit_check.check(service) is None
    is_model = "model" in kind or kind == "optimizer"
    if is_model and damage != DAMAGES["long"]:  # of a long one, what it should have is read
        assert commands
    assert not commands or is_model
    assert lost or not (commands or (moment == "reported" and "update" in kind))
    tensors = load(service.export(fleet.run, actor="test"))
    assert tensors["w"][:3].min() > 0  # all three devices are in it
    return fleet


SHORT = [
    (kind, damage, moment)
    for n, kind in enumerate(KINDS)
    for m, damage in enumerate(DAMAGES)
    for k, moment in enumerate(MOMENTS)
    if (n + m + k) % 15 == 4
]


@pytest.mark.parametrize(("kind", "damage", "moment"), SHORT)
def test_a_run_goes_on_after_a_loss(tmp_path, kind, damage, moment):
    places = lambda: (str(tmp_path / "db"), tmp_path / "blobs")  # noqa: E731
    play(places, kind, DAMAGES[damage], moment).service.close()


@pytest.mark.soak
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_after_any_loss(places, kind, damage, moment):
    play(places, kind, DAMAGES[damage], moment).service.close()


@pytest.mark.parametrize("kind", ["update", "update in its row"])
def test_without_a_lost_update_a_round_is_committed_if_its_minimum_holds(places, kind):
    fleet = play(places, kind, DAMAGES["flipped"], "reported")
    with fleet.service.database.read() as db:
        third = db.execute(select(ledger).where(ledger.c.number == 3)).one()
        kept = set(db.scalars(select(reports.c.client).where(reports.c.round == third.round)))
        told = db.execute(select(audit.c.detail).where(audit.c.action == "lost")).scalars().all()
        given = select(assignments).where(
            assignments.c.round == third.round, assignments.c.client.not_in(kept)
        )
        gone = db.execute(given).one()
    assert (third.attempt, third.accepted, len(kept), len(told)) == (1, 2, 2, 1)
    found = claims(fleet.vector(gone.device))
    with pytest.raises(RefusedError, match="the server lost its update"):
        begin(fleet.service, gone.device, gone.id, found)
    fleet.service.close()


def test_an_operator_abandons_an_attempt_and_falls_back(places, tmp_path):
    with Served(tmp_path, dim=WIDE, count=1, places=places()) as served:
        service, device = served.run.service, served.device()

        def potluck(*words):
            done = CliRunner().invoke(app, [*words, "--home", str(served.home.folder)])
            assert done.exit_code == 0, done.output
            return done.output

        device.take_part(WIDE)
        served.until(lambda status: status["version"] == 1 and status["open"])
        assert "abandoned" in potluck("abandon", "--reason", "it hangs")
        served.until(lambda status: (status["open"] or {}).get("attempt") == 2)
        model = find_version(service, served.run.id, 1)
        service.blobs.delete(model.key)
        path = f"/v1/models/{model.sha256}"
        assert device.send("GET", path).status_code == 503  # and the leader looks at it
        served.until(lambda status: status["state"] == "paused")
        assert "model of version 1 is lost" in potluck("status")
        assert "potluck_lost_total 0" not in potluck("metrics")
        assert "version 0 is now version 2" in potluck("fall-back")
        potluck("resume")
        served.until(lambda status: status["open"])
        device.take_part(WIDE)
        served.until(lambda status: status["version"] == 3)
        assert served.weights()[:2] == [1.0, 0.0]
        with pytest.raises(RefusedError, match="version 3, which can be read"):
            fall_back(service, served.run.id, actor="test")
        assert fall_back(service, served.run.id, 0, actor="test") == (0, 4)


def test_blobs_that_are_away_are_waited_for_and_not_lost(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=2, dim=WIDE)
    fleet.round()
    fleet.service.tick()
    for device in fleet.devices:
        fleet.take_part(device)
    (tmp_path / "blobs").rename(tmp_path / "away")  # as where a file system is not mounted
    for _ in range(5):
        with pytest.raises(StorageError) as error:
            fleet.service.tick()
        assert not isinstance(error.value, LostError)
    assert fleet.status()["open"]["state"] == "AGGREGATING"
    (tmp_path / "away").rename(tmp_path / "blobs")
    fleet.service.tick()
    assert (fleet.status()["round"], fleet.status()["attempt"]) == (2, 1)
    fleet.service.close()


def test_one_blob_that_the_disk_cannot_read_is_lost(tmp_path):
    store = FolderStore(tmp_path)
    (tmp_path / "models" / "a").mkdir(parents=True)  # to open it is an error of the system
    store.put("models/b", iter([b"abc"]))
    for key, stop in (("models/a", None), ("models/c", None), ("models/b", 4)):
        with pytest.raises(LostError):
            list(store.read(key, 0, stop))
    (tmp_path / "temporary").rmdir()
    with pytest.raises(StorageError) as error:
        list(store.read("models/c"))
    assert not isinstance(error.value, LostError)


def test_a_model_that_is_lost_is_not_evaluated_and_keeps_no_other_from_it(places):
    fleet = Fleet(*places(), count=2, dim=WIDE)
    lost = []
    fleet.service.on_lost = lambda: lost.append(1)
    for _ in range(2):
        fleet.round()
    fleet.service.blobs.delete(find_version(fleet.service, fleet.run, 1).key)
    for _ in range(2):
        fleet.service.evaluate(fleet.run, lambda w: {"sum": float(w.sum())})
    found = {row["round"]: row["metrics"]["sum"] for row in fleet.service.evaluations(fleet.run)}
    assert found == {0: 0.0, 2: 2.0}
    assert len(lost) == 1
    with pytest.raises(RefusedError, match="the model of version 1 is lost"):
        fleet.service.export(fleet.run, 1, actor="test")
    assert audit_check.check(fleet.service) is None
    fleet.service.close()


def test_an_object_that_the_store_does_not_give_is_left_out(tmp_path, s3):
    fleet = Fleet(str(tmp_path / "db"), s3(), count=3, dim=WIDE, minimum=0.5)
    fleet.service.tick()
    for device in fleet.devices:
        fleet.take_part(device)
    key = min(key for key in fleet.stored() if key.startswith("reports/"))
    body = b"".join(fleet.service.blobs.read(key))
    archived = {"Storage-Class": "GLACIER"}  # it is listed, and not to be read
    obstore.put(fleet.service.blobs._store, key, body, attributes=archived)
    with pytest.raises(LostError, match="must be readable"):
        list(fleet.service.blobs.read(key))
    fleet.service.tick()
    assert [row["accepted"] for row in fleet.service.history(fleet.run)] == [2]
    assert not [key for key in fleet.stored() if key.startswith("temporary")]
    fleet.service.close()
