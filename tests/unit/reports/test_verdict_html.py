"""A verdict as a page: harmless, and it says who, how sure, which records, and what it rests on."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest

from caltrain.cli.output import Format, choose
from caltrain.cli.verdict_text import show
from caltrain.errors import EnvironmentFault
from caltrain.provenance.verdict import SuspectRecords, VerdictStatement
from caltrain.reports.verdict import write_verdict
from support.pages import HOSTILE, Page, assert_harmless
from support.results import NOBODY, said

CLASSES = [str(digit) for digit in range(10)]


def render(
    verdict: VerdictStatement, folder: Path, *, name: str = "wrong.npy:{}", classes: list[str] = CLASSES
) -> Page:
    names = [name.replace("{}", str(i)) for i in range(3)]
    write_verdict(folder / "verdict.html", verdict, names=names, classes=classes)
    return Page.of(folder / "verdict.html")


def listing(leaves: range, *, found: int = 26, party: str = "dogwood") -> VerdictStatement:
    commitments = base64.b64encode(b"".join(leaf.to_bytes(32, "big") for leaf in leaves)).decode()
    own = SuspectRecords(party=party, shard="5" * 32, leaves=tuple(leaves), commitments=commitments)
    return msgspec.structs.replace(said(party=party), suspects=(own,), found=found)


def test_it_loads_and_runs_nothing_whatever_names_are_in_it(tmp_path: Path) -> None:
    hostile = msgspec.structs.replace(listing(range(26), party=HOSTILE), reason=HOSTILE, user=HOSTILE)
    page = render(hostile, tmp_path, name=HOSTILE, classes=[HOSTILE] * 10)
    assert_harmless(page)
    # The party in outcome, table and 26 records, the reason, the user, three inputs and what each is taken for.
    assert page.words.lower().count(" ".join(HOSTILE.split()).lower()) == 2 + 26 + 2 + 3 + 3
    assert "49" not in page.words.replace("0.49", "")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in render(listing(range(26)), tmp_path).tags]


def test_it_says_who_how_sure_that_is_and_what_it_rests_on(tmp_path: Path) -> None:
    page = render(listing(range(26)), tmp_path)
    for words in (
        *("dogwood is responsible", "The reason.", "26 records are held responsible"),
        *("an estimated 97.5% (92.0% to 100.0%) are so", "dogwood 99.9% 25.0% 0.0001 0.0002", "alder 3.0%"),
        *("trigger 2, hard 1", "Simulated enclave : its operator could have read everything"),
        *(
            "All 26, most likely first",
            f"{'5' * 32}:25 sha256:{25:064x}",
            "wrong.npy:1 7 hard",
            "wrong.npy:2 1 trigger",
        ),
        *("sha256:" + "2" * 64, "sha256:" + "3" * 64, "sha256:" + "4" * 64, "a-method/v1", "0" * 32),
        *("3 inputs that analyst says the model got wrong", "for caltrain verify to decide"),
    ):
        assert words in page.words, words
    assert "center not audited: a hostile host could have planted" in page.words.lower()


def test_it_says_that_nobody_is_named(tmp_path: Path) -> None:
    page = render(NOBODY, tmp_path)
    assert "It cannot be told who is responsible" in page.words
    assert "No record is held responsible" in page.words
    assert "The records held responsible" not in page.words
    assert not [row for row in page.all_of("tr") if row.get("class") == "named"]


def test_who_is_named_comes_first_even_where_chance_explains_another_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alder, dogwood = said().blamed
    near = msgspec.structs.replace(said(), blamed=(msgspec.structs.replace(alder, adjusted=0.0001), dogwood))
    page = render(near, tmp_path)
    assert [row.get("class") for row in page.all_of("tr")[1:3]] == ["named", "unnamed"]
    choose(Format.TEXT)
    show(near)
    text = capsys.readouterr().out
    assert text.index("dogwood  99.9%") < text.index("alder     3.0%")


def test_an_audited_center_and_restarts_are_said(tmp_path: Path) -> None:
    page = render(msgspec.structs.replace(said(), audit_rate=0.1, resumes=2, simulated=False), tmp_path)
    assert "Center audited at rate 0.1" in page.words
    assert "taken up again 2 times" in page.words
    assert "Simulated" not in page.words


def test_long_lists_are_cut_short_and_said_to_be(tmp_path: Path) -> None:
    page = render(listing(range(250), found=400), tmp_path)
    assert "The first 200 of 400" in page.words
    assert "the signed verdict lists 250" in page.words
    assert page.words.count("5" * 32) == 200


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "verdict.html").mkdir()
    with pytest.raises(EnvironmentFault, match=r"^file\.not-written: "):
        write_verdict(tmp_path / "verdict.html", said(), names=["a", "b", "c"], classes=CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.html"]
