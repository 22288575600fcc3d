"""How a mistake is made and what of it a user sees.

A mistake is a function that gets an empty folder and does one thing wrong: it calls the command
line, or Potluck's Python. `see` makes it in this process and keeps what a terminal would show.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PATIENCE_SECONDS = 120  # a command that still runs then was not refused

# What no user should have to read: private names, reprs of objects, words of other libraries.
# Where our own words say what was expected and got, an error of the user's own code is quoted.
ALWAYS = {
    "a traceback": re.compile(r"Traceback \(most recent|File \".*\", line \d+"),
    "an object's address": re.compile(r" at 0x[0-9a-f]{6,}"),
    "pydantic's words": re.compile(r"validation error for|errors\.pydantic\.dev"),
}
FOREIGN = {
    "a private function": re.compile(r"(?<![\w.])_[a-z]\w+\b(?=\(|\b(?!=))|<lambda>|<locals>"),
    "PyTorch's own words": re.compile(
        r"mat1 and mat2|out of bounds|size of tensor a|grad can be implicitly|"
        r"Expected input batch_size|expected scalar type|Boolean value of Tensor|"
        r"does not require grad and does not have|should have same dtype"
    ),
    "another library's error": re.compile(
        r"KeyError|IndexError|AttributeError|RuntimeError|ValidationError|UnicodeDecodeError|"
        r"ParserError|EmptyDataError|JSONDecodeError|SSLError|sqlalchemy|pydantic|'NoneType'"
    ),
}
_QUOTES = re.compile(r" must .*, got .* and \w+: .*\. [A-Z]")  # expected, got, error, what to do
LONGEST = 600  # characters of a message


class Mistake(NamedTuple):
    """One thing that a user does wrong."""

    area: str
    what: str
    make: Callable[[Path], None]


class Seen(NamedTuple):
    """What came of it."""

    line: str  # what is shown, in one line
    faults: tuple[str, ...]  # what is wrong with that


class Mistakes:
    """A list of mistakes of one area; its decorator adds to it."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.all: list[Mistake] = []

    def __call__(self, what: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
        """Add the function that is decorated."""

        def add(make: Callable[[Path], None]) -> Callable[[Path], None]:
            self.all.append(Mistake(self.area, what, make))
            return make

        return add

    def add(self, what: str, make: Callable[[Path], None]) -> None:
        """The same without a decorator."""
        self.all.append(Mistake(self.area, what, make))


class GoesOn(BaseException):
    """A command was not over in time. No code that tries again after errors catches it."""


class CommandFailed(Exception):
    """A command of the command line that ended with a status other than 0."""


def potluck(*words: object, stdin: str = "") -> None:
    """The command line, in this process.

    Raises:
        CommandFailed: the exit status is not 0; it carries what was printed on stderr.
    """
    from potluck.cli.main import main

    shown, told = io.StringIO(), io.StringIO()
    before, given = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["potluck", *map(str, words)], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
            main()
        status: object = 0
    except SystemExit as left:
        status = left.code
    finally:
        sys.argv, sys.stdin = before, given
    if status not in (0, None):
        raise CommandFailed(told.getvalue())


def see(mistake: Mistake, folder: Path) -> Seen:
    """Make a mistake; tell what is shown, and what is wrong with that."""
    faults: list[str] = []
    log = io.StringIO()
    with _logged(log), _patience(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            mistake.make(folder)
        except CommandFailed as failed:
            line = str(failed)
        except GoesOn:
            line, faults = "(goes on)", ["it was not refused"]
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
            if not _is_ours(error):
                faults.append(f"it is a {type(error).__name__}")
        else:
            line = log.getvalue() or " ".join(str(w.message) for w in warned)
            if not line:
                line, faults = "(nothing)", ["nothing was said"]
    line = _shortened(line, folder)
    return Seen(" ".join(line.split()), (*faults, *found_in(line)))


def found_in(line: str) -> tuple[str, ...]:
    """What in a message is not for users."""
    wrong = ALWAYS if _QUOTES.search(line) else ALWAYS | FOREIGN
    faults = [f"it shows {what}" for what, pattern in wrong.items() if pattern.search(line)]
    if len([part for part in line.splitlines() if part.strip()]) > 8:
        faults.append("it is more than a few lines")
    if len(line) > LONGEST:
        faults.append("it is long")
    return tuple(faults)


def _is_ours(error: Exception) -> bool:
    from potluck.core import PotluckError

    return isinstance(error, PotluckError | ValueError | TypeError) and not isinstance(
        error, UnicodeError
    )


def _shortened(line: str, folder: Path) -> str:
    """Without what is another name or number every time."""
    line = line.replace(str(folder), "DIR").replace(str(Path(__file__).parents[2]), "CLONE")
    line = re.sub(r"/\S*/potluck-mistakes-\w+", "SERVER", line)
    return re.sub(r"(?<=127\.0\.0\.1:)\d{4,}", "PORT", re.sub(r"\b[0-9a-f]{32}\b", "ID", line))


@contextlib.contextmanager
def _logged(log: io.StringIO) -> Iterator[None]:
    """Keep the warnings of Potluck's log: they are shown to users as well."""
    handler = logging.StreamHandler(log)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("potluck")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def over(*_: object) -> None:
        raise GoesOn

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
