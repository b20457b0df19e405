"""From a few suspects to all of a kind: what is found, and what is said of it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from caltrain.accountability.cases import Suspects
from caltrain.accountability.subset import CERTAIN, _suspects, fisher, grow, none, together


def drawn(seed: int, *, planted: int = 60, honest: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fingerprints, doubts, who is planted, who is accused: the planted and a third of the honest are the accused's."""
    generator = torch.Generator().manual_seed(seed)
    count = planted + honest
    mixed = torch.randperm(count, generator=generator)
    own = mixed < planted
    fingerprints = torch.randn((count, 10), generator=generator) * 0.3
    fingerprints[own, 0] += 1.5
    doubts = torch.randn(count, generator=generator) - 2
    doubts[own] += 4
    accused = own | (torch.rand(count, generator=generator) < 1 / 3)
    return fingerprints, doubts, own, accused


def some(own: Tensor, count: int) -> Tensor:
    seeds = torch.zeros_like(own)
    seeds[own.nonzero().squeeze(1)[:count]] = True
    return seeds


@pytest.mark.parametrize("seed", range(5))
def test_a_few_seeds_find_all_that_was_planted_and_little_else(seed: int) -> None:
    fingerprints, doubts, own, accused = drawn(seed)
    found, _ = grow(fingerprints, doubts, seeds=some(own, 20), accused=accused)
    hits = int(own[found.rows].sum())
    assert hits >= 0.9 * 60
    assert hits >= 0.95 * len(found.rows)
    assert bool(accused[found.rows].all())
    assert found.rows.tolist() == sorted(set(found.rows.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_precision_holds_what_is_so(seed: int) -> None:
    fingerprints, doubts, own, accused = drawn(seed)
    found, _ = grow(fingerprints, doubts, seeds=some(own, 20), accused=accused)
    assert 0 <= found.low <= found.precision <= found.high <= 1
    assert found.low - 1e-9 <= float(own[found.rows].float().mean()) <= found.high + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_what_is_not_cleared_holds_what_was_missed_and_nothing_that_is_clearly_unlike(seed: int) -> None:
    fingerprints, doubts, own, accused = drawn(seed)
    blurred = fingerprints + 0.25 * torch.randn(fingerprints.shape, generator=torch.Generator().manual_seed(seed))
    found, like = grow(blurred, doubts, seeds=some(own, 20), accused=accused)
    assert set(found.rows.tolist()) < set(like.tolist()), "nothing lay between"
    assert bool(accused[like].all())
    assert int(own[like].sum()) > int(own[found.rows].sum())
    assert int((~own)[like].sum()) < 0.2 * int((accused & ~own).sum())


def test_where_honest_records_look_alike_precision_says_so() -> None:
    """Planted records that differ from nothing: many of the others' fall among them too."""
    fingerprints, doubts, own, accused = drawn(0)
    alike = torch.randn((len(own), 10), generator=torch.Generator().manual_seed(1))
    shifted = doubts * 0.5 + torch.randn(len(own), generator=torch.Generator().manual_seed(2))
    clear, _ = grow(fingerprints, doubts, seeds=some(own, 30), accused=accused)
    blurred, _ = grow(alike, shifted, seeds=some(own, 30), accused=accused)
    assert clear.high - clear.low < 0.3
    assert len(blurred.rows) < len(clear.rows)


def test_others_records_that_look_like_the_suspects_are_not_accused_but_lower_the_precision() -> None:
    fingerprints, doubts, own, accused = drawn(0)
    clear, _ = grow(fingerprints, doubts, seeds=some(own, 20), accused=accused)
    theirs = own.nonzero().squeeze(1)[-15:]
    accused[theirs] = False
    found, _ = grow(fingerprints, doubts, seeds=some(own, 20), accused=accused)
    assert not set(found.rows.tolist()) & set(theirs.tolist())
    assert len(found.rows) >= 20
    assert found.precision < clear.precision
    assert found.low < 0.9


def test_seeds_of_others_do_not_count() -> None:
    fingerprints, doubts, own, accused = drawn(0)
    plain, _ = grow(fingerprints, doubts, seeds=some(own, 20), accused=accused)
    more, _ = grow(fingerprints, doubts, seeds=some(own, 20) | ~accused, accused=accused)
    assert torch.equal(plain.rows, more.rows)


def test_doubt_alone_tells_suspects_from_honest_records_at_the_same_place() -> None:
    fingerprints, doubts, own, accused = drawn(3)
    fingerprints = torch.randn(fingerprints.shape, generator=torch.Generator().manual_seed(3))
    found, _ = grow(fingerprints, doubts + 3 * own, seeds=some(own, 15), accused=accused)
    assert int(own[found.rows].sum()) >= 50
    assert float(own[found.rows].float().mean()) >= 0.95


@pytest.mark.parametrize("records", [1, 2, 4, 30])
@pytest.mark.parametrize("fill", [False, True])
def test_no_seeds_and_only_seeds_find_nothing_and_warn_of_nothing(records: int, fill: bool) -> None:
    mask = torch.full((records,), fill)
    found, _ = grow(torch.eye(40)[:records], torch.ones(records), seeds=mask, accused=torch.ones_like(mask))
    assert not len(found.rows)
    assert (found.precision, found.low, found.high) == (0.0, 0.0, 0.0)


def test_records_that_are_all_the_same_are_told_apart_by_nothing() -> None:
    same = torch.ones((10, 4))
    assert bool((fisher(same[:5], same[5:], same) <= CERTAIN).all())


def test_certain_is_the_log_odds_of_95_percent() -> None:
    assert pytest.approx(math.log(0.95 / 0.05), abs=0.01) == CERTAIN


def test_fisher_gives_the_log_odds_of_two_normal_distributions() -> None:
    """In one dimension nothing depends on the weights: the two ends and their spreads are those of the sample."""
    generator = torch.Generator().manual_seed(0)
    yes, no = torch.randn((30, 1), generator=generator) + 2, 2 * torch.randn((90, 1), generator=generator)
    rows = torch.tensor([[-1.0], [0.5], [2.0], [4.0]])

    def density(values: Tensor, of: Tensor) -> Tensor:
        away = (values - of.mean()) / of.std()
        return -(away.square() / 2 + of.std().log() + math.log(2 * math.pi) / 2).squeeze(1)

    expected = density(rows, yes) - density(rows, no) + math.log(30 / 90)
    assert torch.allclose(fisher(yes, no, rows), expected, atol=1e-4)


def test_precision_is_the_share_of_others_that_fall_among_the_suspects_by_hand() -> None:
    """5 of 100 others are like the suspects: of 50 honest records of the accused, 50 x 5 / 95 are among the 20."""
    accused = torch.arange(170) >= 100
    found = torch.arange(170) >= 150
    like = found | (torch.arange(170) < 5)
    suspects = _suspects(found, like, accused)

    def precision(rate: float) -> float:
        return 1 - 50 * rate / (1 - rate) / 20

    assert suspects.rows.tolist() == list(range(150, 170))
    assert suspects.precision == pytest.approx(precision(0.05))
    assert suspects.low == pytest.approx(precision(float(beta.ppf(0.975, 6, 95))))
    assert suspects.high == pytest.approx(precision(float(beta.ppf(0.025, 5, 96))))


@pytest.mark.parametrize("honest", [0, 10])
def test_with_nobody_to_compare_with_precision_is_unknown(honest: int) -> None:
    found = torch.arange(20 + honest) < 20
    suspects = _suspects(found, found, torch.ones_like(found))
    assert suspects.low == (0.0 if honest else 1.0)


def test_suspects_of_several_classes_are_weighed_by_their_number() -> None:
    both = together(
        [
            Suspects(torch.tensor([4, 5, 6]), 0.9, 0.8, 1.0),
            none(),
            Suspects(torch.tensor([1]), 0.5, 0.4, 0.6),
        ]
    )
    assert both.rows.tolist() == [1, 4, 5, 6]
    assert (both.precision, both.low, both.high) == pytest.approx((0.8, 0.7, 0.9))


@pytest.mark.parametrize("found", [[], [none()], [none(), none()]])
def test_no_suspects_together_are_none(found: list[Suspects]) -> None:
    both = together(found)
    assert (both.rows.tolist(), both.precision, both.low, both.high) == ([], 0.0, 0.0, 0.0)
