"""A line plot as SVG text: one line a series, axes with round numbers, a legend."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 400, 60, 60, 20, 50
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright scheme


def colour(number: int) -> str:
    """The colour of a series, or of a contributor by its place in the plan: the same in every figure."""
    return COLOURS[number % len(COLOURS)]


def line_plot(lines: Mapping[str, Points], *, title: str, x: str, y: str) -> str:
    """`lines` by name, each a sequence of (x, y); at least one point in all."""
    points = [p for line in lines.values() for p in line]
    across, up = _ticks([p[0] for p in points]), _ticks([p[1] for p in points])

    def place(point: tuple[float, float]) -> str:
        return f"{_at_x(point[0], across):.1f},{_at_y(point[1], up):.1f}"

    parts = [_text(_WIDTH / 2, 22, title, size=15), _text(_WIDTH / 2, _HEIGHT - 10, x)]
    parts.append(
        f'<text x="14" y="{_HEIGHT / 2}" transform="rotate(-90 14 {_HEIGHT / 2})" {_FONT}>{html.escape(y)}</text>'
    )
    parts += [_rule_x(v, across) for v in across] + [_rule_y(v, up) for v in up]
    for number, (name, line) in enumerate(lines.items()):
        shade = colour(number)
        drawn = " ".join(place(p) for p in line)
        dash = "" if number < len(COLOURS) else ' stroke-dasharray="5 3"'
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{shade}" stroke-width="2"{dash}/>')
        parts += [
            f'<circle cx="{p[0]}" cy="{p[1]}" r="3" fill="{shade}"/>' for p in (place(q).split(",") for q in line)
        ]
        left = _LEFT + 130 * number
        parts.append(f'<rect x="{left}" y="{_TOP - 22}" width="12" height="4" fill="{shade}"/>')
        parts.append(_text(left + 18, _TOP - 16, name, anchor="start"))
    body = "\n".join(parts)
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{ground}\n{body}\n</svg>\n'


_FONT = 'font-family="sans-serif" font-size="12" text-anchor="middle" fill="#222"'


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least to above the greatest value."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    raw = 10 ** math.floor(math.log10(span / 5))
    step = next(raw * f for f in (1, 2, 5, 10) if span / (raw * f) <= 6)
    first = math.floor(low / step)
    return [round(i * step, 10) for i in range(first, math.ceil(high / step) + 1)] or [low]


def _at_x(value: float, ticks: Sequence[float]) -> float:
    return _LEFT + (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1) * (_WIDTH - _LEFT - _RIGHT)


def _at_y(value: float, ticks: Sequence[float]) -> float:
    return _HEIGHT - _BOTTOM - (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1) * (_HEIGHT - _TOP - _BOTTOM)


def _rule_x(value: float, ticks: Sequence[float]) -> str:
    return _text(_at_x(value, ticks), _HEIGHT - _BOTTOM + 18, f"{value:g}")


def _rule_y(value: float, ticks: Sequence[float]) -> str:
    y = _at_y(value, ticks)
    rule = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
    return rule + _text(_LEFT - 8, y + 4, f"{value:g}", anchor="end")


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    style = f'font-family="sans-serif" font-size="{size}" text-anchor="{anchor}" fill="#222"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(text)}</text>'
