"""Quality over time as a page: where points, intervals and marks are drawn, and what is said of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from caltrain.errors import EnvironmentFault
from caltrain.participant.history import History, HuntedRun
from caltrain.reports.plot import COLOURS
from caltrain.reports.quality import HEIGHT, LEFT, TOP, chart, write_quality
from support.disk import tree
from support.histories import hunted
from support.pages import HOSTILE, Page, assert_harmless

TWO = (
    hunted(0xAB, {"alder": (0.0, 0.0, 0.1), "cedar": (0.2, 0.3, 0.5)}),
    hunted(0xCD, {"alder": (0.0, 0.1, 0.2), "cedar": (0.1, 0.2, 0.3)}, changed=("plan", "quarantine"), left_out=1026),
)


def history(*runs: HuntedRun, without: tuple[str, ...] = ()) -> History:
    return History("alder", runs, without)


def points(path: str) -> list[tuple[str, float, float]]:
    return [(step, float(x), float(y)) for step, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]


def at(share: float, *, top: float) -> float:
    return TOP + HEIGHT * (1 - share / top)


def test_each_contributor_has_a_line_a_dot_and_an_interval_a_run_on_one_scale() -> None:
    drawn = chart(history(*TWO))
    first, second = (place.x for place in drawn.places)
    alder, cedar = drawn.series
    assert [step for step, _, _ in points(cedar.line)] == ["M", "L"]
    assert [y for _, _, y in points(cedar.line)] == [at(0.3, top=0.5), at(0.2, top=0.5)]
    assert points(cedar.dots) == [("M", x, y) for _, x, y in points(cedar.line)]
    # Beside one another around the middle of the run's slot, so that no interval hides another.
    left, right = (points(series.line)[0][1] for series in (alder, cedar))
    assert (left + right) / 2 == first
    assert right - left >= 10
    assert LEFT < left < right < drawn.places[1].edge < points(alder.line)[1][1] < second < drawn.width
    low, high = re.findall(r"M[\d.]+ ([\d.]+)h6m-3 0V([\d.]+)m-3 0h6", cedar.intervals)[0]
    assert (float(low), float(high)) == (at(0.2, top=0.5), at(0.5, top=0.5))
    assert drawn.rules[0] == (0.0, TOP + HEIGHT)
    assert drawn.rules[-1] == (0.5, TOP)


def test_a_contributor_keeps_the_colour_that_it_has_by_its_place_in_the_plan() -> None:
    later = hunted(3, {"dogwood": (0, 0, 0.1), "cedar": (0, 0, 0.1)}, parties=("alder", "cedar", "dogwood"))
    drawn = chart(history(*TWO, later))
    colours = {series.name: series.colour for series in drawn.series}
    assert colours == {"alder": COLOURS[0], "cedar": COLOURS[2], "dogwood": COLOURS[3]}
    names = tuple(f"p{i}" for i in range(8))
    many = chart(history(hunted(1, dict.fromkeys(names, (0.0, 0.1, 0.2)), parties=names))).series
    assert (many[6].colour, many[0].cap, many[5].cap, many[6].cap) == (COLOURS[0], "round", "round", "square")


def test_a_line_is_broken_where_a_run_tells_nothing_of_the_contributor() -> None:
    silent = hunted(2, {"cedar": (0.0, 0.1, 0.2)})
    alder, cedar = chart(history(TWO[0], silent, TWO[1], TWO[1])).series
    assert [step for step, _, _ in points(alder.line)] == ["M", "M", "L"]
    assert [step for step, _, _ in points(cedar.line)] == ["M", "L", "L", "L"]


def test_one_run_is_a_point() -> None:
    drawn = chart(history(TWO[0]))
    assert [step for series in drawn.series for step, _, _ in points(series.line)] == ["M", "M"]
    assert len(drawn.places) == 1


@pytest.mark.parametrize(
    ("high", "top", "step"),
    [(0.0, 0.01, 0.01), (0.004, 0.01, 0.01), (0.05, 0.05, 0.01), (0.051, 0.06, 0.02), (0.3, 0.3, 0.1), (1.0, 1.0, 0.2)],
)
def test_the_scale_ends_at_a_round_share_above_every_interval(high: float, top: float, step: float) -> None:
    rules = chart(history(hunted(1, {"alder": (0.0, 0.0, high)}))).rules
    assert rules[-1] == (top, TOP)
    assert rules[1][0] == step
    assert len(rules) <= 6


def test_slots_are_wide_enough_for_all_contributors_and_their_words() -> None:
    names = tuple(f"p{i}" for i in range(30))
    drawn = chart(history(*(hunted(i, dict.fromkeys(names, (0.0, 0.1, 0.2)), parties=names) for i in range(40))))
    for series in (drawn.series[0], drawn.series[-1]):
        for place, (_, x, _) in zip(drawn.places, points(series.line), strict=True):
            assert place.edge < x < place.edge + (drawn.width - LEFT) / 40
    narrow = chart(history(*(TWO * 20)))
    assert narrow.places[1].edge - narrow.places[0].edge >= 75


def render(folder: Path, shown: History) -> Page:
    write_quality(folder / "quality.html", shown)
    return Page.of(folder / "quality.html")


def test_figures_changes_and_limits_stand_beneath_the_picture(tmp_path: Path) -> None:
    page = render(tmp_path, history(*TWO, without=("ef" * 16,)))
    for words in (
        *(
            "alder holds: 2 runs",
            "run 1 000000ab",
            "run 2 000000cd",
            "A change within overlapping intervals is no change",
        ),
        *("1: 000000ab the first audited at 0.1 0.0% 0.0% to 10.0% of 1,200 30.0% 20.0% to 50.0% of 1,200",),
        *("2: 000000cd plan, quarantine leaves out 1,026 records audited at 0.1 10.0%",),
        *("95 % interval", "it sees no backdoors", "no clock is trusted", "not shown: " + "ef" * 16),
    ):
        assert words in page.words, words
    assert "Simulated" not in page.words
    assert "birch" not in page.words
    dashed = [path for path in page.all_of("path") if path.get("stroke-dasharray") == "4 4"]
    assert len(dashed) == 1
    edge = chart(history(*TWO)).places[1].edge
    assert dashed[0]["d"].startswith(f"M{edge:.1f} ")
    words_over = [text["y"] for text in page.all_of("text") if text["x"] == f"{edge:.1f}"]
    assert len(set(words_over)) == 2


def test_what_a_run_does_not_tell_and_what_it_rests_on_is_said(tmp_path: Path) -> None:
    other = hunted(
        9, {"alder": (0, 0, 0.1)}, simulated=True, audit_rate=0.0, resumes=2, left_out=1, former=("cedar", "elm")
    )
    page = render(tmp_path, history(TWO[0], other))
    for words in (
        "Simulated enclave",
        "leaves out 1 record and cedar and elm",
        "not audited",
        "taken up again 2 times",
    ):
        assert words in page.words, words
    assert page.words.count("not told") == 1
    assert "2: 00000009 nothing leaves out" in page.words


@pytest.mark.parametrize("shown", [history(), history(hunted(1, {}))])
def test_without_a_hunt_there_is_a_sentence_and_no_figure(shown: History, tmp_path: Path) -> None:
    page = render(tmp_path, shown)
    assert "No run with a hunt: there is nothing to show yet" in page.words
    assert not page.all_of("svg")
    assert not page.all_of("table")


def test_it_loads_and_runs_nothing_whatever_names_are_in_it(tmp_path: Path) -> None:
    runs = tuple(hunted(i, {HOSTILE: (0.0, 0.1, 0.2)}, parties=(HOSTILE,)) for i in range(2))
    page = render(tmp_path, History(HOSTILE, runs, (HOSTILE,)))
    assert_harmless(page)
    # The title and the party, the folder without a report, the legend, the table's heading.
    assert page.words.count(" ".join(HOSTILE.split())) == 5


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "quality.html").mkdir()
    with pytest.raises(EnvironmentFault, match=r"^file\.not-written: "):
        write_quality(tmp_path / "quality.html", history(*TWO))
    assert tree(tmp_path) == {}
