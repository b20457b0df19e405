"""Shares of wrong labels where it is known which labels are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.quality import Shares, _Strata, shares_of_wrong_labels


def drawn(
    rates: Sequence[float], *, seed: int, records: int = 800, classes: int = 4, sharp: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A view that is as sure as it is right, labels of which each contributor turned a share, sources."""
    generator = torch.Generator().manual_seed(seed)
    count = records * len(rates)
    odds = sharp + 5 * torch.rand((count, 1), generator=generator)
    shown = torch.randint(classes, (count,), generator=generator)
    view = torch.softmax(odds * F.one_hot(shown, classes) + torch.randn((count, classes), generator=generator), 1)
    truth = torch.multinomial(view, 1, generator=generator)[:, 0]
    sources = torch.arange(count) % len(rates)
    turned = torch.rand(count, generator=generator) < torch.tensor(list(rates))[sources]
    other = (truth + torch.randint(1, classes, (count,), generator=generator)) % classes
    return view, torch.where(turned, other, truth), sources


def ordered(shares: Shares) -> bool:
    return bool(
        (
            (shares.low >= 0) & (shares.low <= shares.estimate) & (shares.estimate <= shares.high) & (shares.high <= 1)
        ).all()
    )


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("sharp", [0.0, 3.0])
def test_planted_shares_of_wrong_labels_lie_in_their_intervals(classes: int, sharp: float) -> None:
    """20 draws of three contributors; 95 of 100 intervals are to hold the truth, so 3 of 60 may fail."""
    rates = torch.tensor([0.0, 0.1, 0.3])
    held, far = 0, []
    for seed in range(20):
        shares = shares_of_wrong_labels(*drawn(rates.tolist(), seed=seed, classes=classes, sharp=sharp), 3)
        assert ordered(shares)
        held += int(((shares.low <= rates) & (rates <= shares.high)).sum())
        far.append(shares.estimate - rates)
    assert held >= 57
    if sharp:  # a view that often knows
        error = torch.stack(far)
        assert float(error.abs().mean(0).max()) < 0.04
        assert float(error.mean(0).abs().max()) < 0.03


def test_an_interval_says_something() -> None:
    shares = shares_of_wrong_labels(*drawn([0.0, 0.1, 0.4], seed=0), 3)
    assert float(shares.low[2]) > 0.2, "0.4 is not taken for clean"
    assert float(shares.high[1]) < 0.4
    assert float(shares.high[0]) < 0.3


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_one_with_whom_the_view_agrees_most_may_have_no_wrong_label(best: int) -> None:
    rates = [0.3, 0.3, 0.3]
    rates[best] = 0.0
    shares = shares_of_wrong_labels(*drawn(rates, seed=1), 3)
    assert (float(shares.estimate[best]), float(shares.low[best])) == (0.0, 0.0)
    assert float(shares.high[best]) > 0
    assert min(float(shares.low[c]) for c in range(3) if c != best) > 0.1


def test_of_a_contributor_without_records_nothing_is_known() -> None:
    shares = shares_of_wrong_labels(*drawn([0.0, 0.3], seed=2), 4)
    assert shares.low[2:].tolist() == [0.0, 0.0]
    assert shares.high[2:].tolist() == [1.0, 1.0]
    two = shares_of_wrong_labels(*drawn([0.0, 0.3], seed=2), 2)
    assert torch.equal(shares.estimate[:2], two.estimate), "those who have none change nothing for the others"
    assert torch.equal(shares.low[:2], two.low)
    assert torch.equal(shares.high[:2], two.high)


def test_one_contributor_alone_is_compared_with_nobody() -> None:
    shares = shares_of_wrong_labels(*drawn([0.3], seed=3), 1)
    assert (shares.estimate.tolist(), shares.low.tolist()) == ([0.0], [0.0])
    assert ordered(shares)


def test_few_records_make_a_wide_interval() -> None:
    view, labels, sources = drawn([0.0, 0.1], seed=4)
    kept = (sources == 0) | (torch.arange(len(sources)) < 40)
    many = shares_of_wrong_labels(view, labels, sources, 2)
    few = shares_of_wrong_labels(view[kept], labels[kept], sources[kept], 2)
    assert float(few.high[1] - few.low[1]) > 1.5 * float(many.high[1] - many.low[1])


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("say", ["certain", "wrong", "uniform"])
@pytest.mark.parametrize("records", [1, 3, 60])
def test_views_that_say_all_or_nothing_have_an_interval_too(classes: int, say: str, records: int) -> None:
    labels = torch.arange(records) % classes
    table = {
        "certain": F.one_hot(labels, classes).float(),
        "wrong": F.one_hot((labels + 1) % classes, classes).float(),
        "uniform": torch.full((records, classes), 1 / classes),
    }[say]
    assert ordered(shares_of_wrong_labels(table, labels, torch.arange(records) % 2, 3))


def test_a_view_that_knows_nothing_excludes_nothing() -> None:
    _, labels, sources = drawn([0.0, 0.3], seed=5)
    shares = shares_of_wrong_labels(torch.full((len(labels), 4), 0.25), labels, sources, 2)
    assert shares.low.tolist() == [0.0, 0.0]
    assert float(shares.high.min()) >= 0.3


ERRORS, EACH = (0.05, 0.3, 0.45), 100
"""How much a view errs on easy, middling and hard records; so many of each contributor."""
Wrong = tuple[int, int, int]


