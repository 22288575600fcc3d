"""What is changed in the tables by hand, or cut off the audit log, is found; and by whom."""

from __future__ import annotations

import hashlib

import pytest
from sqlalchemy import delete, insert, select, update

from federation import Federation, UnitTrainer
from fleet import Fleet
from messages import head_of
from potluck.core.plain_json import to_json
from potluck.server.rounds import audit_check
from potluck.server.rounds.enrolment import revoke
from potluck.server.storage.database_tables import audit, devices, ledger, models, runs, tokens

OTHER = b"\xff" * 32


@pytest.fixture
def fleet(tmp_path):
    """Two rounds, a device that was revoked, and one that came later."""
    made = _fleet(str(tmp_path / "db"), tmp_path / "blobs")
    yield made
    made.service.close()


def _fleet(url, blobs):
    made = Fleet(url, blobs, count=3, goal=2, minimum=1.0)
    made.round(made.devices[:2])
    revoke(made.service, made.devices[2], actor="test")
    made.devices.append(made.enrol(3))
    made.round(made.devices[:2])
    return made


def _admitted(row):
    """Another device, of a key that nobody let in."""
    values = dict(row._mapping) | {"id": hashlib.sha256(OTHER).hexdigest()[:32], "client": 9}
    return insert(devices).values(values | {"public_key": OTHER})


CHANGES = {
    "a revoked device takes part again": (
        lambda d: update(devices).where(devices.c.revoked_ms > 0).values(revoked_ms=None),
        "takes part again",
    ),
    "a device is thrown out": (
        lambda d: update(devices).where(devices.c.id == d.id).values(revoked_ms=1),
        "by nobody",
    ),
    "a device has another key": (
        lambda d: update(devices).where(devices.c.id == d.id).values(public_key=OTHER),
        "another key",
    ),
    "a device is another client": (
        lambda d: update(devices).where(devices.c.id == d.id).values(client=8),
        "client 8",
    ),
    "a device that nobody let in": (_admitted, "nobody let it in"),
    "a device is gone": (
        lambda d: delete(devices).where(devices.c.client == 3),
        "not in the table any more",
    ),
    "a token that nobody issued": (
        lambda d: insert(tokens).values(
            hash="ab" * 32, run=d.run, expires_ms=2**50, created_ms=1, device=None
        ),
        "nobody issued it",
    ),
    "a round with another set of reports": (
        lambda d: update(ledger).where(ledger.c.number == 1).values(accepted_sha256="0" * 64),
        "round 1",
    ),
    "a round that is gone": (lambda d: delete(ledger).where(ledger.c.number == 2), "round 2"),
    "another model under its own digest": (
        lambda d: (
            update(models)
            .where(models.c.version == 2)
            .values(content=b"\0" * 12, sha256=hashlib.sha256(b"\0" * 12).hexdigest())
        ),
        "model of version 2",
    ),
    "another model under the old digest": (
        lambda d: update(models).where(models.c.version == 2).values(content=b"\0" * 12),
        "newest model, of version 2",
    ),
    "an older model": (lambda d: update(runs).values(version=1), "newest model"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_table_that_was_changed_by_hand_is_found(fleet, name):
    change, reason = CHANGES[name]
    assert audit_check.check(fleet.service) is None
    with fleet.service.database.write() as db:
        device = db.execute(select(devices).where(devices.c.client == 0)).one()
        db.execute(change(device))
    found = audit_check.check(fleet.service)
    assert found is not None
    assert reason in found.reason


def test_it_is_found_wherever_the_state_is(places):
    fleet = _fleet(*places())
    assert audit_check.check(fleet.service) is None
    with fleet.service.database.write() as db:
        db.execute(update(devices).values(revoked_ms=None))
    assert "takes part again" in audit_check.check(fleet.service).reason
    fleet.service.close()


def test_an_end_that_was_cut_off_is_found_by_the_tables_or_by_a_hash(fleet):
    rows, kept = head_of(fleet.service)
    fleet.service.export(fleet.run, actor="somebody")
    _, last = head_of(fleet.service)
    assert audit_check.check(fleet.service, kept) is None
    with fleet.service.database.write() as db:
        db.execute(delete(audit).where(audit.c.number > rows))
    assert audit_check.check(fleet.service) is None  # nothing else tells of it
    assert audit_check.check(fleet.service, kept) is None
    assert last in audit_check.check(fleet.service, last).reason
    with fleet.service.database.write() as db:
        db.execute(delete(audit).where(audit.c.number > rows - 2))
    assert audit_check.check(fleet.service) is not None  # a round was committed in it


def test_a_log_that_was_rewritten_is_found_by_a_hash(fleet):
    kept = head_of(fleet.service)[1]
    with fleet.service.database.write() as db:
        previous = "0" * 64
        for row in db.execute(select(audit).order_by(audit.c.number)).all():
            actor = "nobody" if row.action == "revoke" else row.actor
            new = (row.number, row.time_ms, actor, row.action, row.detail, previous)
            text = to_json(new, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            made = hashlib.sha256(text.encode()).hexdigest()
            here = audit.c.number == row.number
            changes = {"actor": actor, "previous": previous, "hash": made}
            db.execute(update(audit).where(here).values(changes))
            previous = made
    assert audit_check.check(fleet.service) is None
    assert "all rewritten" in audit_check.check(fleet.service, kept).reason


def test_every_device_keeps_a_signed_hash_with_which_a_cut_end_is_found(tmp_path):
    with Federation(tmp_path, rounds=2, clients=1) as federation:
        device = federation.join(0, UnitTrainer())
        device.end()
        assert device.died is None, device.died
        kept = (tmp_path / "device0" / "audit").read_text()
        service = federation.service
        with service.database.read() as db:
            number = db.scalar(select(audit.c.number).where(audit.c.hash == kept))
            commit = db.scalar(select(audit.c.number).where(audit.c.action == "commit").limit(1))
        assert number >= commit  # of the round before the last
        assert audit_check.check(service, kept) is None
        told = federation.operator.get(f"audit?since={kept}")
        assert told["broken"] is None
        with service.database.write() as db:
            db.execute(delete(audit).where(audit.c.number >= number))
        told = federation.operator.get(f"audit?since={kept}")
        assert kept in told["broken"]["reason"]
