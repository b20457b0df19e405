"""Witnesses to the content of records: small models of what a picture shows, without what the accused taught.

Features are filters of whitened random patches with a two-sided threshold, averaged over places (Coates, Lee and Ng,
AISTATS 2011; filters drawn instead of learned as by Coates and Ng, 2011); on them a ridge regression to the classes.
Its normal equations are sums over records, so they can be had without any contributors by subtraction: whoever is
accused has had no say in the witness. It is weaker than the trained network, and it owes nothing to it either: a
network that was poisoned, or changed by the host, cannot speak for itself here.

There are several, who look at the picture itself and at ever coarser ones. What is added to a picture moves a small
model some way, at times to just the class that the label names; it seldom does so at every scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

_PATCH = 6
_PLACES = 20_000  # patches that the filters are whitened by
_AT_ONCE = 16  # small enough that what is worked on stays in the cache
_SHRINKS = (1, 2, 4)
_ROWS_AT_ONCE = 1 << 13
_SAMPLE = 2000
_SOFTNESS = 4.0
_LOOK = 0.1  # ridge, of the mean variance: a few hundred records against a thousand features


@dataclass(frozen=True)
class PatchFeatures:
    """Filters (K, C, p, p) with biases (K,) of pictures `shrink` times smaller, pooled over `cells` x `cells`."""

    filters: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    shrink: int = 1
    cells: int = 2
    threshold: float = 0.5

    @classmethod
    def draw(cls, images: Tensor, *, filters: int = 128, seed: int, shrink: int = 1) -> PatchFeatures:
        """Filters from patches of `images` (n, C, H, W), u8 or f32: a sample that the accused is a part of at most.

        A patch of theirs as a filter says what is looked for, not what it means.
        """
        generator = torch.Generator().manual_seed(seed)
        x = _shrunk(images, shrink)
        mean, scale = x.mean(), x.std(correction=0).clamp_min(1e-6)
        patches = _patches((x - mean) / scale, generator)
        patches = _normalised(patches)
        center = patches.mean(0)
        _, values, axes = torch.linalg.svd(patches - center, full_matrices=False)
        # ZCA: directions with little variance are noise and are held down, not blown up.
        power = values.square() / len(patches)
        whiten = (axes.T / (power + 0.1 * power.mean()).clamp_min(1e-12).sqrt()) @ axes
        chosen = torch.randperm(len(patches), generator=generator)[:filters]
        rows = (patches[chosen] - center) @ whiten
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
        weights = rows @ whiten
        shape = (len(rows), x.shape[1], *_size(x))
        return cls(weights.reshape(shape), -(weights @ center), mean, scale, shrink)

    @property
    def dims(self) -> int:
        """Numbers of a picture's features."""
        return 2 * len(self.filters) * self.cells**2 + 1

    def features(self, images: Tensor) -> Tensor:
        """(n, C, H, W), u8 or f32, to (n, dims) float32; the last is one."""
        out = torch.empty((len(images), self.dims))
        for start in range(0, len(images), _AT_ONCE):
            x = (_shrunk(images[start : start + _AT_ONCE], self.shrink) - self.mean) / self.scale
            out[start : start + len(x), :-1] = self._pooled(x)
        out[:, -1] = 1
        return out

    def _pooled(self, x: Tensor) -> Tensor:
        # Each patch is normalised before it meets the filters: done on the sums, so that no patch is written out.
        _, channels, height, width = self.filters.shape
        size = channels * height * width
        ones = torch.ones((1, channels, height, width))
        total = F.conv2d(x, ones) / size
        spread = (F.conv2d(x.square(), ones) / size - total.square()).clamp_min(0).add(0.01).sqrt()
        response = F.conv2d(x, self.filters)
        response -= self.filters.sum((1, 2, 3)).view(1, -1, 1, 1) * total
        response /= spread
        response += self.bias.view(1, -1, 1, 1)
        sides = ((response - self.threshold).clamp_min_(0), (-response).sub_(self.threshold).clamp_min_(0))
        return torch.cat([F.adaptive_avg_pool2d(side, self.cells) for side in sides], 1).flatten(1)


def draw_views(images: Tensor, *, filters: int = 128, seed: int) -> tuple[PatchFeatures, ...]:
    """As `PatchFeatures.draw` at every scale at which a picture of `images` (n, C, H, W) still holds a whole patch."""
    most = min(images.shape[2:]) // _PATCH
    return tuple(
        PatchFeatures.draw(images, filters=filters, seed=seed, shrink=shrink)
        for shrink in _SHRINKS
        if shrink <= max(1, most)
    )


def _shrunk(images: Tensor, shrink: int) -> Tensor:
    """(n, C, H, W), u8 or f32, to float32 of 1/`shrink` of the sides: means of squares."""
    x = images.float()
    return F.avg_pool2d(x, shrink) if shrink > 1 else x


def _size(images: Tensor) -> tuple[int, int]:
    return min(_PATCH, images.shape[2]), min(_PATCH, images.shape[3])


