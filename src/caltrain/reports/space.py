"""Points in a plane as SVG paths: dots by contributor, dots by suspicion, rings, crosses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from caltrain.demo.result import Point, Space
from caltrain.reports.plot import colour

WIDTH, HEIGHT = 440, 340
_MARGIN = 10
_LEVELS = ((0.1, "#94a3b8"), (0.25, "#eab308"), (0.5, "#f97316"), (1.01, "#dc2626"))
_RING, _ARM = 5, 3
Place = Callable[[float, float], tuple[float, float]]


class Layer(NamedTuple):
    """Dots of one colour: what they are, how many, their path."""

    name: str
    colour: str
    dots: int
    path: str


class Panel(NamedTuple):
    """One view of the points: dots in layers, and a ring around some of them."""

    title: str
    layers: tuple[Layer, ...]
    ringed: str
    rings: str


class Panels(NamedTuple):
    """Both views, and the inputs as crosses that lie behind both."""

    views: tuple[Panel, Panel]
    crosses: str


def panels(space: Space, parties: Sequence[str]) -> Panels:
    """By contributor with the verdict's records ringed, and by suspicion with those ringed that were planted."""
    place = _scale(space)
    owners = ((name, colour(i), lambda p, n=name: p.party == n) for i, name in enumerate(parties))
    by_owner = Panel(
        "by contributor",
        tuple(_layer(space.records, place, *owner) for owner in owners),
        "named by the verdict",
        _rings(place, (p for p in space.records if p.suspect)),
    )
    lows = (0.0, *(high for high, _ in _LEVELS))
    levels = (
        (_range(low, high), shade, lambda p, lo=low, hi=high: lo <= p.suspicion < hi)
        for low, (high, shade) in zip(lows, _LEVELS, strict=False)
    )
    by_suspicion = Panel(
        "by suspicion, before the release",
        tuple(_layer(space.records, place, *level) for level in levels),
        "planted (the demo knows)",
        _rings(place, (p for p in space.records if p.planted)),
    )
    return Panels((by_owner, by_suspicion), _crosses(place, space.inputs))


def _layer(points: Iterable[Point], place: Place, name: str, shade: str, belongs: Callable[[Point], bool]) -> Layer:
    own = [place(p.x, p.y) for p in points if belongs(p)]
    # Lines of no length with round ends: a dot in a dozen bytes.
    return Layer(name, shade, len(own), "".join(f"M{x:.1f} {y:.1f}h0" for x, y in own))


def _range(low: float, high: float) -> str:
    return f"{low:g} to {min(high, 1):g}"


def _rings(place: Place, points: Iterable[Point]) -> str:
    turn = f"a{_RING} {_RING} 0 1 0 {2 * _RING} 0a{_RING} {_RING} 0 1 0 {-2 * _RING} 0"
    return "".join(f"M{x - _RING:.1f} {y:.1f}{turn}" for x, y in (place(p.x, p.y) for p in points))


def _crosses(place: Place, points: Iterable[tuple[float, float]]) -> str:
    arms = f"l{2 * _ARM} {2 * _ARM}m0 {-2 * _ARM}l{-2 * _ARM} {2 * _ARM}"
    return "".join(f"M{x - _ARM:.1f} {y - _ARM:.1f}{arms}" for x, y in (place(*p) for p in points))


def _scale(space: Space) -> Place:
    """From the plane into the box, in the middle of it, both axes on one scale."""
    points = [(p.x, p.y) for p in space.records] + [*space.inputs]
    (left, right), (low, high) = (
        (min(values, default=0.0), max(values, default=0.0)) for values in ([p[i] for p in points] for i in (0, 1))
    )
    wide, tall = WIDTH - 2 * _MARGIN, HEIGHT - 2 * _MARGIN
    by = min(wide / ((right - left) or 1), tall / ((high - low) or 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return WIDTH / 2 + (x - (left + right) / 2) * by, HEIGHT / 2 - (y - (low + high) / 2) * by

    return place
