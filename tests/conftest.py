"""Published files, which tests skip where POTLUCK_DATA does not hold them; databases and blobs."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from potluck.data import datasets
from potluck.data.federated import Dataset
from potluck.data.published_files import FILES
from potluck.engine.native import compiler, lstm, max_pool

_PATIENT = ("server", "device", "demo", "cli", "simulation")  # folders whose tests wait much


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests with processes of their own begin first: they take longest, and mostly wait."""
    items.sort(key=lambda item: item.path.parent.name not in _PATIENT)


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


@pytest.fixture
def cold_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kernels are compiled to, with none in it, and none that was asked for yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("POTLUCK_NATIVE", raising=False)
    asked = (compiler.library, lstm._library, max_pool._library)
    for one in asked:
        one.cache_clear()
    yield tmp_path / "potluck-kernels"
    for one in asked:
        one.cache_clear()


@pytest.fixture
def seed() -> int:
    """Another one in every run, which a test that fails shows."""
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")
    return seed


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


@pytest.fixture(scope="session")
def s3() -> Iterator[Callable[[], str]]:
    """Start an S3 endpoint of our own; give the URL of a new, empty bucket at every call."""
    count = itertools.count()
    with tempfile.TemporaryFile("w+") as log, pytest.MonkeyPatch.context() as environment:
        words = [sys.executable, "-m", "moto.server", "--port", "0"]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)

        def told() -> str:
            log.seek(0)
            return log.read()

        while not (address := re.search(r"http://127\.0\.0\.1:\d+", told())):
            assert server.poll() is None, told()
            time.sleep(0.05)  # until it listens
        environment.setenv("AWS_ENDPOINT_URL", address[0])
        environment.setenv("AWS_REGION", "us-east-1")
        environment.setenv("AWS_ACCESS_KEY_ID", "potluck")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "potluck")

        def url() -> str:
            name = f"test-{next(count)}"
            httpx.put(f"{address[0]}/{name}", timeout=30.0).raise_for_status()
            return f"s3://{name}/potluck"

        yield url
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module", params=["sqlite-folder", "postgresql-s3"])
def places(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], tuple[str, str]]:
    """Give the URLs of a new database and of a new place for blobs at every call.

    Every test that asks for it runs on both kinds.
    """
    if request.param == "postgresql-s3":
        database, bucket = (request.getfixturevalue(name) for name in ("postgresql", "s3"))
        return lambda: (database(), bucket())

    def local() -> tuple[str, str]:
        folder = tmp_path_factory.mktemp("places")
        return f"sqlite:///{folder / 'potluck.db'}", str(folder / "blobs")

    return local
