"""Scans of a model's links for suspicious records, without any misprediction: each gives every record a score."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from caltrain.accountability.cases import Links
from caltrain.accountability.regression import out_of_fold

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
        cluster = KMeans(2, n_init=4, random_state=seed).fit_predict(points)
        small = cluster == np.bincount(cluster, minlength=2).argmin()
        if small.all() or not small.any():
            continue
        some = rng.permutation(len(points))[:_SAMPLE]
        apart = silhouette_score(points[some], small[some]) if len(set(small[some])) == 2 else 0.0
        scores[rows[torch.from_numpy(small)]] = float(max(0.0, apart) * (1 - 2 * small.mean()))
    return scores


def confident_learning(links: Links, *, classes: int) -> Tensor:
    """Suspicion (N,) by cleanlab's self-confidence (Northcutt et al., JAIR 2021), on fingerprints out of fold."""
    from cleanlab.rank import get_label_quality_scores  # noqa: PLC0415  # with pandas: only where it is asked for

    given = F.one_hot(links.labels, classes).float()
    said = out_of_fold(links.fingerprints, given, decay=1e-4).double().softmax(1)
    return 1 - torch.from_numpy(get_label_quality_scores(links.labels.numpy(), said.numpy())).float()


def _classes(links: Links) -> list[Tensor]:
    found = [(links.labels == label).nonzero().squeeze(1) for label in sorted(set(links.labels.tolist()))]
    return [rows for rows in found if len(rows) >= _LEAST]
