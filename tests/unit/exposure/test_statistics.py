"""Intervals cover what they say, a rate of nothing is not nothing, and ranks are averaged over ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.statistics import mean_estimate, rate_estimate, records_to_show, spearman

finite = st.floats(-1e6, 1e6)


def test_a_mean_and_its_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = mean_estimate(values)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 20  # by the central limit theorem
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert found.n == 400


def test_nine_in_ten_of_the_intervals_for_ninety_percent_hold_the_truth() -> None:
    rng = np.random.default_rng(2)
    draws = [mean_estimate(rng.exponential(1, 40), seed=i, level=0.9) for i in range(200)]
    assert 0.82 <= np.mean([d.low <= 1 <= d.high for d in draws]) <= 0.97


def test_an_interval_is_stretched_for_few_values() -> None:
    """Of (0, 1) a quarter of the resamples are (0, 0), so the percentiles alone are 0 and 1."""
    found = mean_estimate([0.0, 1.0])
    assert [found.low, found.high] == pytest.approx([0.5 - 0.5 * 2**0.5, 0.5 + 0.5 * 2**0.5])


@settings(max_examples=30, deadline=None)
@given(st.lists(finite, min_size=2, max_size=30), st.integers(0, 1000))
def test_the_interval_holds_the_mean_and_is_the_same_for_the_same_seed(values: list[float], seed: int) -> None:
    found = mean_estimate(values, seed=seed)
    assert found.low <= found.value <= found.high
    assert found == mean_estimate(values, seed=seed)


def test_another_seed_draws_another_interval() -> None:
    values = np.random.default_rng(3).random(50)
    assert mean_estimate(values, seed=1) != mean_estimate(values, seed=2)


def test_many_values_are_resampled_in_parts() -> None:
    values = np.random.default_rng(4).random(10_000)
    found = mean_estimate(values)
    assert 0.008 < found.high - found.low < 0.015


@pytest.mark.parametrize("values", [[], [0.3]])
def test_one_value_has_no_interval(values: list[float]) -> None:
    with pytest.raises(DataError) as refused:
        mean_estimate(values)
    assert refused.value.code == "exposure.no-interval"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(IntegrityError) as refused:
        mean_estimate([0.1, bad, 0.2])
    assert refused.value.code == "exposure.not-finite"
    assert "1 of 3" in refused.value.what


def test_wilson_as_tabulated() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        found = rate_estimate(hits, n)
        assert (found.value, found.n) == (hits / n, n)
        assert found.low == pytest.approx(low, abs=6e-5)
        assert found.high == pytest.approx(high, abs=6e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_a_rate_lies_in_its_interval_and_that_in_0_to_1(pair: tuple[int, int], level: float) -> None:
    hits, n = pair
    found = rate_estimate(hits, n, level=level)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_no_record_has_no_rate() -> None:
    with pytest.raises(DataError) as refused:
        rate_estimate(0, 0)
    assert refused.value.code == "exposure.no-interval"


def test_two_percent_needs_189_records() -> None:
    assert records_to_show(0.02) == 189
    assert records_to_show(1.0) == 1


@given(st.floats(1e-4, 1, exclude_min=True), st.floats(0.5, 0.999))
def test_that_many_records_are_needed_and_enough(rate: float, level: float) -> None:
    n = records_to_show(rate, level=level)
    assert rate_estimate(0, n, level=level).high <= rate
    if n > 2:
        assert rate_estimate(0, n - 2, level=level).high > rate


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3, 4], [1, 4, 9, 16], 1.0),
        ([1, 2, 3, 4], [0.5, 0.4, 0.1, 0.0], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # ties averaged; the same by scipy.stats.spearmanr
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),
        ([1, 2, 3], [7, 7, 7], 0.0),
        ([2], [3], 0.0),
    ],
)
def test_rank_correlation(x: list[float], y: list[float], rho: float) -> None:
    assert spearman(x, y) == pytest.approx(rho)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_rank_correlation_is_bounded_and_symmetric(pairs: list[tuple[int, int]]) -> None:
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    assert abs(spearman(x, y)) <= 1 + 1e-12
    assert spearman(x, y) == pytest.approx(spearman(y, x))
    assert spearman(x, [-v for v in y]) == pytest.approx(-spearman(x, y))
