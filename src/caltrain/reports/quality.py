"""Contributors' shares of wrong labels over runs, as one HTML page: a line each with its intervals, a table beneath."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from caltrain.exposure.figures import Estimate
from caltrain.participant.history import History, HuntedRun
from caltrain.reports.page import write_page
from caltrain.reports.plot import COLOURS, colour

LEFT, TOP, HEIGHT, BOTTOM = 48, 46, 220, 44
_APART, _CAP, _MARGIN = 13, 3, 30
_WIDTH, _SLOT = 560, 160
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)


class Series(NamedTuple):
    """One contributor: paths of its line, its intervals, its dots, which are square where a colour comes again."""

    name: str
    colour: str
    cap: Literal["round", "square"]
    line: str
    intervals: str
    dots: str


class Place(NamedTuple):
    """A run on the axis: the middle of its slot, and what changed before it, written over the slot's left edge."""

    x: float
    run: HuntedRun
    edge: float


class Chart(NamedTuple):
    """Numbers for an SVG of `width` x (`TOP` + `HEIGHT` + `BOTTOM`); `rules` are shares with their heights."""

    width: float
    rules: tuple[tuple[float, float], ...]
    places: tuple[Place, ...]
    series: tuple[Series, ...]


def chart(history: History) -> Chart:
    """Of each contributor that any run tells something of; a line ends where a run tells nothing of it."""
    told = [(i, name) for i, name in enumerate(history.contributors) if _shares(history, name)]
    runs = len(history.runs)
    slot = max(_APART * len(told) + _MARGIN, 2.6 * _MARGIN, min(_SLOT, _WIDTH / max(runs, 1)))
    top, step = _scale([share.high for _, name in told for _, share in _shares(history, name)])
    rules = tuple((round(i * step, 2), _height(i * step, top)) for i in range(round(top / step) + 1))
    places = tuple(Place(LEFT + (i + 0.5) * slot, run, LEFT + i * slot) for i, run in enumerate(history.runs))
    series = []
    for row, (number, name) in enumerate(told):
        aside = (row - (len(told) - 1) / 2) * _APART
        marks = [(at, places[at].x + aside, share) for at, share in _shares(history, name)]
        cap: Literal["round", "square"] = "square" if number // len(COLOURS) % 2 else "round"
        series.append(Series(name, colour(number), cap, *_drawn(marks, top)))
    return Chart(LEFT + runs * slot, rules, places, tuple(series))


def _shares(history: History, name: str) -> list[tuple[int, Estimate]]:
    """What is told of a contributor, by the number of the run."""
    return [(i, run.wrong_labels[name]) for i, run in enumerate(history.runs) if name in run.wrong_labels]


def _scale(highs: Sequence[float]) -> tuple[float, float]:
    """The share at the upper end, a whole number of steps, and the step: five rules or fewer above the lowest."""
    most = max(highs, default=0.0) or _STEPS[0]
    for step in _STEPS:
        if round(most / step, 6) <= 5:
            break
    return math.ceil(round(most / step, 6)) * step, step


def _height(share: float, top: float) -> float:
    return round(TOP + HEIGHT * (1 - share / top), 1)


def _drawn(marks: Sequence[tuple[int, float, Estimate]], top: float) -> tuple[str, str, str]:
    line, intervals, dots, before = "", "", "", None
    for at, x, share in marks:
        low, value, high = (_height(each, top) for each in (share.low, share.value, share.high))
        line += f"{'L' if before == at - 1 else 'M'}{x:.1f} {value}"
        intervals += f"M{x - _CAP:.1f} {low}h{2 * _CAP}m{-_CAP} 0V{high}m{-_CAP} 0h{2 * _CAP}"
        dots += f"M{x:.1f} {value}h0"
        before = at
    return line, intervals, dots


def write_quality(path: Path, history: History) -> None:
    """Render the page to `path`. Raises EnvironmentFault `file.not-written`."""
    write_page(
        path,
        "quality.html",
        history=history,
        chart=chart(history),
        left=LEFT,
        top=TOP,
        foot=TOP + HEIGHT,
        height=TOP + HEIGHT + BOTTOM,
        simulated=any(run.linked.simulated for run in history.runs),
    )
