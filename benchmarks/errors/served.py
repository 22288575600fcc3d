"""Mistakes of an operator and of the owner of a device, against a real server on loopback."""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from commands import EXPERIMENT, experiment
from watched import Mistakes, potluck

operators = Mistakes("server")
devices = Mistakes("device")

_SERVED = EXPERIMENT + '\n[server]\nselection = "sampled"\npopulation = 5\n'


class _Server(NamedTuple):
    address: str
    home: Path


@cache
def _server() -> _Server:
    """A server of digits that waits for five devices; it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="potluck-mistakes-"))
    file = experiment(folder, _SERVED)
    process = subprocess.Popen(
        [sys.executable, "-m", "potluck", "serve", file, "--home", folder / "home", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    atexit.register(lambda: (process.send_signal(signal.SIGTERM), process.wait()))
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"address\s+(\S+)", line)
        if found:
            return _Server(found[1], folder / "home")
    raise RuntimeError("the server did not start")


@cache
def _invitations() -> list[str]:
    words = ["enroll", "--count", "40", "--home", str(_server().home)]
    done = subprocess.run(
        [sys.executable, "-m", "potluck", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()


def _invitation() -> str:
    """A fresh invitation of the server."""
    return _invitations().pop()


def _serve(*words: str, text: str = _SERVED) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        file = experiment(folder, text)
        potluck("serve", file, "--home", folder / "home", "--port", "0", *words)

    return run


for _what, _words in {
    "a port that is taken": ("--port", "PORT"),
    "a port that there is not": ("--port", "70000"),
    "a host that there is not": ("--host", "no.such.host.invalid"),
    "plain HTTP to the world": ("--host", "0.0.0.0", "--insecure-loopback"),
    "a certificate without its key": ("--certificate", "cert.pem"),
    "a certificate that is not there": ("--certificate", "no.pem", "--private-key", "no.pem"),
    "a database that there is not": ("--database", "mysql://localhost/x"),
    "a database that does not answer": ("--database", "postgresql://127.0.0.1:1/x"),
    "blobs where nothing can be": ("--blobs", "ftp://x/y"),
    "a log level that there is not": ("--log-level", "loud"),
    "a goal of 0": ("--goal", "0"),
    "a minimum above the goal": ("--minimum", "1.5"),
    "an over-selection below 1": ("--over-selection", "0.5"),
    "a selection that there is not": ("--set", "server.selection='all'"),
    "a deadline of 0": ("--set", "server.report_seconds=0"),
    "a long poll of an hour": ("--set", "server.long_poll_seconds=3600"),
    "a setting that is text": ("--set", "server.attempts='three'"),
    "an unknown setting": ("--set", "server.deadline=5"),
}.items():

    def _run(folder: Path, words: tuple[str, ...] = _words) -> None:
        port = _server().address.rpartition(":")[2] if "PORT" in words else ""
        _serve(*(word.replace("PORT", port) for word in words))(folder)

    operators.add(_what, _run)


@operators("a server's folder that is a file")
def _(folder: Path) -> None:
    (folder / "home").write_text("")
    _serve()(folder)


@operators("a second server in one folder")
def _(folder: Path) -> None:
    potluck("serve", experiment(folder, _SERVED), "--home", _server().home, "--port", "0")


@operators("a certificate that is none")
def _(folder: Path) -> None:
    (folder / "cert.pem").write_text("certificate")
    pem = str(folder / "cert.pem")
    _serve("--certificate", pem, "--private-key", pem)(folder)


def _operate(*words: str) -> Callable[[Path], None]:
    return lambda folder: potluck(
        *(word.replace("DIR", str(folder)) for word in words), "--home", _server().home
    )


operators.add("revoke of a device that there is not", _operate("revoke", "0123456789abcdef"))
operators.add("revoke of a word", _operate("revoke", "ward a"))
operators.add("invitations that are over at once", _operate("enroll", "--days", "0"))
operators.add("invitations for ever", _operate("enroll", "--days", "1e9"))
operators.add("too many invitations", _operate("enroll", "--count", "10000000"))
operators.add(
    "a version that there is not", _operate("export", "DIR/m.safetensors", "--version", "9")
)
operators.add("an export into nowhere", _operate("export", "DIR/none/m.safetensors"))


def _csv(folder: Path, columns: int = 64, label: str = "1") -> Path:
    path = folder / "ward.csv"
    header = ",".join([*(f"p{i}" for i in range(columns)), "target"])
    rows = [",".join(["0.5"] * columns + [label]) for _ in range(10)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def _join(*words: str, address: str = "", token: str | None = None) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        given = _invitation() if token is None else token
        named = [word.replace("DIR", str(folder)) for word in words]
        if not any(word in ("--data", "--experiment") for word in named):
            named += ["--experiment", str(experiment(folder))]
        where = ["--home", folder / "device"] if "--home" not in named else []
        tokens = ["--token", given] if given else []
        potluck("join", address or _server().address, "--yes", *tokens, *named, *where)

    return run


for _what, _make in {
    "no invitation": _join(token=""),
    "an invitation that is none": _join(token="hello"),
    "an invitation that lost its end": lambda f: _join(token=_invitation()[:-5])(f),
    "an address that is none": _join(address="wards.example"),
    "an address of FTP": _join(address="ftp://127.0.0.1:1"),
    "plain HTTP to a server with TLS": lambda f: _join(
        address=_server().address.replace("https", "http")
    )(f),
    "no data": lambda f: potluck("join", _server().address, "--token", _invitation()),
    "both kinds of data": _join("--data", "DIR", "--experiment", "DIR/exp.toml"),
    "data that are not there": _join("--data", "DIR/none.csv"),
    "data of another kind": _join("--data", str(Path(__file__))),
    "a client that there is not": _join("--client", "99"),
    "a negative client": _join("--client", "-1"),
    "a daily limit of 0": _join("--daily-limit", "0"),
    "no threads": _join("--threads", "0"),
    "a name that is a page long": _join("--name", "x" * 5000),
    "a target column that there is not": lambda f: _join(
        "--data", str(_csv(f)), "--target-column", "outcome"
    )(f),
    "features of another number": lambda f: _join("--data", str(_csv(f, columns=3)))(f),
    "labels of text": lambda f: _join("--data", str(_csv(f, label="ill")))(f),
    "labels beyond the classes": lambda f: _join("--data", str(_csv(f, label="77")))(f),
    "a hole among the numbers": lambda f: _join("--data", str(_csv(f, label="")))(f),
}.items():
    devices.add(_what, _make)


@devices("an invitation that was used")
def _(folder: Path) -> None:
    invitation = _invitation()
    words = ["--token", invitation, "--experiment", str(experiment(folder))]
    words += ["--home", str(folder / "other"), "--yes"]
    with subprocess.Popen(
        [sys.executable, "-m", "potluck", "join", _server().address, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as other:
        assert other.stdout is not None
        assert any(line.startswith("enrolled") for line in other.stdout)
        other.kill()
    _join(token=invitation)(folder)


@devices("a folder that is a file")
def _(folder: Path) -> None:
    (folder / "file").write_text("")
    _join("--home", str(folder / "file"))(folder)


@devices("images of another size")
def _(folder: Path) -> None:
    np.savez(
        folder / "a.npz",
        inputs=np.zeros((10, 1, 28, 28), np.float32),
        targets=np.arange(10) % 10,
    )
    _join("--data", str(folder / "a.npz"))(folder)
