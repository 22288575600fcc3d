"""Python's own standard library as a corpus: text that every installation has."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from potluck.core import DataError
from potluck.data.federated import Dataset
from potluck.data.lines import line_corpus

_FEWEST_LINES = 3
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# What distributions package apart from Python, or leave out.
_OPTIONAL = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}
)


def pythonlib(*, max_lines_per_client: int = 500) -> Dataset:
    """The source code of the standard library, for next-character prediction; no download.

    Groups are the top-level modules and packages ("json"), nearly 200 of them. Rows are as in
    `potluck.data.lines`, 80 steps each; longer lines go on in a second row. Of each module the
    last 20 % of the lines are test lines, at least one.

    The contents are those of the Python that runs, so numbers compare only within one version
    of it; the digest over all lines in `checksums` says whether they do. Nothing is imported.

    - Blanks at the ends of lines and empty lines are left out; tabs and indentation stay.
    - A package's files follow each other in the order of their paths.
    - Tests are left out, and so are modules that many installations lack (distutils, ensurepip,
      idlelib, lib2to3, tkinter, turtle, turtledemo). So the clients of one version are the same in
      every distribution.
    - Modules with fewer than three lines are left out.

    Args:
        max_lines_per_client: a module's first lines are taken. 500 makes some 70,000 lines; about
            half of the modules have more. 20 is enough for a test.

    Raises:
        DataError: the library's source is not installed.
    """
    if max_lines_per_client < _FEWEST_LINES:
        raise ValueError(
            f"max_lines_per_client must be at least {_FEWEST_LINES}, "
            f"got max_lines_per_client={max_lines_per_client}. 500 is the default."
        )
    names = sorted(sys.stdlib_module_names - _OPTIONAL)
    modules = read_modules(Path(sysconfig.get_path("stdlib")), names, max_lines_per_client)
    return line_corpus("pythonlib", modules, checksums={"pythonlib": _digest(modules)})


def read_modules(folder: Path, names: Iterable[str], max_lines: int) -> dict[str, list[bytes]]:
    """The first lines of each of these modules and packages that `folder` has in source.

    Raises:
        DataError: it has none with three lines.
    """
    modules = {name: list(islice(_lines(_files(folder, name)), max_lines)) for name in names}
    kept = {name: lines for name, lines in modules.items() if len(lines) >= _FEWEST_LINES}
    if not kept:
        raise DataError(
            f"Python's standard library must be installed in source, got no module in "
            f"folder={str(folder)!r}. Use another data set, or another installation of Python."
        )
    return kept


def _files(folder: Path, name: str) -> list[Path]:
    module, package = folder / f"{name}.py", folder / name
    if module.is_file():
        return [module]
    if not (package / "__init__.py").is_file():
        return []  # built in, compiled, or of another platform
    paths = [path.relative_to(package) for path in package.rglob("*.py")]
    return [
        package / path
        for path in sorted(paths, key=lambda path: path.parts)
        if _TEST_FOLDERS.isdisjoint(path.parts)
    ]


def _lines(files: Iterable[Path]) -> Generator[bytes]:
    for file in files:
        for line in file.read_bytes().splitlines():
            stripped = line.rstrip()
            if stripped:
                yield stripped


def _digest(modules: Mapping[str, Sequence[bytes]]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for name, lines in modules.items():
        digest.update(b"\n".join([f"{name} {len(lines)}".encode(), *lines, b""]))
    return digest.hexdigest()
