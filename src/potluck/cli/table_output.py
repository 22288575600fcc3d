"""Prints tables, and names with values, for all commands.

In a terminal tables are drawn; elsewhere they are Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from potluck.core.formats import markdown, printable


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int | None = None
) -> None:
    """Prints a drawn table in a terminal, and Markdown elsewhere.

    Args:
        keys: split a table that is wider than the terminal into several, each of which starts
            with this many columns; without it, cells are wrapped.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    header = [printable(cell) for cell in header]
    rows = [[printable(cell) for cell in row] for row in rows]
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        typer.echo(markdown(header, rows), nl=False)
        return
    parts: list[Sequence[int]] = [range(len(header))]
    if keys is not None:
        widths = [max(map(cell_len, column)) + 3 for column in zip(header, *rows, strict=True)]
        parts = _split(widths, console.width - 1, keys)
    for part in parts:
        shown = Table(*(header[i] for i in part), box=box.SIMPLE_HEAD, header_style="bold")
        for row in rows:
            shown.add_row(*(row[i] for i in part))
        console.print(shown)


def show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Prints names and values in two columns."""
    shown = [(printable(name), printable(value)) for name, value in pairs]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        typer.echo(f"{name:<{width}}  {value}")


def _split(widths: Sequence[int], room: int, keys: int) -> list[Sequence[int]]:
    """Columns in groups that fit, each after the key columns."""
    lead = list(range(keys))
    groups: list[Sequence[int]] = [lead]
    for column in range(keys, len(widths)):
        if sum(widths[i] for i in groups[-1]) + widths[column] > room and len(groups[-1]) > keys:
            groups.append(lead)
        groups[-1] = [*groups[-1], column]
    return groups
