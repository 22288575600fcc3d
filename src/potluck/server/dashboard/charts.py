"""Curves over the rounds, as SVG that takes its colours from the page.

Leather draws them; its attributes give way to the stylesheet, so one drawing serves light and dark.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import leather  # pyright: ignore[reportMissingTypeStubs]

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 440, 260
MAX_POINTS = 240
_FARTHEST = 1e15  # Leather counts in decimals of 28 digits
_COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#64748b")
_DASHES = ("none", "6,3", "2,3", "8,3,2,3", "4,2", "1,2")
_DIGITS = re.compile(r"(\d+\.\d\d)\d+")


def draw(
    title: str,
    curves: Mapping[str, Points],
    *,
    top: float | None = None,
    label: Callable[[float], str] | None = None,
) -> str:
    """A chart of curves by name, from zero up; "" where there is no point.

    Args:
        top: of the vertical axis; None: of the highest point.
        label: a number of the vertical axis in words.
    """
    shown = {name: thin(_drawable(points)) for name, points in curves.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    everything = [point for points in shown.values() for point in points]
    last = max(number for number, _ in everything)
    high = top if top is not None else max(value for _, value in everything)
    chart: Any = leather.Chart()
    chart.add_x_scale(0, max(last, 1))
    chart.add_y_scale(min(0.0, *(v for _, v in everything), 0.0), high if high > 0 else 1.0)
    chart.add_x_axis(ticks=_ticks(max(last, 1)), name="round")
    if label is not None:
        spoken = label

        def said(value: Any, _index: int, _count: int) -> str:
            return spoken(float(value))

        chart.add_y_axis(tick_formatter=said)
    for (name, points), color, dash in zip(shown.items(), _COLORS, _DASHES, strict=False):
        if len(points) > 1:
            chart.add_line(points, name=name, stroke_color=color, stroke_dasharray=dash)
        else:
            chart.add_dots(points, name=name, fill_color=color, radius=4)
    svg = _DIGITS.sub(r"\1", chart.to_svg(width=WIDTH, height=HEIGHT))
    told = "; ".join(f"{name}: {points[-1][1]:.4g}" for name, points in shown.items())
    told = html.escape(f"{title}, after round {last}: {told}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}"'
    return svg.replace(f'<svg width="{WIDTH}" height="{HEIGHT}"', head, 1)


def thin(points: Points) -> Points:
    """At most about `MAX_POINTS` of them, the first and the last included."""
    step = -(-len(points) // MAX_POINTS)
    kept = list(points[::step]) if step > 1 else list(points)
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _drawable(points: Points) -> Points:
    """Those that have a place: finite ones, as far as numbers have digits for an axis."""
    return [(n, min(max(v, -_FARTHEST), _FARTHEST)) for n, v in points if math.isfinite(v)]


def _ticks(last: int) -> list[int]:
    step = next(
        step
        for power in range(20)
        for step in (10**power, 2 * 10**power, 5 * 10**power)
        if last / step <= 5
    )
    return list(range(0, last + 1, step))
