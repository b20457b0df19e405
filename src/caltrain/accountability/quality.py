"""Each contributor's share of wrong labels, with an interval, from how far a view of the records agrees with them.

The view errs too, and more on hard records. How much it errs on right labels is read off the contributor with which it
agrees most, within strata of records on which it is about equally sure. There a share r of wrong labels lowers the mean
probability of the given label by r (1 - e - a): e is the view's error, a what it gives the very wrong label. Two things
are not known, and the interval covers both:

  a            between chance and a quarter more than e (an annotator who errs just where the view does)
  hard strata  where e is so large that agreement would hardly fall, wrong labels may be as often as elsewhere, or more
               often in proportion to e, or as often as the view errs (annotators err on hard records)

Nothing here says how many wrong labels the best contributor has among records on which the view is unsure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

_STRATA = 10
_BLUNT = 0.3  # what agreement must be able to fall by, for anything to be concluded from it
_ALIKE = 1.25
_ERRORS = 3.0  # standard errors at either end: they are of strata that were chosen by the same records
_SAMPLE = 100_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shares:
    """Per contributor (P,): the estimated share of wrong labels, and an interval that is to hold in 95 % of cases."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def shares_of_wrong_labels(view: Tensor, labels: Tensor, sources: Tensor, contributors: int) -> Shares:
    """From class probabilities (N, C) of records that were not used to make them.

    Contributors are compared with one another: the best has an estimate of 0, one alone too. One without records has
    any share.
    """
    strata = _Strata.of(view, labels, sources, contributors)
    chance = 1 / max(1, view.shape[1] - 1)
    few, some, many = (strata.told(meets) for meets in (chance, (1 + chance) / 2, _ALIKE))
    unseen = float((strata.error + 2 * np.sqrt(strata.spread[strata.best])).min())
    estimate = np.array([some.fitted(c) for c in range(contributors)])
    low = np.array([few.mean(c) - _ERRORS * few.deviation(c) for c in range(contributors)])
    high = np.array([max(many.highest(c), some.highest(c)) + unseen for c in range(contributors)])
    empty = strata.weights.sum(1) == 0
    low, high = np.where(empty, 0.0, np.minimum(low, estimate)), np.where(empty, 1.0, np.maximum(high, estimate))
    found = (torch.from_numpy(np.clip(each, 0.0, 1.0)).float() for each in (estimate, low, high))
    return Shares(*found)


@dataclass(frozen=True)
class _Told:
    """What the strata tell of the share, given how often the view meets the annotator's error."""

    strata: _Strata
    shares: Array  # (P, S)
    spread: Array  # (P, S), variances
    here: NDArray[np.bool_]  # (S,): strata that tell anything

    def _weights(self, contributor: int) -> Array:
        weights = self.strata.weights[contributor] * self.here
        return np.asarray(weights / max(weights.sum(), 1e-9))

    def mean(self, contributor: int) -> float:
        """Where something is told."""
        return float(self._weights(contributor) @ self.shares[contributor])

    def deviation(self, contributor: int) -> float:
        """Standard error of that mean."""
        return float(np.sqrt(self._weights(contributor) ** 2 @ self.spread[contributor]))

    def fitted(self, contributor: int) -> float:
        """Of all records: where nothing is told, by the line in e that fits where something is."""
        if not self.here.any():
            return 0.0
        scale = 1 / np.sqrt(self.spread[contributor][self.here])
        line = np.stack((np.ones(len(self.strata.error)), self.strata.error), 1)
        found, _ = nnls(line[self.here] * scale[:, None], self.shares[contributor][self.here] * scale)
        return self._over(contributor, line @ found)

    def highest(self, contributor: int) -> float:
        """Of all records, with the mean at its upper end: where nothing is told, in proportion to e, at least e."""
        end = self.mean(contributor) + _ERRORS * self.deviation(contributor)
        error = self.strata.error
        usual = max(float(self._weights(contributor) @ error), 1e-3)
        return self._over(contributor, np.maximum(end / usual, 1) * error) + _ERRORS * self.deviation(contributor)

    def _over(self, contributor: int, elsewhere: Array) -> float:
        shares = np.where(self.here, self.shares[contributor], np.clip(elsewhere, 0.0, 1.0))
        return float(self.strata.weights[contributor] @ shares)


@dataclass(frozen=True)
class _Strata:
    """By contributor and stratum (P, S): mean probability of the given label, its variance, share of records."""

    agreed: Array
    spread: Array
    weights: Array
    best: int

    @classmethod
    def of(cls, view: Tensor, labels: Tensor, sources: Tensor, contributors: int) -> _Strata:
        given = view.gather(1, labels[:, None])[:, 0].double()
        top = view.topk(min(2, view.shape[1]), dim=1).values.clamp_min(1e-9)
        lead = (top[:, 0] / top[:, -1]).log()
        edges = torch.quantile(lead[:: max(1, len(lead) // _SAMPLE)], torch.linspace(0, 1, _STRATA + 1)[1:-1])
        cell = sources * _STRATA + torch.bucketize(lead, edges)

        def total(values: Tensor) -> Array:
            zeros = torch.zeros(contributors * _STRATA, dtype=torch.float64)
            return np.asarray(zeros.index_add_(0, cell, values).view(contributors, _STRATA).numpy())

        count = total(torch.ones_like(given))
        some = np.maximum(count, 1)
        agreed = total(given) / some
        # As if a few records more had been seen, so that three that agree do not make a certainty.
        spread = (np.maximum(total(given.square()) / some - agreed**2, 0) + 0.05 / some) / some
        weights = count / np.maximum(count.sum(1, keepdims=True), 1)
        return cls(agreed, spread, weights, int((agreed * weights).sum(1).argmax()))

    @property
    def error(self) -> Array:
        """What the view gives other classes than the right one (S,)."""
        return np.asarray(1 - self.agreed[self.best])

    def told(self, meets: float) -> _Told:
        """If `meets` of the view's errors are the annotator's."""
        falls = 1 - self.error * (1 + meets)
        here, falls = falls >= _BLUNT, np.maximum(falls, _BLUNT)
        shares = (self.agreed[self.best] - self.agreed) / falls
        return _Told(self, shares, (self.spread + self.spread[self.best]) / falls**2, here)
