"""The commands about data: `potluck data list`, `get` and `describe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import Debug, ExperimentFile, Overrides, command

if TYPE_CHECKING:
    from potluck.data import FederatedData

app = typer.Typer(
    help="List, get and describe data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
@command
def list_data(debug: Debug = False) -> None:
    """List the data sets, and whether they are here."""
    from potluck.cli.table_output import show_table
    from potluck.core.formats import format_bytes
    from potluck.data.published_files import catalogue

    show_table(
        ("name", "what", "download", "here", "terms"),
        [
            (
                entry.name,
                entry.what,
                format_bytes(entry.num_bytes) if entry.num_files else "none",
                "yes" if entry.present else "no",
                entry.terms,
            )
            for entry in catalogue()
        ],
    )
    kinds = "'folder', 'table' or 'text'"
    typer.echo(f"Your own data: task.data = {kinds} in an experiment (`potluck init`).")


@app.command("get")
@command
def get_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See `potluck data list`.")],
    debug: Debug = False,
) -> None:
    """Get and check the files of a data set.

    Files that are here already (POTLUCK_DATA, or the cache) are checked, not downloaded.
    """
    from potluck.data.published_files import fetch_all

    paths = fetch_all(name)
    for path in paths:
        typer.echo(path)
    if not paths:
        typer.echo(
            f"{name} comes with Python or an installed package: there is nothing to download."
        )


@app.command("describe")
@command
def describe_data(
    file: ExperimentFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it too, into a .png, .svg or .pdf file."),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the schema of own data, for `serve`."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Describe how an experiment divides its data."""
    from potluck.cli.table_output import show_pairs
    from potluck.config.build import build_data
    from potluck.config.experiment import load_experiment
    from potluck.data.describe import describe, draw

    if out is not None and out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(
            f"--out must end in .png, .svg or .pdf, got {str(out)!r}. Name a file of that kind."
        )
    data = build_data(load_experiment(file, overrides or []))
    show_pairs(describe(data).rows())
    if out is not None:
        draw(data, out)
        typer.echo(f"written: {out}", err=True)
    if schema is not None:
        _write_schema(data, schema)
        typer.echo(f"written: {schema}", err=True)


def _write_schema(data: FederatedData, file: Path) -> None:
    from potluck.core import ConfigError
    from potluck.core.plain_json import to_json

    if data.schema is None:
        raise ConfigError(
            f"a schema is one of own data (task.data = 'folder' or 'table'), got {data.name!r}, "
            "whose devices need none. Leave --schema out."
        )
    file.write_text(to_json(data.schema.to_json(), indent=1) + "\n", encoding="utf-8")
