"""Renders the dashboard from the database as HTML, in sections that change independently.

Templates escape everything but the HTML of the charts, which escape theirs.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from sqlalchemy import select

from potluck.core.plain_json import to_json
from potluck.core.target import is_result
from potluck.server.dashboard.charts import draw
from potluck.server.dashboard.events import Snapshot
from potluck.server.dashboard.queries import (
    AssignmentCounts,
    Overview,
    Past,
    read_mark,
    read_overview,
)
from potluck.server.storage.context import Context
from potluck.server.storage.database_tables import runs

SECTIONS = ("summary", "round", "charts", "rounds", "abandoned", "classes", "devices")
_AGAIN_SECONDS = 15.0  # for changes without a mark: the devices that were seen lately


class Renderer:
    """Renders one run; one thread at a time."""

    def __init__(self, context: Context, run: str) -> None:
        self._context, self._run = context, run
        self._past = Past()
        self._one = threading.Lock()
        self._mark: tuple[Any, ...] | None = None
        self._read = 0.0
        self._last = Snapshot("", {})
        self._drawn: tuple[Any, Markup] = (None, Markup())
        self._pages = Environment(
            loader=PackageLoader("potluck.server.dashboard", "pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._pages.filters |= {"moment": moment, "size": size, "percent": percent}
        self._pages.filters |= {"span": span, "score": score}

    def snapshot(self) -> Snapshot:
        """Returns the present content, by one query where nothing has changed."""
        with self._one, self._context.database.read() as db:
            mark = read_mark(db, self._run)
            if mark == self._mark and time.monotonic() - self._read < _AGAIN_SECONDS:
                return self._last
            seen = read_overview(db, self._run, self._context.now(), self._past)
        sections = self._render(seen)
        digest = hashlib.sha256(to_json(sections, sort_keys=True).encode()).hexdigest()[:16]
        self._mark, self._read = mark, time.monotonic()
        self._last = Snapshot(digest, sections)
        return self._last

    def page(self, snapshot: Snapshot) -> str:
        """Returns the whole page."""
        with self._context.database.read() as db:
            row = db.execute(select(runs).where(runs.c.id == self._run)).one()
        asked = json.loads(row.experiment) | {"rounds": json.loads(row.settings)}
        sections = {name: Markup(text) for name, text in snapshot.sections.items()}
        return self._pages.get_template("dashboard.html").render(
            run=row.name, seen=snapshot.id, sections=sections, configuration=_groups(asked)
        )

    def sign_in(self, message: str = "") -> str:
        """Returns the page for those who are not in."""
        return self._pages.get_template("sign_in.html").render(message=message)

    def _render(self, seen: Overview) -> dict[str, str]:
        total = sum((row.tally for row in seen.classes), AssignmentCounts())
        values = {"o": seen, "total": total, "charts": self._charts(seen)}
        return {name: self._pages.get_template(f"{name}.html").render(values) for name in SECTIONS}

    def _charts(self, seen: Overview) -> Markup:
        key = (len(seen.history), sum(map(len, seen.scores.values())), seen.uplink_bytes)
        if self._drawn[0] != key:
            self._drawn = (key, Markup("").join(_figures(seen)))
        return self._drawn[1]


def moment(milliseconds: int) -> str:
    """Returns a time, in UTC; – for one that no calendar has."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "–"


def score(value: float | None) -> str:
    """Returns a loss with as many digits as a person reads; – for none."""
    if not is_result(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.4g}"


def size(num_bytes: float) -> str:
    """Returns a number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def percent(value: float) -> str:
    """Returns a part as a percentage."""
    return f"{100 * value:.1f} %"


def span(milliseconds: int) -> str:
    """Returns a duration in words."""
    seconds = milliseconds / 1000
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _figures(seen: Overview) -> list[Markup]:
    up = [(r.number, float(r.uplink_bytes or 0)) for r in seen.history]
    down = [(r.number, float(r.downlink_bytes or 0)) for r in seen.history]
    is_share = all(0 <= v <= 1 for points in seen.scores.values() for _, v in points)
    drawn = {
        "Accuracy": draw("Accuracy", seen.scores, top=1.0 if is_share else None),
        "Loss": draw("Loss", seen.losses),
        "Bytes per round": draw("Bytes per round", {"up": up, "down": down}, label=size),
    }
    none = "Nothing yet: it comes with the first committed round."
    return [
        Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(
            name,
            Markup(svg) if svg else none,
        )
        for name, svg in drawn.items()
    ]


def _groups(asked: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Returns the configuration as sections of key and value, as an experiment file has them."""
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for name, value in asked.items():
        if isinstance(value, dict):
            pairs: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
            groups[name] = [(k, _said(v)) for k, v in pairs.items() if v is not None]
        elif value is not None:
            groups[""].append((name, _said(value)))
    return {name: pairs for name, pairs in groups.items() if pairs}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)
