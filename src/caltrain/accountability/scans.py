"""Scans for suspicious records without any misprediction (a stand-in)."""

from __future__ import annotations

import torch
from torch import Tensor

from caltrain.accountability.cases import Links


def spectral(links: Links) -> Tensor:
    """(N,) in 0..1: how far along its class's main direction a record lies (Tran et al. 2018)."""
    scores = torch.zeros(len(links.labels))
    for label in torch.unique(links.labels).tolist():
        rows = (links.labels == label).nonzero().squeeze(1)
        away = links.fingerprints[rows] - links.fingerprints[rows].mean(0)
        axis = torch.linalg.svd(away, full_matrices=False)[2][0]
        along = (away @ axis).square()
        scores[rows] = along / along.max().clamp_min(1e-12)
    return scores


def activation_clusters(links: Links) -> Tensor:
    """(N,) in 0..1: whether a record is in the smaller half of its class (Chen et al. 2018)."""
    return spectral(links).round()
