"""A line plot: everything inside the frame, values where the axes say, text that cannot become markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.reports.plot import line_plot

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314  # our own text


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', svg)]


@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_every_point_lies_inside_the_frame_of_well_formed_svg(points: list[tuple[float, float]]) -> None:
    svg = line_plot({"one": points}, title="t", x="x", y="y")
    assert parsed(svg).tag.endswith("svg")
    drawn = circles(svg)
    assert len(drawn) == len(points)
    assert all(60 <= x <= 620 and 60 <= y <= 350 for x, y in drawn)


def test_higher_values_are_drawn_higher_and_later_ones_further_right() -> None:
    first, second = circles(line_plot({"one": [(1, 0.5), (2, 0.7)]}, title="t", x="x", y="y"))
    assert first[0] < second[0]
    assert first[1] > second[1]


def test_axes_have_round_numbers_round_the_values() -> None:
    svg = line_plot({"one": [(2, 0.953), (8, 0.991)]}, title="t", x="x", y="y")
    texts = {element.text for element in parsed(svg).iter() if element.text}
    assert {"0.95", "0.96", "1", "2", "8"} <= texts


@pytest.mark.parametrize("where", ["title", "x", "y", "name"])
def test_text_is_text(where: str) -> None:
    words = {"title": "t", "x": "x", "y": "y"} | ({where: "<b>&"} if where != "name" else {})
    svg = line_plot({"<b>&" if where == "name" else "one": [(0, 0)]}, **words)
    texts = [element.text for element in parsed(svg).iter()]
    assert "<b>&" in texts


def test_each_series_has_its_own_colour_and_name() -> None:
    svg = line_plot({name: [(0, 1), (1, 2)] for name in "abc"}, title="t", x="x", y="y")
    assert len(set(re.findall(r'<polyline[^>]*stroke="(#\w+)"', svg))) == 3
