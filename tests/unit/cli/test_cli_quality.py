"""`caltrain party quality`: a party's runs side by side, in the terminal, as JSON, as a page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from caltrain.cli.quality import _table
from caltrain.participant.history import History
from caltrain.participant.identity import create_identity
from caltrain.participant.receive import SUSPICION
from support.commands import Cli
from support.courses import Course
from support.disk import tree
from support.histories import hunted
from support.pages import Page, assert_harmless
from support.repairs import FEW


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Two runs, the second a repair."""
    course = Course(tmp_path_factory.mktemp("course") / "alpha")
    course.again(without=FEW)
    return course


@pytest.fixture
def home(course: Course, tmp_path: Path) -> Path:
    shutil.copytree(course.alpha.folder, tmp_path / "alpha")
    return tmp_path / "alpha"


def test_runs_are_told_in_order_as_json_in_the_terminal_and_as_a_page(home: Path, course: Course, cli: Cli) -> None:
    first, second = (world.manifest.run for world in course.worlds)
    before = tree(home)
    shown = cli("party", "quality", "--home", home, as_json=True).json
    assert (shown["party"], shown["without_report"], shown["report"]) == ("alpha", [], None)
    assert [run["run"] for run in shown["runs"]] == [first, second]
    assert [(run["changed"], run["left_out"], run["simulated"]) for run in shown["runs"]] == [
        ([], 0, True),
        (["quarantine"], len(FEW), True),
    ]
    assert set(shown["runs"][1]["wrong_labels"]) == {"alpha", "beta", "gamma"}
    page = home.parent / "out" / "quality.html"
    text = cli("party", "quality", "--home", home, home / "runs" / second, home / "runs" / first, "--report", page).out
    assert "simulated enclave" in text
    assert "a change within overlapping intervals is no change" in text
    assert str(page) in text
    assert re.search(rf"alpha +1 {first[:8]} .*\n +2 {second[:8]} .* quarantine", text)
    drawn = Page.of(page)
    assert_harmless(drawn)
    assert f"1: {first[:8]}" in drawn.words
    assert tree(home) == before


def test_a_run_that_does_not_verify_leaves_no_page(home: Path, course: Course, cli: Cli) -> None:
    run = home / "runs" / course.worlds[0].manifest.run
    (run / SUSPICION).write_bytes((run / SUSPICION).read_bytes()[:-1])
    page = home.parent / "quality.html"
    shown = cli("party", "quality", "--home", home, "--report", page, as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "sealed.not-authentic")
    (run / SUSPICION).unlink()
    shown = cli("party", "quality", "--home", home, run, "--report", page, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "hunt.none-kept")
    assert not page.exists()
    assert run.name in cli("party", "quality", "--home", home).out


def test_another_partys_run_leaves_no_page(home: Path, course: Course, cli: Cli) -> None:
    create_identity(home.parent / "beta", "beta")
    run, page = home / "runs" / course.worlds[0].manifest.run, home.parent / "quality.html"
    shown = cli("party", "quality", "--home", home.parent / "beta", run, "--report", page, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "run.unknown")
    assert not page.exists()


def test_a_party_without_runs_gets_a_sentence(tmp_path: Path, cli: Cli) -> None:
    create_identity(tmp_path / "ann", "ann")
    assert (
        "No run with a hunt: there is nothing to show yet." in cli("party", "quality", "--home", tmp_path / "ann").out
    )
    assert cli("party", "quality", "--home", tmp_path / "ann", as_json=True).json["runs"] == []


def test_intervals_in_characters_have_one_scale() -> None:
    table = _table(
        History(
            "alder",
            (hunted(1, {"alder": (0.0, 0.0, 0.0), "birch": (0.1, 0.2, 0.5)}), hunted(2, {"birch": (0.5, 0.5, 0.5)})),
        )
    )
    names, numbers, _, bars, _ = ([str(cell) for cell in column.cells] for column in table.columns)
    assert names == ["alder", "birch", ""]
    assert [number[:2] for number in numbers] == ["1 ", "1 ", "2 "]
    assert bars == ["●" + "·" * 15, "···├──●────────┤", "·" * 15 + "●"]
    assert str(table.columns[3].header) == "0 to 50%"
