"""Shares of wrong labels where it is known which labels are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.quality import Shares, shares_of_wrong_labels


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


LEVELS = ((0.05, 10), (0.3, 20), (0.45, 30))
"""How much a view errs on a hundred easy, middling and hard records of each contributor; wrong labels of the second."""
EACH, CLASSES, SAID = 100, 3, 1.0


def by_levels() -> tuple[Tensor, Tensor, Tensor]:
    """Views that err by as much as the level says, always alike; the first contributor has no wrong label."""
    views, labels, sources = [], [], []
    for error, wrong in LEVELS:
        for source in (0, 1):
            shown = torch.arange(EACH) % CLASSES
            turned = (torch.arange(EACH) < wrong) & (source == 1)
            views.append(torch.where(F.one_hot(shown, CLASSES) > 0, SAID - error, error / (CLASSES - 1)))
            labels.append(torch.where(turned, (shown + 1) % CLASSES, shown))
            sources.append(torch.full((EACH,), source))
    return torch.cat(views), torch.cat(labels), torch.cat(sources)


def level_figures(meets: float) -> tuple[list[float], list[float], list[bool]]:
    """By level, as the module's head says: share of wrong labels, its variance, whether the level tells anything."""
    shares, variances, telling = [], [], []
    for error, wrong in LEVELS:
        given = [SAID - error] * (EACH - wrong) + [error / (CLASSES - 1)] * wrong
        mean = sum(given) / EACH
        spread = sum((x - mean) ** 2 for x in given) / EACH
        falls = SAID - error * (1 + meets)
        telling.append(falls >= 0.3)
        falls = max(falls, 0.3)
        shares.append((SAID - error - mean) / falls)
        variances.append((spread + 2 * 0.05 / EACH) / EACH / falls**2)
    return shares, variances, telling


def told_mean(meets: float) -> tuple[float, float]:
    """Mean share over the levels that tell anything, and its standard error."""
    shares, variances, telling = level_figures(meets)
    here = [i for i, so in enumerate(telling) if so]
    return sum(shares[i] for i in here) / len(here), sum(variances[i] for i in here) ** 0.5 / len(here)


def highest(meets: float) -> float:
    """Where nothing is told, in proportion to the view's error; three standard errors up."""
    shares, _, telling = level_figures(meets)
    mean, deviation = told_mean(meets)
    errors = [error for error, _ in LEVELS]
    usual = sum(e for e, so in zip(errors, telling, strict=True) if so) / sum(telling)
    end = mean + 3 * deviation
    whole = [s if so else min(1, end / usual * e) for s, e, so in zip(shares, errors, telling, strict=True)]
    return sum(whole) / len(LEVELS) + 3 * deviation


def test_estimate_and_interval_are_those_of_the_definition() -> None:
    """Two levels tell something and the third does not, if the annotator's error meets the view's half way."""
    shares = shares_of_wrong_labels(*by_levels(), 2)
    chance = 1 / (CLASSES - 1)
    half_way = (1 + chance) / 2
    (easy, middling, _), _, telling = level_figures(half_way)
    assert telling == [True, True, False]
    (e1, _), (e2, _), (e3, _) = LEVELS
    beyond = easy + (middling - easy) / (e2 - e1) * (e3 - e1)  # a line through two levels
    assert float(shares.estimate[1]) == pytest.approx((easy + middling + beyond) / 3, abs=1e-4)
    mean, deviation = told_mean(chance)
    assert float(shares.low[1]) == pytest.approx(mean - 3 * deviation, abs=1e-4)
    unseen = e1 + 2 * (0.05 / EACH / EACH) ** 0.5
    assert highest(1.0) > highest(half_way)
    assert float(shares.high[1]) == pytest.approx(highest(1.0) + unseen, abs=1e-4)
