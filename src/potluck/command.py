"""What all commands share: errors in one line, and the options that mean the same everywhere."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from potluck.formats import printable

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
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_SERVER_MODULES = (
    "alembic",
    "h11",
    "httpx",
    "jinja2",
    "leather",
    "obstore",
    "prometheus_client",
    "psycopg",
    "sqlalchemy",
    "starlette",
    "uvicorn",
)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn an error into one line on stderr and exit status 1, unless `debug` is set."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from potluck.core import PotluckError

        try:
            function(*args, **kwargs)
        except (PotluckError, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            if kwargs.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            typer.echo(f"error: {printable(_one_line(error))}", err=True)
            raise typer.Exit(1) from None

    return wrapped


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").split(".")[0]
        extra = "ray" if module == "ray" else "server" if module in _SERVER_MODULES else "sim"
        return f"this command needs {error.name}. Install it with: pip install 'potluck[{extra}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__
