"""The HTML report: one file that loads nothing, runs nothing, says what it rests on, and shows hostile text as text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from caltrain.demo.result import Story
from caltrain.errors import EnvironmentFault
from caltrain.reports.html import write_report
from support.results import RESULT, story

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}</style><b>"""
HARMLESS_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "br", "div", "small", "code"),
    *("figure", "img", "figcaption", "table", "tr", "th", "td", "details", "summary"),
    *("svg", "g", "line", "polyline", "text"),
}


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.style = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside.append(tag)

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["style"] and not self.style:
            self.style = data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def render(told: Story, folder: Path) -> tuple[str, Page]:
    write_report(folder / "report.html", told)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(params=["as it is", "hostile"])
def told(request: pytest.FixtureRequest) -> Story:
    return story() if request.param == "as it is" else story(party=HOSTILE, label=HOSTILE)


def test_it_loads_nothing_and_runs_nothing(told: Story, tmp_path: Path) -> None:
    text, page = render(told, tmp_path)
    assert {tag for tag, _ in page.tags} <= HARMLESS_TAGS
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {"href", "xlink:href", "action", "data", "srcset", "background", "http-equiv"}, tag
            if name == "src":
                assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
            if name == "style":
                assert re.fullmatch(r"width: \d+\.\d%", value)
    assert not re.search(r"url\(|@import|expression\(", page.style)
    assert not re.search(r"https?:|//[a-z]", text)


def test_names_and_classes_are_shown_as_text(tmp_path: Path) -> None:
    text, page = render(story(party=HOSTILE, label=HOSTILE), tmp_path)
    shown = " ".join(HOSTILE.split())
    assert page.words.count(shown) >= 4  # the party in its row, twice as contributor, in an event; the label
    assert "<script" not in text
    assert "49" not in page.words.replace("0.49", "")
    _, same = render(story(), tmp_path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in same.tags]


def test_it_says_that_the_enclave_is_simulated_and_the_center_not_audited(told: Story, tmp_path: Path) -> None:
    _, page = render(told, tmp_path)
    assert "simulated enclave" in page.words.lower()
    assert "could read everything" in page.words
    assert "center not audited" in page.words.lower()
    assert page.words.lower().index("simulated enclave") < page.words.index("The traced records")


def test_it_shows_figures_pictures_parties_and_the_chain(tmp_path: Path) -> None:
    _, page = render(story(), tmp_path)
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


def test_the_loss_curve_goes_down_in_its_box(tmp_path: Path) -> None:
    _, page = render(story(), tmp_path)
    points = next(attributes["points"] for tag, attributes in page.tags if tag == "polyline")
    assert points == "0.0,0.0 260.0,60.0 520.0,90.0"


@pytest.mark.parametrize("losses", [(0.0,), (0.0, 0.0)])
def test_a_flat_curve_is_no_error(losses: tuple[float, ...], tmp_path: Path) -> None:
    told = msgspec.structs.replace(story(), losses=losses)
    render(told, tmp_path)


def test_different_weights_are_not_called_identical(tmp_path: Path) -> None:
    _, page = render(story(result=msgspec.structs.replace(RESULT, weights_identical=False)), tmp_path)
    assert "different" in page.words
    assert "identical" not in page.words


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(EnvironmentFault, match=r"^file\.not-written: "):
        write_report(tmp_path / "report.html", story())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
