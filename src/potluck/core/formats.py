"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def printable(text: str) -> str:
    """Returns the text on one line, with what a terminal would act upon as Python writes it.

    That is line ends, terminal codes, and marks that turn the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_bytes(number: float) -> str:
    """Returns a number of bytes in decimal units with three digits: 796840 is 797 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB" if number < 999.5 else f"{number:.0f} TB"


def format_seconds(seconds: float) -> str:
    """Returns a duration as 4.2 s, 3 min 07 s or 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_score(score: float) -> str:
    """Returns four decimals, or as many digits of a large score; – for no result."""
    if not math.isfinite(score):
        return "–"
    return f"{score:.4f}" if abs(score) < 1000 else f"{score:.6g}"
