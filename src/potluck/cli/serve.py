"""The command of a server: `potluck serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from potluck.cli.options import (
    HOME,
    Debug,
    ExperimentFile,
    HomeFolder,
    Overrides,
    command,
    private_files,
)

app = typer.Typer(rich_markup_mode=None)

LogLevel = Literal["debug", "info", "warning", "error"]


@app.command()
@command
@private_files()
def serve(
    file: ExperimentFile,
    overrides: Overrides = None,
    home: HomeFolder = HOME,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8443,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            metavar="HOST[:PORT]",
            help="What devices call the server, where its address and certificate do not tell: "
            "behind a proxy, say. Repeatable; the first is shown.",
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(metavar="URL", help="postgresql://… or sqlite:///…, instead of DIR's own."),
    ] = None,
    blobs: Annotated[
        str | None, typer.Option(metavar="URL", help="A folder or s3://…, instead of DIR's own.")
    ] = None,
    goal: Annotated[
        int | None, typer.Option(metavar="N", help="Reports at which a round is closed.")
    ] = None,
    minimum: Annotated[
        float | None, typer.Option(metavar="PART", help="Of the goal; fewer abandon the round.")
    ] = None,
    over_selection: Annotated[
        float | None, typer.Option(metavar="TIMES", help="Devices selected, times the goal.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM, instead of one of the server's own.")
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of --certificate.")
    ] = None,
    insecure_loopback: Annotated[
        bool, typer.Option("--insecure-loopback", help="Plain HTTP, on loopback alone.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Begin anew: what is in DIR is moved into a folder there, and kept."
        ),
    ] = False,
    restored: Annotated[
        bool,
        typer.Option(
            "--restored",
            help="Once, after the state was restored from a backup: devices take its older models.",
        ),
    ] = False,
    log_level: Annotated[
        LogLevel | None,
        typer.Option(help="info if left out, or warning on a terminal.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train an experiment with real devices, which come to this server.

    The section [server] of the file says how rounds go. A server that was stopped, in whatever
    way, goes on when the same command is given again.
    """
    from potluck.config.experiment import load_experiment
    from potluck.config.round_settings import in_words
    from potluck.server.evaluator import evaluated_on
    from potluck.server.http.listening import Listen
    from potluck.server.logs import log_to_stderr
    from potluck.server.open_run import open_server

    options = {"goal": goal, "minimum": minimum, "over_selection": over_selection}
    changes = [f"server.{name}={value}" for name, value in options.items() if value is not None]
    given = [*(overrides or []), *changes]
    listen = Listen(
        host=host,
        port=port,
        plaintext=insecure_loopback,
        certificate=certificate,
        private_key=private_key,
        names=tuple(names or ()),
    )
    is_terminal = sys.stdout.isatty()
    log_to_stderr(log_level or ("warning" if is_terminal else "info"), plain=is_terminal)
    if fresh:
        _begin_anew(home, database, blobs)
    show = typer.echo if is_terminal else None
    server = open_server(file, given, home, listen, database, blobs, show, restored=restored)
    for name, value in (
        ("run", server.served.name),
        ("address", server.address),
        ("certificate", server.certificate or "none: plain HTTP"),
        *in_words(server.served.settings),
        *(("kept", told) for told in server.served.kept),
        ("evaluation", evaluated_on(load_experiment(file, given))),
        ("dashboard", f"{server.address}/dashboard (a link that signs in: potluck dashboard)"),
        ("admin", home / "admin.sock"),
    ):
        typer.echo(f"{name:12} {value}")
    server.serve()


def _begin_anew(folder: Path, database: str | None, blobs: str | None) -> None:
    """Moves the content of a server's folder aside, and shows its new place."""
    from potluck.core import ConfigError
    from potluck.server.storage.state_folder import StateFolder

    if database is not None or blobs is not None:
        raise ConfigError(
            "--fresh puts aside what is in the server's own folder, got --database or --blobs. "
            "Give the experiment another name, or name an empty database and bucket."
        )
    aside = StateFolder(folder).put_aside()
    if aside is None:
        typer.echo(f"{'fresh':12} {folder} held no run: nothing was moved")
        return
    typer.echo(f"{'fresh':12} the old state and signing keys are in {aside}; nothing was deleted")
    typer.echo(f"{'':12} to go on with the old run: potluck serve OLD.toml --home {aside}")
    typer.echo(f"{'':12} devices of the old run need new invitations (and another --home)")
