"""Published files, which tests skip where POTLUCK_DATA does not hold them; and databases."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from potluck.tasks import datasets
from potluck.tasks.data import Dataset
from potluck.tasks.files import FILES


@pytest.fixture(scope="session")
def published() -> Callable[[str], list[Path]]:
    """Give the files of one data set ("mnist"), or skip the test."""

    def paths(name: str) -> list[Path]:
        folder = Path(os.environ.get("POTLUCK_DATA", ""))
        found = [folder / path for path in FILES if path.startswith(f"{name}/")]
        if "POTLUCK_DATA" not in os.environ or not all(path.is_file() for path in found):
            pytest.skip(f"{name} is not in POTLUCK_DATA")
        return found

    return paths


@pytest.fixture(scope="session")
def mnist(published: Callable[[str], list[Path]]) -> Dataset:
    """MNIST with its writers."""
    published("mnist")
    published("qmnist")
    return datasets.mnist(writers=True)


@pytest.fixture(scope="session")
def wisdm(published: Callable[[str], list[Path]]) -> Dataset:
    published("wisdm")
    return datasets.wisdm()


@pytest.fixture(scope="session")
def shakespeare(published: Callable[[str], list[Path]]) -> Dataset:
    """The clean variant."""
    published("shakespeare")
    return datasets.shakespeare()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Start a PostgreSQL of our own; give the URL of a new, empty database at every call."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = found[-1] if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("there is no PostgreSQL on this machine")
    binaries = Path(initdb).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="potluck-pg-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        try:
            shutil.chown(folder, "nobody")
        except LookupError:
            pytest.skip("there is no user to run PostgreSQL as")
        user = {"user": "nobody", "group": 65534, "extra_groups": []}
    data = str(folder / "data")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    make = [binaries / "initdb", "-D", data, "-A", "trust", "-U", "potluck", "-N", "-E", "UTF8"]
    subprocess.run(make, check=True, env=environment, cwd=folder, **quiet)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
    options += ["-c", "max_connections=200", "-c", "fsync=off"]
    server = subprocess.Popen(
        [binaries / "postgres", "-D", data, *options], env=environment, cwd=folder, **quiet
    )
    count = itertools.count()

    def url() -> str:
        name = f"test_{next(count)}"
        with psycopg.connect(f"host={folder} user=potluck dbname=postgres", autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return f"postgresql://potluck@/{name}?host={folder}"

    for _ in range(100):
        if (folder / ".s.PGSQL.5432").exists():
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(f"host={folder} user=potluck dbname=postgres").close()
                break
        time.sleep(0.1)  # until it listens
    yield url
    server.send_signal(signal.SIGQUIT)  # at once: nothing in it is kept
    server.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database: every test that asks for it runs on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'potluck.db'}"
    return request.getfixturevalue("postgresql")()
