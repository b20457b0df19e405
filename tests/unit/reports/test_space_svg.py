"""Where points of a plane are drawn: in the box, on one scale, each in its colour."""

from __future__ import annotations

import re

import msgspec
import pytest

from caltrain.demo.result import Point, Space
from caltrain.reports.plot import COLOURS
from caltrain.reports.space import HEIGHT, WIDTH, panels
from support.results import space

_START = re.compile(r"M(-?[\d.]+) (-?[\d.]+)")


def starts(path: str) -> list[tuple[float, float]]:
    """Where the strokes of a path begin."""
    return [(float(x), float(y)) for x, y in _START.findall(path)]


def crowd(parties: int) -> Space:
    points = tuple(
        Point(x=i, y=-i % 3, party=f"p{i % parties}", suspicion=i / 40, suspect=i % 2 == 0, planted=i % 5 == 0)
        for i in range(41)
    )
    return Space(label="7", of=41, parted=True, records=points, inputs=((-1.0, 50.0), (45.0, 0.0)))


def test_both_axes_have_one_scale_and_fill_the_box() -> None:
    by_owner, _ = panels(space(), ["alder", "dogwood"]).views
    (origin,), (above, right) = (starts(layer.path) for layer in by_owner.layers)
    assert origin[0] == above[0] == 10
    assert origin[1] - above[1] == pytest.approx((right[0] - origin[0]) / 2, abs=0.1)
    assert right == (WIDTH - 10, HEIGHT / 2)


@pytest.mark.parametrize("parties", [1, 4, 9])
def test_every_record_is_a_dot_once_in_either_view(parties: int) -> None:
    names = [f"p{i}" for i in range(parties)]
    found = panels(crowd(parties), names)
    for view in found.views:
        dots = [start for layer in view.layers for start in starts(layer.path)]
        assert len(dots) == len(set(dots)) == 41
        assert [layer.dots for layer in view.layers] == [len(starts(layer.path)) for layer in view.layers]
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in dots)
    by_owner, by_suspicion = found.views
    assert [layer.name for layer in by_owner.layers] == names
    assert [layer.colour for layer in by_owner.layers] == [COLOURS[i % len(COLOURS)] for i in range(parties)]
    assert [layer.name for layer in by_suspicion.layers] == ["0 to 0.1", "0.1 to 0.25", "0.25 to 0.5", "0.5 to 1"]
    assert [layer.dots for layer in by_suspicion.layers] == [4, 6, 10, 21]  # of 0, 1/40 and so on to 1


def test_rings_are_around_the_named_and_around_the_planted() -> None:
    by_owner, by_suspicion = panels(crowd(1), ["p0"]).views
    dots = starts(by_owner.layers[0].path)
    named, planted = starts(by_owner.rings), starts(by_suspicion.rings)
    assert named == [(round(x - 5, 1), y) for x, y in dots[::2]]
    assert planted == [(round(x - 5, 1), y) for x, y in dots[::5]]


def test_crosses_are_in_the_box_too() -> None:
    found = panels(crowd(1), ["p0"])
    crosses = starts(found.crosses)
    assert len(crosses) == 2
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in crosses)


def test_points_at_one_place_and_no_points_are_no_error() -> None:
    one = msgspec.structs.replace(space(), records=space().records[:1], inputs=())
    (layer, _), _ = (view.layers[:2] for view in panels(one, ["alder", "dogwood"]).views)
    assert starts(layer.path) == [(WIDTH / 2, HEIGHT / 2)]
    none = msgspec.structs.replace(one, records=())
    assert panels(none, ["alder"]).views[0].layers[0].path == ""


def test_two_thousand_points_stay_a_small_picture() -> None:
    points = tuple(
        Point(x=i * 0.00137, y=i * i * 1e-6, party="a", suspicion=0.0, suspect=True, planted=True) for i in range(1600)
    )
    many = Space(label="7", of=1600, parted=True, records=points, inputs=tuple((p.x, p.y) for p in points[:400]))
    found = panels(many, ["a"])
    paths = [layer.path for view in found.views for layer in view.layers] + [view.rings for view in found.views]
    assert sum(map(len, paths)) + 2 * len(found.crosses) < 300_000