def _patches(x: Tensor, generator: torch.Generator) -> Tensor:
    height, width = _size(x)
    each = max(1, _PLACES // len(x))
    pieces = []
    for _ in range(each):
        top = int(torch.randint(x.shape[2] - height + 1, (), generator=generator))
        left = int(torch.randint(x.shape[3] - width + 1, (), generator=generator))
        pieces.append(x[:, :, top : top + height, left : left + width].flatten(1))
    return torch.cat(pieces)[:_PLACES]


def _normalised(patches: Tensor) -> Tensor:
    away = patches - patches.mean(1, keepdim=True)
    return away / (away.square().mean(1, keepdim=True) + 0.01).sqrt()


@dataclass(frozen=True)
class LeaveOut:
    """Per contributor X^T X (P, D, D), X^T Y (P, D, C): ridge regressions without any of them."""

    grams: Tensor
    products: Tensor
    ridge: float = 1e-2
    _known: dict[frozenset[int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def predict(self, features: Tensor, *, without: frozenset[int], forget: tuple[Tensor, Tensor] | None) -> Tensor:
        """Class probabilities (R, C) for features (R, D), learned from all contributors but `without`.

        `forget` are features (F, D) and labels (F,) of records that do not count either.
        """
        if forget is not None:
            weights = self._weights(without, forget)
        elif (known := self._known.get(without)) is not None:
            weights = known
        else:
            weights = self._known[without] = self._weights(without, None)
        return torch.softmax(_SOFTNESS * features @ weights, 1)

    def _weights(self, without: frozenset[int], forget: tuple[Tensor, Tensor] | None) -> Tensor:
        kept = [p for p in range(len(self.grams)) if p not in without]
        gram, product = self.grams[kept].sum(0), self.products[kept].sum(0)
        if forget is not None:
            x, labels = forget
            gram, product = gram - x.T @ x, product - x.T @ targets(labels, product.shape[1])
        size = gram.diagonal().mean().clamp_min(1e-12)
        weights: Tensor = torch.linalg.solve(gram + self.ridge * size * torch.eye(len(gram)), product)
        return weights


def targets(labels: Tensor, classes: int) -> Tensor:
    """What the regression is to say: (n,) to (n, C), of mean zero."""
    return F.one_hot(labels, classes).float() - 1 / classes


def separation(one: Tensor, other: Tensor) -> float:
    """AUC of telling features (R, D) from (S, D) by a ridge regression, each by a fit to the other half."""
    x, side = torch.cat((one, other)), torch.cat((torch.ones(len(one)), -torch.ones(len(other))))
    x, value = x - x.mean(0), torch.empty(len(x))
    half = torch.arange(len(x)) % 2 == 0
    for out in (half, ~half):
        gram = x[~out].T @ x[~out]
        gram = gram + _LOOK * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram))
        value[out] = x[out] @ torch.linalg.solve(gram, x[~out].T @ side[~out])
    rank = rankdata(value.numpy())  # of equal values the mean: what looks the same is not told apart
    wins = float(rank[: len(one)].sum()) - len(one) * (len(one) + 1) / 2
    return wins / max(1, len(one) * len(other))


class WitnessBuilder:
    """Takes records in, batch by batch, for a witness by each of `views`."""

    def __init__(self, views: Sequence[PatchFeatures], *, contributors: int, classes: int) -> None:
        self.views, self.classes = tuple(views), classes
        self._grams = [torch.zeros((contributors, view.dims, view.dims)) for view in views]
        self._products = [torch.zeros((contributors, view.dims, classes)) for view in views]

    def add(self, images: Tensor, labels: Tensor, sources: Tensor) -> Tensor:
        """Records (n, C, H, W), (n,), (n,) into contributors; returns their features by all views (n, sum of dims)."""
        found = [view.features(images) for view in self.views]
        y = targets(labels, self.classes)
        for contributor in set(sources.tolist()):
            own = sources == contributor
            for x, gram, product in zip(found, self._grams, self._products, strict=True):
                gram[contributor].addmm_(x[own].T, x[own])
                product[contributor].addmm_(x[own].T, y[own])
        return torch.cat(found, 1)

    def done(self) -> tuple[LeaveOut, ...]:
        """What was learned, by view."""
        return tuple(map(LeaveOut, self._grams, self._products))


def columns(views: Sequence[PatchFeatures]) -> list[slice]:
    """Where each view's features are in a row of `WitnessBuilder.add`."""
    ends = list(accumulate((view.dims for view in views), initial=0))
    return list(map(slice, ends, ends[1:]))


@dataclass(frozen=True)
class RidgeWitness:
    """A witness by one view: labels (N,) and sources (N,) of the records, what was learned, their features by row."""

    features: Callable[[Tensor], Tensor]
    """Rows (R,) to (R, D)."""
    labels: Tensor
    sources: Tensor
    model: LeaveOut

    def testify(self, rows: Tensor, *, without: frozenset[int] = frozenset(), forget: Tensor | None = None) -> Tensor:
        """As `Witness.testify`."""
        lost = None
        if forget is not None:
            forget = forget[~torch.isin(self.sources[forget], torch.tensor(sorted(without), dtype=torch.int64))]
            lost = self.features(forget), self.labels[forget]
        parts = torch.split(rows, _ROWS_AT_ONCE)
        return torch.cat([self.model.predict(self.features(part), without=without, forget=lost) for part in parts])

    def tells_apart(self, one: Tensor, other: Tensor) -> float:
        """As `Witness.tells_apart`."""
        return separation(self.features(one), self.features(other))


def witnesses(
    images: Tensor, labels: Tensor, sources: Tensor, *, classes: int, seed: int, filters: int = 128
) -> tuple[RidgeWitness, ...]:
    """Witnesses over records that are at hand: images (N, C, H, W), labels (N,), sources (N,)."""
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:_SAMPLE]
    views = draw_views(images[sample], filters=filters, seed=seed)
    builder = WitnessBuilder(views, contributors=int(sources.max()) + 1, classes=classes)
    found = builder.add(images, labels, sources)
    return tuple(
        RidgeWitness(partial(torch.index_select, found[:, own], 0), labels, sources, model)
        for own, model in zip(columns(views), builder.done(), strict=True)
    )
