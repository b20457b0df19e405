"""Scores of scans against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from caltrain.accountability.cases import Links
from caltrain.accountability.scans import spectral


def links_of(*sizes: int) -> Links:
    """Classes of these sizes, in turns as far as they go."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    prints = F.normalize(torch.randn((len(labels), 8), generator=generator) + 2 * F.one_hot(labels, 8).float(), dim=1)
    return Links(prints, labels, torch.zeros_like(labels), ("a",))


def test_the_spectral_score_is_the_squared_part_along_the_first_singular_vector() -> None:
    links = links_of(80, 40)
    scores = spectral(links)
    for label in (0, 1):
        rows = links.labels == label
        points = links.fingerprints[rows].double().numpy()
        away = points - points.mean(0)
        _, _, axes = np.linalg.svd(away, full_matrices=False)
        expected = (away @ axes[0]) ** 2
        assert np.allclose(scores[rows].numpy(), expected / expected.mean(), atol=1e-3)
        assert float(scores[rows].mean()) == pytest.approx(1.0, abs=1e-4)


def test_planted_records_that_lie_together_score_above_the_others_of_their_class() -> None:
    links = links_of(200, 200)
    own = (links.labels == 0).nonzero().squeeze(1)[:15]
    links.fingerprints[own] = F.normalize(-3 * torch.eye(8)[0] + torch.eye(8)[7] + 0.1 * links.fingerprints[own], dim=1)
    top = spectral(links).argsort(descending=True)[:15]
    assert set(top.tolist()) == set(own.tolist())


def test_a_class_of_few_records_is_not_scored() -> None:
    links = links_of(20, 19)
    scores = spectral(links)
    assert bool((scores[links.labels == 1] == 0).all())
    assert float(scores[links.labels == 0].sum()) == pytest.approx(20, abs=1e-3)


def test_equal_fingerprints_and_no_records_have_scores() -> None:
    same = Links(torch.ones((30, 4)), torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64), ("a",))
    assert bool(spectral(same).isfinite().all())
    none = torch.empty(0, dtype=torch.int64)
    assert spectral(Links(torch.empty((0, 4)), none, none, ())).shape == (0,)
