"""Write docs/cli.md from the commands' own help: `python docs/cli_reference.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from potluck.cli.main import app

_INTRODUCTION = """\
# The command line

What every command says with `--help`, written by `python docs/cli_reference.py`.

An error is one line on stderr and exit status 1 (2 for a command that was not understood, 130
after Ctrl-C). In a terminal, progress is a live bar and tables are drawn; elsewhere, progress is
plain lines, at most one a second, and tables are Markdown.
"""


def reference() -> str:
    """The text of docs/cli.md."""
    parts = [_INTRODUCTION]
    for words in _commands(typer.main.get_command(app)):
        result = CliRunner().invoke(
            app, [*words, "--help"], prog_name="potluck", terminal_width=80, color=False
        )
        parts.append(f"## {' '.join(['potluck', *words])}\n\n```\n{result.output.rstrip()}\n```\n")
    return "\n".join(parts)


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))


if __name__ == "__main__":
    path = Path(__file__).with_name("cli.md")
    path.write_text(reference(), encoding="utf-8")
    print(f"written: {path}")