@dataclass(frozen=True)
class Levels:
    """Two contributors, the first without wrong labels, the second with so many on each level; what the module's head
    says of them if the annotator's error meets the view's by `meets`."""

    classes: int
    wrong: Wrong
    meets: float = 1.0

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """View, labels, sources: the view errs by as much as the level says, always alike."""
        views, labels, sources = [], [], []
        for error, wrong in zip(ERRORS, self.wrong, strict=True):
            for source in (0, 1):
                shown = torch.arange(EACH) % self.classes
                turned = (torch.arange(EACH) < wrong) & (source == 1)
                own = F.one_hot(shown, self.classes) > 0
                views.append(torch.where(own, 1 - error, error / (self.classes - 1)))
                labels.append(torch.where(turned, (shown + 1) % self.classes, shown))
                sources.append(torch.full((EACH,), source))
        return torch.cat(views), torch.cat(labels), torch.cat(sources)

    def falls(self) -> list[float]:
        """By how much agreement falls with a share of 1."""
        return [1 - error * (1 + self.meets) for error in ERRORS]

    def told(self) -> list[tuple[float, float]]:
        """By level that tells anything: the share of wrong labels, and its variance."""
        found = []
        for error, wrong, falls in zip(ERRORS, self.wrong, self.falls(), strict=True):
            given = [1 - error] * (EACH - wrong) + [error / (self.classes - 1)] * wrong
            mean = sum(given) / EACH
            spread = sum((x - mean) ** 2 for x in given) / EACH + 2 * 0.05 / EACH
            if falls >= 0.3:
                found.append(((1 - error - mean) / falls, spread / EACH / falls**2))
        return found

    def mean(self) -> tuple[float, float]:
        """Over the levels that tell anything, with its standard error."""
        told = self.told()
        return sum(share for share, _ in told) / len(told), sum(spread for _, spread in told) ** 0.5 / len(told)

    def fitted(self) -> float:
        """The third level by the line through two, which does not fall: else by their mean, the surer counting more."""
        (easy, one), (middling, other) = self.told()
        slope = (middling - easy) / (ERRORS[1] - ERRORS[0])
        flat = (easy / one + middling / other) / (1 / one + 1 / other)
        beyond = easy + slope * (ERRORS[2] - ERRORS[0]) if slope >= 0 else flat
        return (easy + middling + beyond) / 3

    def highest(self) -> float:
        """Where nothing is told, in proportion to the view's error, at least that; three standard errors up."""
        told, (mean, deviation) = self.told(), self.mean()
        usual = sum(ERRORS[: len(told)]) / len(told)
        beyond = [min(1.0, max(1.0, (mean + 3 * deviation) / usual) * error) for error in ERRORS[len(told) :]]
        return (sum(share for share, _ in told) + sum(beyond)) / 3 + 3 * deviation


@pytest.mark.parametrize("wrong", [(10, 20, 30), (30, 10, 20), (40, 60, 60)])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_estimate_and_interval_are_those_of_the_definition(classes: int, wrong: Wrong) -> None:
    chance = 1 / (classes - 1)
    few, some, many = (Levels(classes, wrong, meets) for meets in (chance, (1 + chance) / 2, 1.25))
    assert len(some.told()) == 2, "the third level is to be guessed at"
    shares = shares_of_wrong_labels(*few.drawn(), 2)
    mean, deviation = few.mean()
    assert float(shares.estimate[1]) == pytest.approx(some.fitted(), abs=1e-4)
    assert float(shares.low[1]) == pytest.approx(min(some.fitted(), mean - 3 * deviation), abs=1e-4)
    unseen = ERRORS[0] + 2 * (0.05 / EACH / EACH) ** 0.5
    assert float(shares.high[1]) == pytest.approx(min(1.0, max(many.highest(), some.highest()) + unseen), abs=1e-4)


def test_records_are_compared_with_those_on_which_the_view_is_about_as_sure() -> None:
    """How sure it is shows in the lead of its first class over the second."""
    between, sure = [0.5, 0.49, 0.01], [0.5, 0.25, 0.25]
    rows = [between] * 39 + [sure]
    strata = _Strata.of(torch.tensor(rows), torch.tensor([1] * 39 + [0]), torch.zeros(40).long(), 1)
    used = strata.weights[0] > 0
    assert strata.agreed[0][used] == pytest.approx([0.49, 0.5])
    assert strata.weights[0][used] == pytest.approx([39 / 40, 1 / 40])


def test_there_are_ten_strata_of_as_many_records_each() -> None:
    view = torch.softmax(torch.randn((1000, 4), generator=torch.Generator().manual_seed(0)), 1)
    strata = _Strata.of(view, torch.zeros(1000).long(), torch.zeros(1000).long(), 1)
    assert strata.weights[0] == pytest.approx([0.1] * 10)


def test_the_one_with_whom_the_view_agrees_most_is_so_over_its_records_and_not_over_strata() -> None:
    """It has more easy records, and on hard ones another agrees more."""
    easy, hard = [0.95, 0.05], [0.55, 0.45]
    rows, sources = [easy] * 90 + [hard] * 10 + [easy] * 10 + [hard] * 90, [0] * 100 + [1] * 100
    labels = [0] * 90 + [1] * 10 + [0] * 100
    view, one = torch.tensor([*rows, easy]), torch.tensor([*labels, 1])
    strata = _Strata.of(view, one, torch.tensor([*sources, 2]), 4)
    assert strata.best == 0
    assert strata.weights.sum(1) == pytest.approx([1, 1, 1, 0])
