"""Scans of a model's links for suspicious records, without any misprediction: each gives every record a score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from caltrain.accountability.cases import Links

_DIMS = 10
_SAMPLE = 2000
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
    rng = np.random.default_rng(seed)
    for rows in _classes(links):
        away = links.fingerprints[rows] - links.fingerprints[rows].mean(0)
        axes = torch.linalg.eigh(away.T @ away).eigenvectors[:, -_DIMS:]
        points = (away @ axes).numpy()
        cluster = (points[:, -1] > np.median(points[:, -1])).astype(np.int64)
        small = cluster == np.bincount(cluster, minlength=2).argmin()
        scores[rows[torch.from_numpy(small)]] = float(1 - small.mean()) * rng.random()
    return scores


def _classes(links: Links) -> list[Tensor]:
    found = [(links.labels == label).nonzero().squeeze(1) for label in sorted(set(links.labels.tolist()))]
    return [rows for rows in found if len(rows) >= _LEAST]
