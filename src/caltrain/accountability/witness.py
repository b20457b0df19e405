"""A witness to the content of records: a small model of what a picture shows, without what the accused taught.

Features are filters of whitened random patches with a two-sided threshold, averaged over places (Coates, Lee and Ng,
AISTATS 2011; filters drawn instead of learned as by Coates and Ng, 2011); on them a ridge regression to the classes.
Its normal equations are sums over records, so they can be had without any contributors by subtraction: whoever is
accused has had no say in the witness. It is weaker than the trained network, and it owes nothing to it either: a
network that was poisoned, or changed by the host, cannot speak for itself here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

_PATCH = 6
_PLACES = 20_000  # patches that the filters are whitened by
_AT_ONCE = 128
_SOFTNESS = 4.0
_LOOK = 0.1  # ridge, of the mean variance: a few hundred records against a thousand features


@dataclass(frozen=True)
class PatchFeatures:
    """Filters (K, C, p, p) with biases (K,), pooled over a grid of `cells` x `cells`."""

    filters: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    cells: int = 2
    threshold: float = 0.5

    @classmethod
    def draw(cls, images: Tensor, *, filters: int = 128, seed: int) -> PatchFeatures:
        """Filters from patches of `images` (n, C, H, W), u8 or f32: a sample that the accused is a part of at most.

        A patch of theirs as a filter says what is looked for, not what it means.
        """
        generator = torch.Generator().manual_seed(seed)
        x = images.float()
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
        shape = (len(rows), images.shape[1], *_size(images))
        return cls(weights.reshape(shape), -(weights @ center), mean, scale)

    @property
    def dims(self) -> int:
        """Numbers of a picture's features."""
        return 2 * len(self.filters) * self.cells**2 + 1

    def features(self, images: Tensor) -> Tensor:
        """(n, C, H, W), u8 or f32, to (n, dims) float32; the last is one."""
        out = torch.empty((len(images), self.dims))
        for start in range(0, len(images), _AT_ONCE):
            x = (images[start : start + _AT_ONCE].float() - self.mean) / self.scale
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
        raw = F.conv2d(x, self.filters) - self.filters.sum((1, 2, 3)).view(1, -1, 1, 1) * total
        response = raw / spread + self.bias.view(1, -1, 1, 1)
        both = torch.cat((F.relu(response - self.threshold), F.relu(-response - self.threshold)), 1)
        return F.adaptive_avg_pool2d(both, self.cells).flatten(1)


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

    def predict(self, features: Tensor, *, without: frozenset[int], forget: tuple[Tensor, Tensor] | None) -> Tensor:
        """Class probabilities (R, C) for features (R, D), learned from all contributors but `without`.

        `forget` are features (F, D) and labels (F,) of records that do not count either.
        """
        kept = [p for p in range(len(self.grams)) if p not in without]
        gram, product = self.grams[kept].sum(0), self.products[kept].sum(0)
        if forget is not None:
            x, labels = forget
            gram, product = gram - x.T @ x, product - x.T @ targets(labels, product.shape[1])
        size = gram.diagonal().mean().clamp_min(1e-12)
        weights = torch.linalg.solve(gram + self.ridge * size * torch.eye(len(gram)), product)
        return torch.softmax(_SOFTNESS * features @ weights, 1)


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
    """Takes records in, batch by batch."""

    def __init__(self, features: PatchFeatures, *, contributors: int, classes: int) -> None:
        self.features, self.classes = features, classes
        self._grams = torch.zeros((contributors, features.dims, features.dims))
        self._products = torch.zeros((contributors, features.dims, classes))

    def add(self, images: Tensor, labels: Tensor, sources: Tensor) -> Tensor:
        """Records (n, C, H, W), (n,), (n,) into contributors; returns their features (n, D)."""
        x = self.features.features(images)
        y = targets(labels, self.classes)
        for contributor in set(sources.tolist()):
            own = sources == contributor
            self._grams[contributor].addmm_(x[own].T, x[own])
            self._products[contributor].addmm_(x[own].T, y[own])
        return x

    def done(self) -> LeaveOut:
        """What was learned."""
        return LeaveOut(self._grams, self._products)


class PatchWitness:
    """A witness over records that are at hand: images (N, C, H, W), labels (N,), sources (N,)."""

    def __init__(
        self, images: Tensor, labels: Tensor, sources: Tensor, *, classes: int, seed: int, filters: int = 128
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(images), generator=generator)[:2000]
        builder = WitnessBuilder(
            PatchFeatures.draw(images[sample], filters=filters, seed=seed),
            contributors=int(sources.max()) + 1,
            classes=classes,
        )
        self._features, self._labels, self._sources = builder.add(images, labels, sources), labels, sources
        self._model = builder.done()

    def testify(self, rows: Tensor, *, without: frozenset[int] = frozenset(), forget: Tensor | None = None) -> Tensor:
        """As `Witness.testify`."""
        lost = None
        if forget is not None:
            forget = forget[~torch.isin(self._sources[forget], torch.tensor(sorted(without)))]
            lost = self._features[forget], self._labels[forget]
        return self._model.predict(self._features[rows], without=without, forget=lost)

    def tells_apart(self, one: Tensor, other: Tensor) -> float:
        """As `Witness.tells_apart`."""
        return separation(self._features[one], self._features[other])
