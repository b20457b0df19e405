"""Doubt by hand; what a dossier works out once; who a witness may not have seen."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.cases import Dossier, Heard, Links, doubt
from support.dossiers import Told, planted


class Recording:
    """A witness that says uniform things, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], frozenset[int]]] = []

    def testify(self, rows: Tensor, *, without: frozenset[int] = frozenset(), forget: Tensor | None = None) -> Tensor:
        self.asked.append((rows.tolist(), without))
        return rows[:, None].float() + torch.arange(3) / 10

    def tells_apart(self, one: Tensor, other: Tensor) -> float:
        raise AssertionError("nobody asked")


def links_of(sources: list[int], *, dims: int = 4) -> Links:
    generator = torch.Generator().manual_seed(0)
    fingerprints = F.normalize(torch.randn((len(sources), dims), generator=generator), dim=1)
    return Links(fingerprints, torch.arange(len(sources)) % 3, torch.tensor(sources), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("said", "label", "expected"),
    [
        ((0.7, 0.2, 0.1), 0, math.log(0.2 / 0.7)),
        ((0.7, 0.2, 0.1), 1, math.log(0.7 / 0.2)),
        ((0.7, 0.2, 0.1), 2, math.log(0.7 / 0.1)),
        ((0.5, 0.5, 0.0), 1, 0.0),
        ((1.0, 0.0, 0.0), 0, math.log(1e-9)),  # certain: large, not infinite
        ((1.0, 0.0, 0.0), 1, math.log(1e9)),
    ],
)
def test_doubt_is_the_log_odds_of_the_likeliest_other_class(
    said: tuple[float, ...], label: int, expected: float
) -> None:
    assert float(doubt(torch.tensor([said]), torch.tensor([label]))) == pytest.approx(expected, abs=1e-5)


def test_doubt_of_two_classes_changes_its_sign_with_the_label() -> None:
    said = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    first, second = doubt(said, torch.tensor([0, 1])).tolist()
    assert first == pytest.approx(-math.log(4))
    assert second == pytest.approx(math.log(4))


def test_the_witness_to_a_record_never_saw_its_contributor_and_is_asked_once() -> None:
    witness = Recording()
    heard = Heard(links_of([2, 0, 2, 0, 0]), witness)
    assert heard.said[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0], "a row got the testimony to another"
    assert torch.equal(heard.said, heard.said)
    assert witness.asked == [([1, 3, 4], frozenset({0})), ([0, 2], frozenset({2}))]


def test_doubt_is_that_of_what_was_said() -> None:
    heard = planted(0).heard
    assert torch.equal(heard.doubt, doubt(heard.said, heard.links.labels))


def test_what_all_say_is_the_mean_of_their_log_odds() -> None:
    """One is sure of a class, the other unsure of another: the sure one prevails. Two who say the same say that."""
    links = links_of([0, 1])
    sure, unsure = torch.tensor([[0.98, 0.01, 0.01]] * 2), torch.tensor([[0.3, 0.4, 0.3]] * 2)
    both = Dossier(links, tuple(Told(each, links.labels, links.sources) for each in (sure, unsure)))
    expected = (sure * unsure).sqrt()
    assert torch.allclose(both.said, expected / expected.sum(1, keepdim=True), atol=1e-5)
    same = Dossier(links, (Told(sure, links.labels, links.sources),) * 2)
    assert torch.allclose(same.said, sure, atol=1e-6)


@pytest.mark.parametrize("records", [2, 3, 90, 150])
def test_the_usual_distance_is_what_99_of_100_do_not_exceed_to_another_record(records: int) -> None:
    links = links_of([0] * records)
    wide = links.fingerprints.double()
    distances = (wide[:, None] - wide[None]).norm(dim=2)
    distances.fill_diagonal_(torch.inf)
    expected = float(distances.min(1).values.quantile(0.99))
    assert Dossier(links, (Recording(),)).usual_distance == pytest.approx(expected, abs=1e-4)


def test_one_record_alone_has_no_distance_to_another() -> None:
    assert Dossier(links_of([0]), (Recording(),)).usual_distance == pytest.approx(0.0, abs=1e-6)
