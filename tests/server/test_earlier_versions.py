"""Runs that earlier commits began go on: `tests/helpers/earlier` holds what their servers left."""

import contextlib
import json
import shutil
import sqlite3
import zipfile

import pytest
from sqlalchemy import inspect

from earlier_versions import COMMITS, FOLDER
from federation import Device, Federation, UnitTrainer
from potluck.core import RefusedError
from potluck.server.open_run import open_server
from potluck.server.process import Listen
from potluck.server.rounds import audit_check
from potluck.server.storage.copy_database import copy_all
from potluck.server.storage.database import Database, newest_revision, revision_of
from potluck.server.storage.database_tables import metadata
from potluck.server.storage.state_folder import StateFolder


@pytest.fixture(params=COMMITS)
def left(request, tmp_path):
    """What a killed server of an earlier commit and its devices left."""
    return unpacked(request.param, tmp_path)


def unpacked(commit, folder):
    with zipfile.ZipFile(FOLDER / f"{commit}.zip") as archive:
        archive.extractall(folder)
    for key in folder.rglob("*.key"):
        key.chmod(0o600)  # an archive keeps no modes
    (folder / "home").rename(folder / "server")
    return folder


def rows(path, table="audit"):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


def revision(path):
    return rows(path, "alembic_version")[0][0]


def test_a_server_and_its_devices_go_on_where_an_earlier_version_was_killed(left):
    database = left / "server" / "potluck.db"
    before, old = revision(database), rows(database)
    with Federation.of(left / "experiment.toml") as served:
        assert served.server.served.kept == []
        address = served.server.address
        for k in range(2):
            folder = left / f"device-{k}"
            served.devices.append(Device(address, None, folder, UnitTrainer()))
        served.until(lambda: served.status()["version"] >= 5 or any(d.died for d in served.devices))
        assert [device.died for device in served.devices] == [None, None]
        assert audit_check.check(served.service) is None
    if before != newest_revision():
        copy = left / "server" / f"potluck-{before}.db"
        assert (revision(copy), rows(copy)) == (before, old)


def test_what_an_earlier_version_writes_fits_the_newest_schema(left):
    """During a rolling upgrade its servers go on with the tables that the newer one changed."""
    path = left / "server" / "potluck.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        there = {name: {row[1] for row in db.execute(f"PRAGMA table_info({name})")}
                 for name in metadata.tables}  # fmt: skip
    for name, table in metadata.tables.items():
        assert there[name] <= set(table.c.keys())
        for column in table.c:
            can_be_left_out = column.nullable or column.server_default is not None
            assert column.name in there[name] or not there[name] or can_be_left_out, column


def test_a_database_is_looked_at_before_it_is_changed(left):
    home, file = StateFolder(left / "server"), left / "experiment.toml"
    database = home.folder / "potluck.db"
    before = database.read_bytes()
    with pytest.raises(RefusedError, match=r"with server.minimum = 0.5 and not 0.25\. .*set"):
        open_server(file, ["server.minimum=0.25"], home.folder, Listen(port=0))
    with pytest.raises(RefusedError, match=r"run.seed = 0 and not 7\. Go on with the old"):
        open_server(file, ["run.seed=7", "run.rounds=9"], home.folder, Listen(port=0))
    assert database.read_bytes() == before
    assert not list(home.folder.glob("potluck-*"))


def change(path, name, **changes):
    with contextlib.closing(sqlite3.connect(path)) as db:
        (text,) = db.execute(f"SELECT {name} FROM runs").fetchone()
        db.execute(f"UPDATE runs SET {name} = ?", [json.dumps(json.loads(text) | changes)])
        db.commit()


def opened(folder, *overrides):
    server = open_server(
        folder / "experiment.toml", list(overrides), folder / "server", Listen(port=0)
    )
    server.close()
    return server.served


def test_a_run_keeps_what_was_a_default_when_it_was_begun(tmp_path):
    folder = unpacked(COMMITS[0], tmp_path)
    database = folder / "server" / "potluck.db"
    change(database, "settings", max_norm=123.0, attempts=9, of_old=3)
    change(database, "experiment", of_new=None)
    served = opened(folder)
    assert (served.settings.max_norm, served.settings.attempts) == (123.0, 9)
    assert served.kept == [
        "server.attempts = 9 in the run, and not 3",
        "server.max_norm = 123.0 in the run, and not 10000.0",
    ]
    with pytest.raises(RefusedError, match=r"begun with server.attempts = 9 and not 4\."):
        opened(folder, "server.attempts=4")


def test_a_run_of_a_version_that_knew_more_is_refused_by_the_first_key(tmp_path):
    folder = unpacked(COMMITS[-1], tmp_path)
    change(folder / "server" / "potluck.db", "experiment", of_new=7)
    with pytest.raises(RefusedError, match=r"got of_new = 7 .*Serve it with that version"):
        opened(folder)


def test_a_database_before_the_first_migration_was_settled_is_refused_in_words(tmp_path):
    folder = unpacked(COMMITS[0], tmp_path)
    with contextlib.closing(sqlite3.connect(folder / "server" / "potluck.db")) as db:
        db.execute("ALTER TABLE runs DROP COLUMN plan")
    with pytest.raises(RefusedError, match=r"got an older one, without its plans\. Finish"):
        opened(folder)


def test_a_key_that_the_file_gave_and_leaves_out_now_is_named(tmp_path):
    folder = unpacked(COMMITS[-1], tmp_path)
    file, home = folder / "experiment.toml", folder / "server"
    shutil.rmtree(home)
    text = file.read_text()
    file.write_text(text.replace("evaluate_every = 1000", "seed = 3"))
    open_server(file, ["server.attempts=3"], home, Listen(port=0)).close()
    opened(folder)  # 3 is the default: given or not, it is the same
    file.write_text(text.replace("evaluate_every = 1000\n", ""))
    with pytest.raises(RefusedError, match=r"begun with run.seed = 3 and not 0\."):
        opened(folder)


@pytest.mark.parametrize("commit", [COMMITS[0], COMMITS[-1]])
def test_a_database_is_copied_to_another_kind_and_back(commit, tmp_path, postgresql):
    first = Database(str(unpacked(commit, tmp_path) / "server" / "potluck.db"))
    second, third = Database(postgresql()), Database(str(tmp_path / "third.db"))
    for source, target in ((first, second), (second, third)):
        with source.snapshot() as db:
            copy_all(db, target)
    with first.read() as one, second.read() as two:
        assert revision_of(one) == revision_of(two)
        names = inspect(one).get_table_names()
    for name in names:
        assert rows(first.engine.url.database, name) == rows(tmp_path / "third.db", name)
    for database in (first, second, third):
        database.close()
