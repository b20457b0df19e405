"""Scans of a model's links for suspicious records, without any misprediction: each gives every record a score."""

from __future__ import annotations

import torch
from torch import Tensor

from caltrain.accountability.cases import Links

_DIMS = 10
_SAMPLE = 2000
_STARTS, _ROUNDS = 4, 50
_LEAST = 20  # a class of fewer records has no clusters to speak of


def spectral(links: Links) -> Tensor:
    """Outlier score (N,) along its class's first singular vector, 1 on average (Tran, Li and Madry, NeurIPS 2018)."""
    scores = torch.zeros(len(links.labels))
    for rows in _classes(links):
        away = links.fingerprints[rows] - links.fingerprints[rows].mean(0)
        first = torch.linalg.eigh(away.T @ away).eigenvectors[:, -1]
        size = (away @ first).square()
        scores[rows] = size / size.mean().clamp_min(1e-12)
    return scores


def activation_clusters(links: Links, *, seed: int = 0) -> Tensor:
    """Score (N,) in 0..1 of belonging to the smaller of two clusters of a class (Chen et al., arXiv:1811.03728).

    The score is how well the two are apart (silhouette) times how unequal they are; the larger cluster has zero.
    """
    scores = torch.zeros(len(links.labels))
    generator = torch.Generator().manual_seed(seed)
    for rows in _classes(links):
        away = links.fingerprints[rows] - links.fingerprints[rows].mean(0)
        points = away @ torch.linalg.eigh(away.T @ away).eigenvectors[:, -_DIMS:]
        second = two_means(points, generator)
        small = second if 2 * int(second.sum()) < len(second) else ~second
        some = torch.randperm(len(points), generator=generator)[:_SAMPLE]
        apart = max(0.0, silhouette(points[some], small[some]))
        scores[rows[small]] = apart * (1 - 2 * float(small.float().mean()))
    return scores


def two_means(points: Tensor, generator: torch.Generator) -> Tensor:
    """Which of two clusters each of the points (n, D) is in (n,): the best of a few times Lloyd's algorithm."""
    best, least = torch.zeros(len(points), dtype=torch.bool), torch.inf
    for _ in range(_STARTS):
        centers = points[torch.randperm(len(points), generator=generator)[:2]]
        for _ in range(_ROUNDS):
            second = torch.cdist(points, centers).argmin(1) == 1
            if second.all() or not second.any():
                break
            centers = torch.stack((points[~second].mean(0), points[second].mean(0)))
        distances = torch.cdist(points, centers).min(1)
        if float(distances.values.square().sum()) < least:
            best, least = distances.indices == 1, float(distances.values.square().sum())
    return best


def silhouette(points: Tensor, second: Tensor) -> float:
    """How well two clusters are apart, -1 to 1 (Rousseeuw 1987); 0 where there is only one."""
    sizes = torch.stack(((~second).sum(), second.sum()))
    if not bool(sizes.all()):
        return 0.0
    distances, own = torch.cdist(points, points), second.long()
    sums = torch.stack((distances[:, ~second].sum(1), distances[:, second].sum(1)), 1)
    inside = sums.gather(1, own[:, None])[:, 0] / (sizes[own] - 1).clamp_min(1)
    outside = sums.gather(1, 1 - own[:, None])[:, 0] / sizes[1 - own]
    each = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    return float(torch.where(sizes[own] > 1, each, torch.zeros(())).mean())


def _classes(links: Links) -> list[Tensor]:
    found = [(links.labels == label).nonzero().squeeze(1) for label in sorted(set(links.labels.tolist()))]
    return [rows for rows in found if len(rows) >= _LEAST]
