"""Blobs, the database, the audit log, tokens and the leader: each by itself."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from obstore.store import MemoryStore
from sqlalchemy import delete, select, text, update

from fleet import Clock, Fleet
from messages import check_in
from potluck.config.algorithm_section import build_algorithm
from potluck.core import RefusedError, RunError, Spec, StorageError
from potluck.protocol import decode_blocks
from potluck.server import Service
from potluck.server.rounds import audit_check
from potluck.server.rounds.aggregate import BLOCK, Stored, aggregate
from potluck.server.rounds.enrolment import claim_sequences, enrol, issue_tokens
from potluck.server.storage.blobs import FolderStore, open_blobs
from potluck.server.storage.database import Database
from potluck.server.storage.database_tables import audit, metadata, tokens
from potluck.server.storage.object_store import ObjectStore
from potluck.server.storage.state_folder import StateFolder


@pytest.fixture(params=["folder", "objects", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return FolderStore(tmp_path)
    if request.param == "objects":
        return ObjectStore(MemoryStore())
    return open_blobs(request.getfixturevalue("s3")())


def content(store, key, *span):
    return b"".join(store.read(key, *span))


def test_a_blob_is_read_as_it_was_put_also_in_ranges(store):
    body = os.urandom(3_000_001)
    store.put("models/a", iter([body[:10], body[10:]]))
    assert store.size("models/a") == len(body)
    assert content(store, "models/a") == body
    assert content(store, "models/a", 5, 2_000_000) == body[5:2_000_000]
    store.put("models/a", iter([b"new"]))
    assert content(store, "models/a") == b"new"
    assert store.size("models/b") is None
    with pytest.raises(StorageError):
        content(store, "models/b")


def test_a_part_grows_from_its_end_alone_and_becomes_a_blob(store):
    assert store.part_size("p") == 0
    assert store.append("p", 0, b"abc") == 3
    assert store.append("p", 0, b"abc") == 3
    assert store.append("p", 7, b"xyz") == 3
    assert store.append("p", 3, b"de") == 5
    store.seal("p", "reports/r/p")
    assert content(store, "reports/r/p") == b"abcde"
    assert store.part_size("p") == 5  # until it is known what became of the blob
    store.drop("p")
    assert (store.part_size("p"), content(store, "reports/r/p")) == (0, b"abcde")
    store.append("q", 0, b"abc")
    store.drop("q")
    assert store.part_size("q") == 0


def test_delete_takes_a_blob_or_a_folder_and_nothing_beside_it(store):
    for key in ("reports/r1/a", "reports/r1/b", "reports/r10/a"):
        store.put(key, iter([b"x"]))
    store.delete("reports/r1")
    store.delete("reports/r1")
    assert [store.size(f"reports/{key}") for key in ("r1/a", "r1/b", "r10/a")] == [None, None, 1]
    store.delete("reports/r10/a")
    assert store.size("reports/r10/a") is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_storage_error_and_the_round_goes_on_later(tmp_path, small_disk):
    fleet = Fleet(str(tmp_path / "db"), small_disk / "blobs", dim=20_000)
    fleet.service.tick()
    works = [fleet.assign(device) for device in fleet.devices]
    fleet.send(fleet.devices[0], works[0].assignment)
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 30_000))
    with pytest.raises(StorageError, match="No space left"):
        fleet.send(fleet.devices[1], works[1].assignment)
    with pytest.raises(StorageError, match="No space left"):
        FolderStore(small_disk / "blobs").put("models/x", iter([bytes(80_000)]))
    assert not list((small_disk / "blobs" / "temporary").iterdir())
    (small_disk / "filler").unlink()
    for device, work in zip(fleet.devices, works, strict=True):
        fleet.send(device, work.assignment)
    fleet.service.tick()
    assert fleet.weights()[:5].tolist() == [0.25] * 4 + [0.0]
    fleet.service.close()


def test_a_full_disk_under_the_database_is_a_storage_error(tmp_path, small_disk):
    fleet = Fleet(str(small_disk / "db"), tmp_path / "blobs")
    fleet.service.tick()
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize))
    issue = functools.partial(issue_tokens, fleet.service, fleet.run, actor="test")
    with pytest.raises(StorageError, match="full"):
        list(itertools.islice(iter(issue, None), 1000))
    (small_disk / "filler").unlink()
    fleet.round()
    assert fleet.weights().tolist() == [0.25] * 4
    assert audit_check.check(fleet.service) is None
    fleet.service.close()


def test_a_read_only_disk_is_a_storage_error(tmp_path, small_disk):
    fleet = Fleet(str(tmp_path / "db"), small_disk / "blobs")
    fleet.service.tick()
    remount = ["mount", "-o", "remount,{}", str(small_disk)]
    subprocess.run([part.format("ro") for part in remount], check=True)
    with pytest.raises(StorageError, match="Read-only"):
        fleet.take_part(fleet.devices[0])
    subprocess.run([part.format("rw") for part in remount], check=True)
    fleet.round()
    assert fleet.status()["version"] == 1
    fleet.service.close()


def test_the_migrations_make_the_tables(places):
    database = Database(places()[0])
    database.upgrade()
    database.upgrade()
    with database.engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), metadata) == []
    with database.write() as db:
        db.execute(text("UPDATE alembic_version SET version_num = 'ffff'"))
    with pytest.raises(StorageError, match="Upgrade Potluck"):
        database.upgrade()
    database.close()


@pytest.mark.parametrize("url", ["mysql://host/name", "sqlite://", "nonsense://x"])
def test_another_database_is_refused(url):
    with pytest.raises(ValueError, match="the database must be"):
        Database(url)


@pytest.mark.parametrize(
    ("change", "number", "reason"),
    [
        (update(audit).where(audit.c.number == 3).values(detail="{}"), 3, "was changed"),
        (update(audit).where(audit.c.number == 2).values(actor="me"), 2, "was changed"),
        (delete(audit).where(audit.c.number == 2), 2, "is missing"),
        (update(audit).where(audit.c.number == 4).values(previous="0" * 64), 4, "does not follow"),
    ],
)
def test_the_audit_log_names_its_first_broken_row(tmp_path, change, number, reason):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs")
    assert audit_check.check(fleet.service) is None
    with fleet.service.database.write() as db:
        db.execute(change)
    found = audit_check.check(fleet.service)
    assert found.number == number
    assert reason in found.reason
    fleet.service.close()


def race(count, act):
    """What `count` threads get who act at the same moment."""
    barrier, results = threading.Barrier(count), [None] * count

    def one(i):
        barrier.wait()
        try:
            results[i] = act(i)
        except RefusedError as error:
            results[i] = error.code

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_50_uses_of_one_token_exactly_one_wins(places):
    fleet = Fleet(*places(), count=1)
    token = issue_tokens(fleet.service, fleet.run, actor="test")[0]
    results = race(50, lambda i: enrol(fleet.service, token, bytes([99, i]) * 16))
    winners = [result for result in results if result != "token"]
    assert len(winners) == 1
    assert fleet.status()["devices"] == 2
    winner = results.index(winners[0])
    assert enrol(fleet.service, token, bytes([99, winner]) * 16) == winners[0]  # asked again
    with fleet.service.database.read() as db:
        assert token not in db.scalars(select(tokens.c.hash)).all()
    fleet.service.close()


def test_an_expired_token_and_a_known_key_are_refused(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=1)
    token = issue_tokens(fleet.service, fleet.run, actor="test", valid_seconds=10)[0]
    with pytest.raises(RefusedError) as known:
        enrol(fleet.service, token, bytes([0, 0]) * 16)
    assert known.value.code == "conflict"
    fleet.clock.pass_(11)
    with pytest.raises(RefusedError) as expired:
        enrol(fleet.service, token, bytes([5]) * 32)
    assert expired.value.code == "token"
    fleet.service.close()


def test_devices_that_enrol_at_once_get_indices_without_gaps(places):
    fleet = Fleet(*places(), count=1)
    given = [issue_tokens(fleet.service, fleet.run, actor="test")[0] for _ in range(12)]
    enrolled = race(12, lambda i: enrol(fleet.service, given[i], bytes([7, i]) * 16))
    assert sorted(result.client for result in enrolled) == list(range(1, 13))
    fleet.service.close()


def test_a_sequence_number_counts_once(places):
    fleet = Fleet(*places(), count=1)
    results = race(8, lambda i: claim_sequences(fleet.service, [(fleet.devices[0], 5)])[0])
    codes = [getattr(result, "code", "") for result in results]
    assert sorted(codes) == [""] + ["replayed"] * 7
    again = fleet.open()
    claims = [(fleet.devices[0], 4), (fleet.devices[0], 6)]
    refused, noted = claim_sequences(again, claims)
    assert isinstance(refused, RefusedError)
    assert noted is None
    again.close()
    fleet.service.close()


def test_slots_are_not_given_twice_when_all_check_in_at_once(places):
    fleet = Fleet(*places(), count=12, goal=4)
    fleet.service.tick()
    answers = race(12, lambda i: type(check_in(fleet.service, fleet.devices[i])).__name__)
    assert sorted(answers) == ["Assigned"] * 4 + ["Wait"] * 8
    fleet.service.close()


def test_one_process_leads_and_another_takes_over_when_it_is_silent(places):
    fleet = Fleet(*places())
    other = fleet.open()
    assert fleet.service.tick()
    assert not other.tick()
    for device in fleet.devices:  # served by the one, accepted by the other
        work = check_in(other, device)
        fleet.send(device, work.assignment)
    assert not other.tick()
    fleet.clock.pass_(3)
    assert other.tick()  # the first one was silent for longer than its lease
    assert fleet.status()["version"] == 1
    assert not fleet.service.tick()
    other.close()  # and says so
    assert fleet.service.tick()
    fleet.service.close()


def test_the_next_life_of_a_killed_leader_leads_at_once_and_a_strangers_does_not(places, tmp_path):
    home, clock = StateFolder(tmp_path / "home"), Clock()
    life = home.begin()
    service = functools.partial(Service.open, *places(), build=build_algorithm, clock=clock)
    first = service(life=life)
    assert first.tick()
    stranger = service()
    assert not stranger.tick()
    with pytest.raises(RunError, match="another server"):
        home.begin()
    life.close()  # without resigning, as the kernel does after a kill
    second = service(life=home.begin())
    assert second.tick()
    clock.pass_(1)
    assert not first.tick()
    assert second.tick()
    assert not stranger.tick()
    for one in (first, second, stranger):
        one.close()


def test_a_leader_that_was_fenced_changes_nothing(places):
    fleet = Fleet(*places(), count=1)
    other = fleet.open()
    fleet.service.tick()
    assert not other.tick()
    fleet.take_part(fleet.devices[0])
    with other.database.write() as db:  # the other took over while the first one slept
        db.execute(text("UPDATE leader SET holder = 'other', fence = fence + 1"))
    assert not fleet.service.tick()
    assert fleet.status()["version"] == 0
    other.close()
    fleet.service.close()


def test_the_aggregate_of_many_blocks_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    dim = 2 * BLOCK + 3
    spec = Spec(("w",), ((dim,),))
    vectors = rng.normal(size=(3, dim)).astype(np.float32)
    weights = [1.0, 2.5, 10.0]

    def stored(i, cut):
        body = vectors[i].tobytes()
        sha256 = hashlib.sha256(body).hexdigest()
        pieces = [body[k : k + cut] for k in range(0, len(body), cut)]
        return Stored(i, sha256, weights[i], "float32", lambda: iter(pieces))

    once = aggregate([stored(i, 1 << 20) for i in (0, 1, 2)], spec)
    other = aggregate([stored(i, 99_991) for i in (2, 0, 1)], spec)
    assert np.array_equal(once, other)
    assert np.allclose(once, np.average(vectors.astype(float), axis=0, weights=weights), atol=1e-6)


def test_float32_is_little_endian_wherever_it_is_cut():
    body = np.array([1.5, -2.0, 3.25], "<f4").tobytes()
    for cut in range(1, 13):
        blocks = decode_blocks(iter([body[:cut], body[cut:]]), "float32", 3)
        assert np.concatenate(list(blocks)).tolist() == [1.5, -2.0, 3.25]


def test_the_server_is_imported_without_pytorch():
    code = "import potluck.server, sys; print('torch' in sys.modules, 'obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
