"""Options and one-line errors that all commands share."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from potluck.core.formats import printable

P = ParamSpec("P")

ExperimentFile = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT.toml", help="`potluck init` writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value of the file: run.rounds=20. Repeatable."
    ),
]
HomeFolder = Annotated[
    Path,
    typer.Option("--home", metavar="DIR", help="The server's folder: state, keys, admin socket."),
]
HOME = Path("potluck-server")
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_SERVER_MODULES = (
    "alembic",
    "h11",
    "httpx",
    "jinja2",
    "obstore",
    "prometheus_client",
    "psycopg",
    "sqlalchemy",
    "sse_starlette",
    "starlette",
    "uvicorn",
)


_EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError)
_PLACES = {  # what was expected of a path, and what to do, by the system's error
    errno.ENOENT: ("a file or folder must exist", "Create it, or name another."),
    errno.EISDIR: ("a file must be named, and no folder", "Name a file in it."),
    errno.ENOTDIR: ("a folder must be named, and no file", "Name a folder."),
    errno.EEXIST: ("a folder must be named, and no file", "Name another."),
    errno.EACCES: ("the place must be open to you", "Change its permissions, or name another."),
    errno.EPERM: ("the place must be open to you", "Change its permissions, or name another."),
    errno.EROFS: ("the place must be writable", "Name another."),
    errno.ENOSPC: ("there must be room on the disk", "Make room, and give the command again."),
    errno.EDQUOT: ("there must be room on the disk", "Make room, and give the command again."),
    errno.ENAMETOOLONG: ("a name must be short enough for the disk", "Name another."),
    errno.ELOOP: ("a file or folder must exist", "Mend the links, or name another."),
}


@contextlib.contextmanager
def private_files() -> Generator[None]:
    """Makes the files written in this block readable by this user alone: keys, updates, sent
    data."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turns an error into one line on stderr and exit status 1, unless `debug` is set."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from potluck.core import PotluckError

        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise  # Typer's own ways to leave
        except Exception as error:
            if kwargs.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            known = isinstance(error, (PotluckError, *_EXPECTED))
            words = _one_line(error) if known else _unexpected(error)
            typer.echo(f"error: {printable(words)}", err=True)
            raise typer.Exit(1) from None

    return wrapped


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return (
            "there must be memory for what is asked, got too little. Use a smaller cohort, fewer "
            "workers or a smaller model."
        )
    words = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {words}. This was not expected to happen. --debug shows where it "
        "did; please report it with that."
    )


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").split(".")[0]
        extra = "ray" if module == "ray" else "server" if module in _SERVER_MODULES else "sim"
        return f"this command needs {error.name}. Install it with: pip install 'potluck[{extra}]'"
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f" for {str(error.filename)!r}"
        expected, remedy = _PLACES.get(
            error.errno or 0, ("the system must do what is asked", "Look at what it says.")
        )
        return f"{expected}, got {error.strerror!r}{where}. {remedy}"
    return " ".join(str(error).split()) or type(error).__name__
