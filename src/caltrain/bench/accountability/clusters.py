"""Peers that look for poison as a group of its own within a class."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from caltrain.bench.accountability.peer import Peer

_SMALL = 0.35  # of a class: a cluster below that is called poison (Chen et al. 2018)
_COMPONENTS = 10


class Spectral(Peer):
    """Spectral signatures (Tran et al. 2018, arXiv:1811.00636): outliers along a class's first singular vector."""

    @cached_property
    def suspicion(self) -> Tensor:
        """The square of what lies along that vector."""
        found = torch.zeros(len(self.given))
        for label in range(self.classes):
            rows = (self.given == label).nonzero().squeeze(1)
            if len(rows) < 2:
                continue
            away = self.records.features[rows] - self.records.features[rows].mean(0)
            first = torch.linalg.svd(away, full_matrices=False).Vh[0]
            found[rows] = (away @ first).square()
        return found

    def flagged(self, label: int) -> Tensor:
        """One and a half times as many as were planted, as published."""
        return self._top(self.suspicion, label, round(1.5 * self.planted))

    def labels(self) -> None:
        """It finds poison only."""


class Activation(Peer):
    """Activation clustering (Chen et al. 2018, arXiv:1811.03728): two clusters a class, a small one is poison."""

    @cached_property
    def suspicion(self) -> Tensor:
        """One less the size of the own cluster, as a share of its class."""
        from sklearn.cluster import KMeans  # noqa: PLC0415
        from sklearn.decomposition import PCA  # noqa: PLC0415

        found = torch.zeros(len(self.given))
        for label in range(self.classes):
            rows = (self.given == label).nonzero().squeeze(1)
            if len(rows) <= _COMPONENTS:
                continue
            features = self.records.features[rows].numpy()
            components = min(_COMPONENTS, features.shape[1])
            reduced = PCA(components, random_state=self.seed).fit_transform(features)
            cluster = KMeans(2, n_init=10, random_state=self.seed).fit_predict(reduced)
            sizes = np.bincount(cluster, minlength=2) / len(rows)
            found[rows] = torch.from_numpy(1 - sizes[cluster]).float()
        return found

    def flagged(self, label: int) -> Tensor:
        """The smaller cluster, if it is small; none otherwise."""
        return ((self.given == label) & (self.suspicion >= 1 - _SMALL)).nonzero().squeeze(1)

    def labels(self) -> None:
        """It finds poison only."""
