"""The HTML report: one file that loads nothing, runs nothing, says what it rests on, and shows hostile text as text."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest

from caltrain.demo.result import Story
from caltrain.errors import EnvironmentFault
from caltrain.reports.html import write_report
from support.pages import HOSTILE, Page, assert_harmless
from support.results import NOBODY, RESULT, story


def render(told: Story, folder: Path) -> Page:
    write_report(folder / "report.html", told)
    return Page.of(folder / "report.html")


@pytest.fixture(params=["as it is", "hostile"])
def told(request: pytest.FixtureRequest) -> Story:
    return story() if request.param == "as it is" else story(party=HOSTILE, label=HOSTILE)


def test_it_loads_nothing_and_runs_nothing(told: Story, tmp_path: Path) -> None:
    assert_harmless(render(told, tmp_path))


def test_names_and_classes_are_shown_as_text(tmp_path: Path) -> None:
    page = render(story(party=HOSTILE, label=HOSTILE), tmp_path)
    shown = " ".join(HOSTILE.split())
    assert page.words.count(shown) >= 4  # the party in its row, twice as contributor, in an event; the label
    assert "49" not in page.words.replace("0.49", "")
    same = render(story(), tmp_path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in same.tags]


def test_it_says_that_the_enclave_is_simulated_and_the_center_not_audited(told: Story, tmp_path: Path) -> None:
    page = render(told, tmp_path)
    assert "simulated enclave" in page.words.lower()
    assert "could read everything" in page.words
    assert "center not audited" in page.words.lower()
    assert page.words.lower().index("simulated enclave") < page.words.index("The traced records")


def test_it_shows_figures_pictures_parties_and_the_chain(tmp_path: Path) -> None:
    page = render(story(), tmp_path)
    for words in (
        *("0.9800", "identical", "99.8%", "99.9%", "100.0%", "of 399 traces name the culprit", "1.000"),
        *("a 3 , predicted 7", "1. dogwood", "labelled 7", "d = 0.25", "27 of 27 disclosures verified"),
        *("27 of 27 substituted records refused", "hides a backdoor", "Planted: 1.9% of all records"),
        *(RESULT.chain_head, RESULT.model, "115 events", "seccomp", "epoch 3"),
    ):
        assert words in page.words
    pictures = [attributes["src"].partition(",")[2] for tag, attributes in page.tags if tag == "img"]
    assert [base64.b64decode(picture) for picture in pictures] == [b"\x89PNG in", b"\x89PNG one", b"\x89PNG one"]
    framed = [attributes.get("class") for tag, attributes in page.tags if tag == "figure"]
    assert framed == ["input", "planted", "planted"]


def test_it_shows_the_verdict_with_how_sure_it_is_and_what_it_rests_on(tmp_path: Path) -> None:
    page = render(story(), tmp_path)
    for words in (
        *("dogwood held responsible by the verdict", "96.2% of the 26 records that the verdict names were planted"),
        *("100.0% of the planted records are named by the verdict", "dogwood is responsible"),
        *("26 records are held responsible", "an estimated 97.5% (92.0% to 100.0%) are so", "p, at most"),
        *("p, corrected for all looks", "dogwood 99.9% 25.0% 0.0001 0.0002", "alder 3.0% 25.0% 1 1"),
        *("3 inputs, by kind: trigger 2, hard 1", "the culprit is dogwood", "96.2% were planted (precision)"),
    ):
        assert words in page.words, words
    verdict = page.words[page.words.index("The verdict") : page.words.index("The fingerprint space")]
    assert "Simulated enclave : its operator could have read everything" in verdict
    assert "center not audited" in verdict.lower()
    bars = [a["style"] for a in page.all_of("div") if a.get("class") == "bar"]
    assert bars == ["width: 99.9%", "width: 3.0%", "width: 0.0%", "width: 100.0%"]


def test_a_verdict_that_cannot_tell_accuses_nobody(tmp_path: Path) -> None:
    result = msgspec.structs.replace(
        RESULT, verdict_contributors=(), verdict_records=0, verdict_precision=None, verdict_recall=0.0
    )
    page = render(msgspec.structs.replace(story(result=result), verdict=NOBODY), tmp_path)
    for words in (
        *("cannot tell is what the verdict says", "It cannot be told who is responsible", "No record is held"),
        *("none of the records is named", "No record was named"),
    ):
        assert words in page.words, words
    assert "is responsible" not in page.words.lower().replace("who is responsible", "")
    assert not [a for a in page.all_of("tr") if a.get("class") == "named"]


@pytest.mark.parametrize("named", [("dogwood",), ("alder",), ("alder", "dogwood")])
def test_only_the_culprit_alone_is_marked_as_right(named: tuple[str, ...], tmp_path: Path) -> None:
    page = render(story(result=msgspec.structs.replace(RESULT, verdict_contributors=named)), tmp_path)
    tile = page.raw.partition("held responsible by the verdict")[0].rpartition('class="tile"')[2]
    assert ('"yes"' in tile) == (named == ("dogwood",))
    assert ('"no"' in tile) == (named != ("dogwood",))


def test_the_fingerprint_space_is_drawn_by_contributor_and_by_suspicion(tmp_path: Path) -> None:
    page = render(story(), tmp_path)
    views = [a for a in page.all_of("svg") if a.get("class") == "space"]
    assert [a["aria-label"] for a in views] == [
        "fingerprints by contributor",
        "fingerprints by suspicion, before the release",
    ]
    for words in (
        *("a training record labelled 7 , 3 drawn from 5", "one of 2 triggered inputs", "alder 1", "dogwood 2"),
        *("0 to 0.1 1", "0.25 to 0.5 1", "0.5 to 1 1", "named by the verdict", "planted (the demo knows)"),
        *("Fingerprints never leave the enclave in clear", "this plan reveals it", "To the right:"),
    ):
        assert words in page.words, words


def test_a_space_without_suspects_is_not_said_to_show_them(tmp_path: Path) -> None:
    space = msgspec.structs.replace(story().space, parted=False, of=3)
    page = render(msgspec.structs.replace(story(), space=space), tmp_path)
    assert "To the right" not in page.words
    assert "all 3, where" in page.words
    assert "directions in which the records differ most" in page.words


def test_each_contributors_quality_is_shown_with_its_interval_and_the_truth(tmp_path: Path) -> None:
    page = render(story(), tmp_path)
    quality = page.words[page.words.index("The quality of") : page.words.index("Training")]
    for words in (
        "0 to 20 %",
        "alder 336 10.7% (5.4% to 17.0%) 10.1% 0.0%",
        "dogwood 337 0.2% (0.0% to 5.1%) 0.0% 7.7%",
    ):
        assert words in quality
    assert "One run" in quality
    assert "M64.8 9H204.0" in page.raw
    assert "M121.2 1v16" in page.raw


def test_the_loss_curve_goes_down_in_its_box(tmp_path: Path) -> None:
    page = render(story(), tmp_path)
    points = next(attributes["points"] for tag, attributes in page.tags if tag == "polyline")
    assert points == "0.0,0.0 260.0,60.0 520.0,90.0"


@pytest.mark.parametrize("losses", [(0.0,), (0.0, 0.0)])
def test_a_flat_curve_is_no_error(losses: tuple[float, ...], tmp_path: Path) -> None:
    told = msgspec.structs.replace(story(), losses=losses)
    render(told, tmp_path)


def test_different_weights_are_not_called_identical(tmp_path: Path) -> None:
    page = render(story(result=msgspec.structs.replace(RESULT, weights_identical=False)), tmp_path)
    assert "different" in page.words
    assert "identical" not in page.words


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(EnvironmentFault, match=r"^file\.not-written: "):
        write_report(tmp_path / "report.html", story())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
