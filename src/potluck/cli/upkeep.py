"""The commands that keep a served run: `potluck set`, `potluck backup`, `potluck restore`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.operate import operator_of
from potluck.cli.options import HOME, Debug, HomeFolder, command, private_files

if TYPE_CHECKING:
    from potluck.server.storage.backup import Copied

app = typer.Typer(rich_markup_mode=None)

Place = Annotated[
    str | None, typer.Option(metavar="URL", help="As for `potluck serve`, instead of DIR's own.")
]


@app.command("set")
@command
def set_keys(
    changes: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE", help="report_seconds=60, run.rounds=9"),
    ],
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Change what decides no numbers of the model, while the run goes on.

    These are the keys of [server] but for selection and needs_*, run.rounds and
    run.evaluate_every. The experiment file may stay as it is.
    """
    from potluck.config.section import override
    from potluck.core.plain_json import to_json

    asked: dict[str, Any] = {}
    for change in changes:
        override(asked, change)
    for key, (old, new) in operator_of(home).post("set", **asked).items():
        typer.echo(f"{key} = {to_json(new)}, and was {to_json(old)}")


@app.command()
@command
@private_files()
def backup(
    to: Annotated[Path, typer.Argument(metavar="BACKUP", help="A folder, new or of a backup.")],
    home: HomeFolder = HOME,
    database: Place = None,
    blobs: Place = None,
    debug: Debug = False,
) -> None:
    """Copy a run: database, models and keys. Servers may be at work meanwhile.

    The copy holds the run's secrets. Given the same folder again, only new models are copied.
    """
    from potluck.server.storage.backup import back_up
    from potluck.server.storage.state_folder import StateFolder

    _tell("backed up", back_up(StateFolder(home), database, blobs, to))


@app.command()
@command
@private_files()
def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="`potluck backup` made it.")],
    home: HomeFolder = HOME,
    database: Place = None,
    blobs: Place = None,
    debug: Debug = False,
) -> None:
    """Put a copy back into an empty folder, or an empty database.

    Then start the server once with `potluck serve --restored`: devices have seen newer models, and
    take the older ones from a server that says so.
    """
    from potluck.server.storage.backup import restore
    from potluck.server.storage.state_folder import StateFolder

    _tell("restored", restore(backup, StateFolder(home), database, blobs))
    typer.echo("Start the server once with --restored: potluck serve … --restored")


def _tell(what: str, copied: Copied) -> None:
    for name, rounds in copied.runs:
        held = f"the database and {copied.models} files of models"
        typer.echo(f"{what}: the run {name!r} after {rounds} rounds, {held}")
    for key in copied.missing:
        typer.echo(f"left out, since it is missing or damaged: {key}", err=True)
