"""The command of a device: `potluck join`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import Debug, command, private_files
from potluck.core.formats import printable

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.data.tables.schema import Schema
    from potluck.device import Event

app = typer.Typer(rich_markup_mode=None)


@app.command()
@command
@private_files()
def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server: https://host:port.")],
    token: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="What `potluck enroll` printed for this device; needed once. It may also be in "
            "POTLUCK_TOKEN, which other users of this machine cannot see.",
            envvar="POTLUCK_TOKEN",
            show_envvar=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A .npz, .csv or .parquet file, or a folder with one."),
    ] = None,
    target_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The column of a table that is to be predicted, where the run does not say it; "
            "target if left out.",
        ),
    ] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of --data: play a client of an experiment."),
    ] = None,
    client: Annotated[
        int, typer.Option(metavar="K", help="Which client of the experiment, from 0.")
    ] = 0,
    home: Annotated[
        Path, typer.Option(metavar="DIR", help="Where this device keeps its key and its record.")
    ] = Path("potluck-device"),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="How the operator sees this device.")
    ] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Agree to what the run is to do, as it is when this starts."),
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What a run may do here (docs/what-leaves.md). Where no terminal is, what keeps "
            "to it is agreed to, also later.",
        ),
    ] = None,
    daily_limit: Annotated[
        int | None, typer.Option(metavar="BYTES", min=1, help="Send at most so much in a day.")
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="http://host:port of an HTTP proxy; else HTTPS_PROXY and NO_PROXY say it.",
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Of PyTorch's kernels."),
    ] = 1,
    debug: Debug = False,
) -> None:
    """Take part in a run with this machine's own data, until the run is over.

    What the run is to do is shown first: at a terminal you are asked, elsewhere --yes or --policy
    answers. The data stay here; DIR/sent holds what was sent. A device that was stopped goes on
    when the same command is given again, without --token.
    """
    from potluck.core import ConfigError
    from potluck.device import (
        TorchTrainer,
        check_own,
        load_policy,
        one_client,
        read_own,
        run_until_stopped,
    )
    from potluck.device.transport import proxy_of

    if (data is None) == (experiment is None):
        raise ValueError("either --data or --experiment must be given. Name where the data are.")

    for path in (data, experiment):
        if path is not None and not path.exists():
            raise ValueError(f"the data must be there, got {str(path)!r}, which is not.")

    def load(schema: Schema | None) -> FederatedData:
        if data is not None:
            return read_own(data, target_column=target_column, schema=schema)
        from potluck.config.build import build_data
        from potluck.config.experiment import load_experiment

        assert experiment is not None
        return one_client(build_data(load_experiment(experiment)), client)

    limits = None if policy is None else load_policy(policy)
    way = proxy_of(url, proxy)
    where = str(data or f"client {client} of {experiment}")
    trainer = TorchTrainer(load, threads, where=where)
    if trainer.runtime().name == "none":
        raise ConfigError(
            "a device trains with PyTorch, got a machine without it. "
            "Install it (pip install torch) beside potluck[device]."
        )
    if token is not None:
        if data is not None:
            check_own(data)  # a file that holds no data is refused before the question
        else:
            load(None)
    whole = run_until_stopped(
        url,
        token,
        home,
        trainer,
        name=name,
        limit_bytes=daily_limit,
        proxy=way,
        show=_show,
        policy=limits,
        ask=asking(yes, policy is not None),
    )
    if not whole:
        typer.echo("stopped; what is finished is kept. Give the command again to go on.", err=True)
        raise typer.Exit(143)


def asking(yes: bool, has_policy: bool) -> Callable[[str], bool]:
    """Returns the question to the owner; `--yes` answers once, so that a change needs another."""
    from potluck.device import DeclinedError

    answers = [True] * yes

    def ask(told: str) -> bool:
        typer.echo("\n".join(map(printable, told.splitlines())))
        if answers:
            return answers.pop()
        if sys.stdin.isatty() and sys.stdout.isatty():
            try:
                return typer.confirm("Take part?")
            except typer.Abort:
                return False
        if not has_policy:
            raise DeclinedError(
                "the owner of the data must agree to this, got no terminal to ask at. Give --yes, "
                "or --policy with a file of what a run may do here."
            )
        return True

    return ask


def _show(event: Event) -> None:
    try:
        typer.echo(printable(_told(event)))
    except BrokenPipeError:
        raise
    except OSError:  # the disk that the output goes to is full: no reason to end
        pass


def _told(event: Event) -> str:
    words = [event.what, f"round {event.round}" if event.round else "", event.detail]
    return " ".join(filter(None, words))
