"""Colours and file writing of all figures; the same runs give the same files."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Writes a matplotlib figure into each of `paths`; their suffixes are the formats."""
    matplotlib: Any = importlib.import_module("matplotlib")  # slow, and seldom needed
    with matplotlib.rc_context({"svg.hashsalt": "potluck"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata)
