"""Means and rates with their confidence intervals, and rank correlation. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.figures import Estimate

LEVEL = 0.95
_RESAMPLES = 2000
_AT_ONCE = 1 << 22
_STEP = "estimate exposure"


def mean_estimate(values: ArrayLike, *, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The mean of values (N,) and its bootstrap percentile interval over 2,000 resamples.

    The interval is stretched by sqrt(n / (n - 1)), by which a resample's spread is short (Hesterberg 2015,
    arXiv:1411.5279); under some ten values it is still too narrow. Raises DataError `exposure.no-interval` for fewer
    than two values, IntegrityError `exposure.not-finite`.
    """
    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(x) < 2:
        raise _no_interval(len(x), least=2)
    if not np.isfinite(x).all():
        raise IntegrityError(
            "exposure.not-finite",
            f"{np.count_nonzero(~np.isfinite(x))} of {len(x)} measured values are not finite",
            step=_STEP,
            fix="Assess a model whose weights are of a finished training.",
        )
    rng, mean = np.random.default_rng(seed), float(x.mean())
    rows = max(1, _AT_ONCE // len(x))
    counts = [min(rows, _RESAMPLES - done) for done in range(0, _RESAMPLES, rows)]
    means = np.concatenate([x[rng.integers(0, len(x), (count, len(x)))].mean(axis=1) for count in counts])
    tail = (1 - level) / 2
    low, high = mean + (np.quantile(means, (tail, 1 - tail)) - mean) * math.sqrt(len(x) / (len(x) - 1))
    return Estimate(mean, min(float(low), mean), max(float(high), mean), len(x))


def rate_estimate(hits: int, n: int, *, level: float = LEVEL) -> Estimate:
    """A rate and its interval (Wilson 1927), which is never empty: no hit among few records proves little.

    Raises DataError `exposure.no-interval` for n = 0.
    """
    if n < 1:
        raise _no_interval(n, least=1)
    rate, z2 = hits / n, _z(level) ** 2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = max(0.0, middle - half) if hits else 0.0
    return Estimate(rate, low, min(1.0, middle + half) if hits < n else 1.0, n)


def records_to_show(rate: float, *, level: float = LEVEL) -> int:
    """Fewest records that can show a rate to be at most `rate` (over 0): with no hit, `rate_estimate` then ends there.

    With fewer, the upper end of the interval lies above `rate` whatever is measured.
    """
    z2 = _z(level) ** 2
    n = max(1, math.ceil(z2 * (1 - rate) / rate))
    return n if rate_estimate(0, n, level=level).high <= rate else n + 1  # the quotient may be rounded down


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation of two equally long sequences, ties averaged; 0.0 where one of them is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def _ranks(values: Sequence[float]) -> NDArray[Any]:
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ranks: NDArray[Any] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _no_interval(n: int, *, least: int) -> DataError:
    return DataError(
        "exposure.no-interval",
        f"{n} measured values have no confidence interval",
        step=_STEP,
        fix=f"Assess at least {least} records; some hundred make an interval that is of use.",
    )
