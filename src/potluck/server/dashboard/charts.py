"""Curves over the rounds, as SVG that takes its colours from the page's stylesheet."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 440, 260
MAX_POINTS = 240
_TOP, _RIGHT, _BOTTOM = 40, WIDTH - 14, HEIGHT - 42  # of the area of the curves
_FARTHEST = 1e100  # what is drawn has finite sums
_COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#64748b")
_DASHES = ("none", "6,3", "2,3", "8,3,2,3", "4,2", "1,2")


def draw(
    title: str,
    curves: Mapping[str, Points],
    *,
    top: float | None = None,
    label: Callable[[float], str] = "{:g}".format,
) -> str:
    """Returns a chart of curves by name, from zero up; "" where there is no point.

    Args:
        top: of the vertical axis; None: of the highest point.
        label: a number of the vertical axis in words.
    """
    shown: dict[str, Points] = {}
    for name, points in curves.items():
        finite = [(n, min(max(v, -_FARTHEST), _FARTHEST)) for n, v in points if math.isfinite(v)]
        if finite:
            shown[name] = thin(finite)
    if not shown:
        return ""
    values = [value for points in shown.values() for _, value in points]
    last = max(number for points in shown.values() for number, _ in points)
    rows = _ticks(min(0.0, *values), max(0.0, *values) if top is None else top)
    columns = range(0, max(last, 1) + 1, max(int(_step(last)), 1))
    left = 16 + 7 * max(len(label(row)) for row in rows)

    def x(number: float) -> float:
        return round(left + (_RIGHT - left) * number / max(last, 1), 2)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (value - rows[0]) / (rows[-1] - rows[0]), 2)

    told = "; ".join(f"{name}: {points[-1][1]:.4g}" for name, points in shown.items())
    told = html.escape(f"{title}, after round {last}: {told}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">']
    for row in rows:
        parts.append(f'<path d="M{left} {y(row)}H{_RIGHT}"/>')
        parts.append(_text(left - 8, y(row) + 4, "end", label(row)))
    for column in columns:
        parts.append(f'<path d="M{x(column)} {_TOP}V{_BOTTOM}"/>')
        parts.append(_text(x(column), _BOTTOM + 16, "middle", str(column)))
    names = ""
    for (name, points), color, dashes in zip(shown.items(), _COLORS, _DASHES, strict=False):
        line = " ".join(f"{x(number)},{y(value)}" for number, value in points)
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{line}" {style}/>')
        cx, cy = x(points[-1][0]), y(points[-1][1])
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{color}"/>')
        names += f'<tspan fill="{color}">■</tspan> {html.escape(name)}&#160; '
    parts.append(_text(left, 22, "start", names))
    return "".join([*parts, _text((left + _RIGHT) / 2, HEIGHT - 4, "middle", "round"), "</svg>"])


def thin(points: Points) -> Points:
    """Returns at most about `MAX_POINTS` of the points, the first and the last included."""
    step = -(-len(points) // MAX_POINTS)
    kept = list(points[::step]) if step > 1 else list(points)
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _text(x: float, y: float, anchor: str, content: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{content}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Returns round numbers, of which the first is at most `low` and the last at least `high`."""
    high = high if high > low else 1.0
    step = _step(high - low)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _step(span: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, of which at most five make up `span`."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-9)) - 1)
    return next(power * factor for factor in (1, 2, 5, 10, 20, 50) if span <= 5 * power * factor)
