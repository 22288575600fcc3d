"""What every command shares: an error is one line on stderr, unless `--debug` is given."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

P = ParamSpec("P")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None

    return wrapped


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs {error.name}. Install it with: pip install 'potluck[sim]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__
