"""What server and device write is for their user alone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from test_device_life import Process

from potluck.server.storage.blobs import FolderStore
from potluck.server.storage.database import Database
from serve_process import ServerProcess, experiment


@pytest.fixture
def open_to_all():
    """A shell that lets everybody read and write what its programs make."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_paths(folder: Path) -> list[str]:
    """What another user may read, write or enter."""
    return [str(path) for path in [folder, *folder.rglob("*")] if path.lstat().st_mode & 0o077]


def test_a_server_and_a_device_write_for_their_user_alone(tmp_path, open_to_all):
    places = tmp_path / "elsewhere"
    places.mkdir(mode=0o700)
    database, blobs = places / "run.db", places / "blobs"
    with sqlite3.connect(database) as old:
        old.execute("PRAGMA journal_mode = WAL")
    old.close()
    database.chmod(0o666)  # of an earlier version, or made by hand
    (blobs / "models").mkdir(parents=True)
    text = experiment(clients=1, rounds=1, model="2nn")
    options = ("--database", f"sqlite:///{database}", "--blobs", blobs)
    server = ServerProcess(tmp_path, text, options=options)
    try:
        assert server.serves()
        server.file, server.folder = tmp_path / "experiment.toml", tmp_path
        device = Process(server, server.address, invited=True)
        code, _ = device.end()
        assert code == 0, device.lines
        assert len(list((blobs / "models").iterdir())) == 2
        copy = tmp_path / "backup"
        words = ("backup", copy, "--home", server.home.folder, *options)
        subprocess.run([sys.executable, "-m", "potluck", *map(str, words)], check=True)
        for folder in (places, server.home.folder, tmp_path / "device", copy):
            assert open_paths(folder) == []
    finally:
        server.end()


def test_a_folder_of_other_things_is_left_as_it_is(tmp_path, open_to_all):
    (tmp_path / "notes").write_text("of somebody else")
    tmp_path.chmod(0o755)
    store = FolderStore(tmp_path)
    store.put("models/x", [b"weights"])
    assert (tmp_path / "models").stat().st_mode & 0o777 == 0o700
    (tmp_path / "models").chmod(0o755)  # as earlier versions made it
    FolderStore(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "models").stat().st_mode & 0o777 == 0o700


def test_a_database_made_from_python_is_private_too(tmp_path, open_to_all):
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    database.upgrade()
    assert [path for path in open_paths(tmp_path) if path != str(tmp_path)] == []
    database.close()
