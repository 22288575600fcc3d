"""Files are replaced as a whole, and a lock has one holder."""

import os
import subprocess
import sys

import pytest

from potluck.core import RunError
from potluck.core.atomic_files import PRIVATE, lock_file, write_whole


def test_a_file_is_replaced_with_the_mode_that_was_asked_for(tmp_path):
    path = tmp_path / "key"
    path.write_text("old")
    path.with_name("key.partial").write_text("left by a process that was killed")
    write_whole(path, b"new", PRIVATE)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    def full(file):
        raise OSError("no space")

    path = tmp_path / "state"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_has_one_holder_and_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    hold = "import sys, pathlib; from potluck.core.atomic_files import lock_file\n"
    hold += "lock_file(pathlib.Path(sys.argv[1]), 'held'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(RunError, match="another is at work"):
            lock_file(path, "another is at work")
        holder.kill()
    os.close(lock_file(path, "held"))
