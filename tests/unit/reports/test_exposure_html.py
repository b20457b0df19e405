"""The exposure report as a page: loads and runs nothing, shows every figure, picture and plot, and what it rests on."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from caltrain.errors import EnvironmentFault
from caltrain.exposure.choice import Choice, Miss
from caltrain.exposure.policy import parse_policy
from caltrain.exposure.report import DefenceReport, ExposureReport
from caltrain.reports.exposure import write_exposure
from support.exposure_report import MODEL, about, cut_report, exposure_report, gallery, labelled, scored
from support.samples import refused

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}</style><b>"""
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "br", "div", "small", "code", "ul", "li"),
    *("img", "table", "tr", "th", "td", "svg", "line", "polyline", "circle", "rect", "text"),
}


class Page(HTMLParser):
    """Tags with attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def render(report: ExposureReport, folder: Path) -> tuple[str, Page]:
    write_exposure(folder / "report.html", report, gallery(report))
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def full() -> ExposureReport:
    """With a policy that no cut meets, and a defence."""
    miss = Miss(key="whitebox.ssim", limit=0.3, reached=0.52, mean=0.5, n=16, by_mean=True)
    return msgspec.structs.replace(
        exposure_report(),
        policy=parse_policy("ssim<=0.3, kl_ratio>=1"),
        choice=Choice(front=None, nearest=3, misses={1: (miss,), 3: (miss,)}, advice=("take a deeper model",)),
        assumptions=("assumes that nobody looks",),
        defences=(
            DefenceReport(
                front=3,
                defence="noise=0.5",
                attacks={"whitebox": scored(0.33), "inverter": scored(0.15)},
                accuracy=about(0.81),
                tuned=about(0.93),
            ),
        ),
    )


@pytest.mark.parametrize("report", [exposure_report(), full()], ids=["bare", "full"])
@pytest.mark.parametrize("hostile", [False, True])
def test_it_loads_nothing_and_runs_nothing(report: ExposureReport, tmp_path: Path, *, hostile: bool) -> None:
    if hostile:
        replace = msgspec.structs.replace
        cuts = {front: replace(cut, cost=replace(cut.cost, layer=HOSTILE)) for front, cut in report.cuts.items()}
        report = replace(report, data=HOSTILE, cuts=cuts)
    text, page = render(report, tmp_path)
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {"href", "xlink:href", "action", "data", "srcset", "background", "http-equiv", "style"}
            if name == "src":
                assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
    assert not re.search(r"url\(|@import|expression\(", text)
    assert not re.search(r"https?:", text)
    if hostile:
        assert page.words.count(" ".join(HOSTILE.split())) >= 4


def test_every_cut_shows_input_map_and_each_attack_three_times(tmp_path: Path) -> None:
    _, page = render(exposure_report(), tmp_path)
    shown = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    columns = ("input", "most telling map", "whitebox", "inverter")
    assert shown == [f"{what}, cut {front}" for front in (1, 3) for what in columns for _ in range(3)]


def test_it_shows_figures_floors_costs_and_what_they_come_to(tmp_path: Path) -> None:
    _, page = render(full(), tmp_path)
    for words in (
        *(MODEL, "95.0% accuracy on 100 pictures of others", "none meets the policy; nearest is cut 3"),
        *("cut 3 by the papers' KL rule", "1 of 2 cuts pass the papers' test and are broken by an attack"),
        *("whitebox.ssim ≤ 0.3 , kl_ratio ≥ 1", "0.90 (0.88 to 0.92)", "100.0% (98.0% to 102.0%)"),
        *("guess: mean image", "guess: own draw", "never", "-0.95", "4,096 2.5"),
        *("1.40 1.38 to 1.42", "4 of 8 error 0.010", "take a deeper model", "assumes that nobody looks"),
        *("noise=0.5 0.33 (0.31 to 0.35)", "81.0% 93.0%", "conv 8 3x3", "a validator, right on 88.0%"),
        *("a stronger one may exist", "without learned weights", "low by chance alone"),
    ):
        assert words in page.words, words


def test_grey_is_what_a_guess_reaches(tmp_path: Path) -> None:
    text, _ = render(exposure_report(), tmp_path)
    assert '<td class="n ">0.50 (0.48 to 0.52)' in text
    assert '<td class="n guess">0.10 (0.08 to 0.12)' in text


def test_a_chosen_cut_is_marked(tmp_path: Path) -> None:
    chosen = msgspec.structs.replace(
        full(), choice=Choice(front=3, nearest=None, misses={1: (), 3: ()}), defences=(), policy=parse_policy("ssim<=1")
    )
    text, page = render(chosen, tmp_path)
    assert "cut 3 is the cheapest that meets the policy" in page.words
    assert text.count('<tr class="chosen') == 4  # its two attacks, its measures, its costs


def test_plots_show_attacks_with_the_best_guess_and_kl_with_one(tmp_path: Path) -> None:
    _, page = render(exposure_report(), tmp_path)
    assert page.words.count("best guess") == 2
    for words in (
        "SSIM of reconstructions",
        "share re-identified",
        "KL ratio (papers)",
        "compute inside",
        "bytes across",
    ):
        assert words in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


@pytest.mark.parametrize("attacks", [("kl",), ("labels",), ("inverter",)])
def test_what_was_not_asked_for_is_left_out(attacks: tuple[str, ...], tmp_path: Path) -> None:
    ran = {"inverter": scored()} if "inverter" in attacks else {}
    cuts = {2: cut_report(2, ran, ratio=1.0 if "kl" in attacks else None, compute=None)}
    made = exposure_report(cuts)
    settings = msgspec.structs.replace(made.settings, attacks=attacks)
    made = msgspec.structs.replace(made, settings=settings, broken={}, judge=None, papers_cut=None)
    _, page = render(made, tmp_path)
    assert ("What attacks bring back" in page.words) is ("inverter" in attacks)
    assert ("KL ratio" in page.words) is ("kl" in attacks)
    assert ("label purity" in page.words) is ("labels" in attacks)


def test_labels_are_told_by_irs_and_by_gradients(tmp_path: Path) -> None:
    _, page = render(labelled(exposure_report()), tmp_path)
    for words in (
        *("label purity, IRs", "31.0%", "label purity, gradients", "86.0%"),
        "gradients that leave a HeadNet of the last layer with weights fall into label groups with purity 98.0% "
        "(floor 10.0%); who knows 1 of each class names 49.0% of the others",
    ):
        assert words in page.words


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with refused(EnvironmentFault, "file.not-written"):
        render(full(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
