"""Shakespeare's complete works by speaking role: the paper's language-model data."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from potluck.core import DataError
from potluck.data.federated import Dataset
from potluck.data.lines import line_corpus
from potluck.data.published_files import checksums, fetch

Variant: TypeAlias = Literal["clean", "paper"]

_FILE = "shakespeare/t8.shakespeare.txt"
_AUTHOR = "by William Shakespeare"
_POEMS = ("THE SONNETS", "A LOVER'S COMPLAINT")
_FLUSH_PLAY = "THE COMEDY OF ERRORS"
_FEWEST_LINES = 3
_NOTICE = re.compile(r"<<THIS ELECTRONIC VERSION.*?>>", re.DOTALL)


class _Layout(NamedTuple):
    """The two patterns of a speech in print. Both match whole lines without trailing blanks."""

    opening: re.Pattern[str]  # role, first line
    more: re.Pattern[str]  # one more line


_INDENTED = _Layout(
    opening=re.compile(r"  ([A-Za-z][A-Za-z ]*)\. (.+)"), more=re.compile(r" {4}(.+)")
)
_FLUSH = _Layout(opening=re.compile(r"([A-Za-z][A-Za-z ]*)\. (.+)"), more=re.compile(r"(.+)"))


def shakespeare(*, variant: Variant = "clean") -> Dataset:
    """The lines of every speaking role of every play, for next-character prediction.

    Groups are roles, named "PLAY / Role". Rows are as in `potluck.data.lines`, 80 steps each.

        variant   roles   characters: train       test
        clean     1,144             3,566,303    870,494
        paper     1,146             3,570,710    871,694

    The paper gives 1,146 roles, 3,564,579 and 870,014 characters and no rule. This one, found by
    trial, comes within 0.2 % of the characters:

    1. A play begins at a line `by William Shakespeare`; its title is the last line above that is
       not empty. Two of the 38 works are poems, without roles: THE SONNETS, A LOVER'S COMPLAINT.
    2. Blanks at the ends of lines do not count.
    3. Two spaces (no more), a name made of letters and spaces, a full stop, a space and some text
       open a speech. The role is the name together with the play, and its line is the text.
    4. Until another speech opens, a line that is indented by four spaces or more is one more line
       of the role. Those four spaces are taken off, further ones stay.
    5. THE COMEDY OF ERRORS is printed otherwise: a speech opens at the margin, every line after
       it that is not empty belongs to it, unchanged, and a line such as `ACT II. SCENE 1`, which
       would look like a role, ends it.
    6. Roles with fewer than three lines are left out. Of the n others the last max(1, ⌊n/5⌋)
       lines are test lines. Each line counts with its newline.

    That is "paper". In THE COMEDY OF ERRORS rule 5 includes lines that Shakespeare did not write:
    stage directions, and the publisher's notice between the scenes, where two sentences look like
    roles (WITH PERMISSION, COMMERCIALLY). "clean" removes each notice, from `<<THIS ELECTRONIC
    VERSION` to `>>`, and lets an empty line end a speech there too. Other plays are alike in both.

    One line is longer than 79 bytes: 81, a test line of Orlando in AS YOU LIKE IT. It fills two
    rows, so that there is one row more than there are lines.

    The text may be passed on for personal and non-commercial use only; it is no part of Potluck.

    Raises:
        DataError: the file cannot be had, or is not the published one.
    """
    if variant not in get_args(Variant):
        raise ValueError(
            f"variant must be 'clean' or 'paper', got variant={variant!r}. "
            "'clean' leaves out what Shakespeare did not write."
        )
    roles = read_roles(fetch(_FILE), variant)
    return line_corpus(
        "shakespeare",
        {role: [line.encode("ascii") for line in lines] for role, lines in roles.items()},
        checksums=checksums(_FILE),
    )


def read_roles(path: Path, variant: Variant = "clean") -> dict[str, list[str]]:
    """The lines of each role with at least three, roles in the order of their first line.

    Raises:
        DataError: not ASCII, no play, or no role.
    """
    try:
        text = path.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} must be ASCII text, got byte={error.object[error.start]} at {error.start}. "
            "Remove it, so that it is downloaded anew."
        ) from None
    roles: dict[str, list[str]] = {}
    for title, lines in _plays(text if variant == "paper" else _NOTICE.sub("", text)):
        layout = _FLUSH if title == _FLUSH_PLAY else _INDENTED
        ends_at_blank = layout is _FLUSH and variant == "clean"
        for name, line in _speeches(lines, layout, ends_at_blank):
            roles.setdefault(f"{title} / {name}", []).append(line)
    kept = {role: lines for role, lines in roles.items() if len(lines) >= _FEWEST_LINES}
    if not kept:
        raise DataError(
            f"{path} must hold plays, each after a line {_AUTHOR!r}, with speeches, got no role "
            f"with {_FEWEST_LINES} lines. Remove it, so that it is downloaded anew."
        )
    return kept


def _plays(text: str) -> Generator[tuple[str, list[str]]]:
    """The title and the lines of each play; the lines end where the next author is named."""
    lines = [line.rstrip() for line in text.split("\n")]
    authors = [i for i, line in enumerate(lines) if line == _AUTHOR]
    for here, there in pairwise([*authors, len(lines)]):
        title = next((line.strip() for line in reversed(lines[:here]) if line), "")
        if title not in _POEMS:
            yield title, lines[here + 1 : there]


def _speeches(
    lines: Iterable[str], layout: _Layout, ends_at_blank: bool
) -> Generator[tuple[str, str]]:
    """Yields the speaker and the text of every line that is spoken."""
    role: str | None = None
    for line in lines:
        if opening := layout.opening.fullmatch(line):
            name, first = opening.groups()
            role = None if layout is _FLUSH and name.startswith("ACT ") else name
            if role is not None:
                yield role, first
        elif role is not None and (more := layout.more.fullmatch(line)):
            yield role, more[1]
        elif not line and ends_at_blank:
            role = None
