"""Which records stand behind a prediction, by several methods behind one interface: a second opinion on a trace.

Each has its own idea of "behind", and its own way to fail:

  Fingerprints  nearest in the last features, inside the predicted class (arXiv:1812.03230). Sees what the network takes
                for alike; blind to records that moved the decision from elsewhere, such as wrong labels.
  GradientDot   a training step on the record would have made this prediction likelier: gradients of the loss by the
                last layer (TracIn with one checkpoint: Pruthi et al., NeurIPS 2020). Led by records with large losses.
  Trak          the same with the curvature taken out: the last layer's gradients of the margin, decorrelated over all
                records (TRAK with one model: Park et al., ICML 2023). The steadiest of the three, and the slowest.

All three look at the last layer of one trained model. None of them is evidence of guilt: that takes a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-12
_MOST_NUMBERS = 4096  # of one record's gradient, before features are projected
AT_ONCE = 1 << 12
"""Records that are worked on together: what they take stays in the cache."""


@dataclass(frozen=True)
class Seen:
    """What the trained network makes of records or inputs.

    Features before its last layer (N, D), at their own length, class probabilities (N, C), and labels (N,): given ones
    of records, predicted ones of inputs.
    """

    features: Tensor
    probabilities: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: slice) -> Seen:
        """Some of the rows."""
        return Seen(self.features[chosen], self.probabilities[chosen], self.labels[chosen])

    def blocks(self) -> Iterator[Seen]:
        """As `Records.blocks`."""
        return (self.rows(slice(start, start + AT_ONCE)) for start in range(0, len(self), AT_ONCE))


class Records(Protocol):
    """At least one record, held in whatever way."""

    def blocks(self) -> Iterator[Seen]:
        """All of them, in order, as many at a time as are worked on at once."""


class Attribution(Protocol):
    """A method, made for one model's records."""

    def scores(self, asked: Seen) -> Tensor:
        """How much (Q, N) each record stands behind the prediction for each input; -inf where it cannot."""


@dataclass(frozen=True)
class Fingerprints:
    """By distance: minus that of the features at length one, for records of the predicted class."""

    records: Seen

    def scores(self, asked: Seen) -> Tensor:
        """As `Attribution.scores`."""
        near = -torch.cdist(F.normalize(asked.features, dim=1), F.normalize(self.records.features, dim=1))
        return near.masked_fill(asked.labels[:, None] != self.records.labels, -torch.inf)


@dataclass(frozen=True)
class GradientDot:
    """By the inner product of two gradients of the loss: that of the record, that of the prediction."""

    records: Records

    def scores(self, asked: Seen) -> Tensor:
        """As `Attribution.scores`."""
        errors = _errors(asked)
        # A gradient by the last layer is an outer product, so theirs is a product of two inner ones; one for the bias.
        parts = [(errors @ _errors(own).T) * (asked.features @ own.features.T + 1) for own in self.records.blocks()]
        return torch.cat(parts, 1)


class Trak:
    """By the same product of the margin's gradients, whitened over all records, weighted by the record's own doubt.

    Features are projected at random where a gradient would have more than 4,096 numbers; the Gram matrix is exact.
    """

    def __init__(self, records: Records, *, ridge: float = 1e-3, seed: int = 0) -> None:
        first = next(records.blocks())
        classes, dims = first.probabilities.shape[1], first.features.shape[1]
        room = max(1, _MOST_NUMBERS // classes - 1)
        self._projection: Tensor | None = None
        if dims > room:
            generator = torch.Generator().manual_seed(seed)
            self._projection = torch.randn((dims, room), generator=generator) / room**0.5
        self._records = records
        gram = torch.zeros(())
        for own in map(self._gradients, records.blocks()):
            gram = gram + own.T @ own
        size = gram.diagonal().mean().clamp_min(_LEAST)
        self._factor = torch.linalg.cholesky(gram + ridge * size * torch.eye(len(gram)))

    def scores(self, asked: Seen) -> Tensor:
        """As `Attribution.scores`."""
        white = torch.cholesky_solve(self._gradients(asked).T, self._factor)
        parts = []
        for own in self._records.blocks():
            doubt = 1 - own.probabilities.gather(1, own.labels[:, None])[:, 0]
            parts.append((self._gradients(own) @ white).T * doubt)
        return torch.cat(parts, 1)

    def _gradients(self, seen: Seen) -> Tensor:
        """Of the margin log(p / (1 - p)) of each row's label, by the last layer: (n, C (D + 1))."""
        features = seen.features if self._projection is None else seen.features @ self._projection
        given = F.one_hot(seen.labels, seen.probabilities.shape[1])
        others = seen.probabilities * (1 - given)
        margin = given - others / others.sum(1, keepdim=True).clamp_min(_LEAST)
        with_bias = F.pad(features, (0, 1), value=1.0)
        return (margin[:, :, None] * with_bias[:, None, :]).flatten(1)


def _errors(seen: Seen) -> Tensor:
    """Gradient of the loss (n, C) by the logits."""
    return seen.probabilities - F.one_hot(seen.labels, seen.probabilities.shape[1])
