"""Nearest fingerprints inside the predicted class, exact L2 (arXiv:1812.03230, the query stage)."""

from __future__ import annotations

import torch
from torch import Tensor

_DISTANCES = 1 << 24  # at once: 64 MiB, however many records there are


def squared_distances(queries: Tensor, fingerprints: Tensor) -> Tensor:
    """(Q, D) and (N, D), rows of unit length, to squared L2 distances (Q, N), never negative."""
    return (2 - 2 * queries @ fingerprints.T).clamp_(min=0)


def nearest_in_class(
    query: Tensor, *, label: int, fingerprints: Tensor, labels: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Indices and L2 distances of the `k` nearest of `fingerprints` (N, D) whose label is `label`, nearest first.

    Fewer where the class is smaller, none where it is empty.
    """
    members = (labels == label).nonzero().squeeze(1)
    # By differences: the shorter way over the inner product loses half the digits where it is near.
    distances = (fingerprints[members] - query).norm(dim=1)
    nearest = torch.topk(distances, min(k, len(members)), largest=False, sorted=True)
    return members[nearest.indices], nearest.values


def label_disagreement(fingerprints: Tensor, labels: Tensor, *, k: int) -> Tensor:
    """Suspicion (N,) in 0..1 that a record is mislabelled: the share of its k nearest with another label.

    Neighbours are of any label, the record itself excluded, each weighted by 1 / (distance + 0.05).
    """
    scores = torch.zeros(len(labels))
    k = min(k, len(labels) - 1)
    if k < 1:  # one record alone: there is nobody to disagree with it
        return scores
    block = max(1, _DISTANCES // len(labels))
    for start in range(0, len(labels), block):
        rows = slice(start, start + block)
        distances = squared_distances(fingerprints[rows], fingerprints)
        own = torch.arange(start, start + len(distances))
        distances[torch.arange(len(distances)), own] = torch.inf
        near = torch.topk(distances, k, largest=False)
        weights = 1 / (near.values.sqrt() + 0.05)
        differs = labels[near.indices] != labels[rows, None]
        scores[rows] = (weights * differs).sum(1) / weights.sum(1)
    return scores
