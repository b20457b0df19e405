"""Two clusters and how far they are apart, against scikit-learn, which cannot run inside: it starts a thread."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from caltrain.accountability import scans
from caltrain.accountability.cases import Links
from caltrain.accountability.scans import activation_clusters, silhouette, two_means


def blobs(first: int, second: int, *, apart: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn((first + second, 6), generator=generator)
    points[first:] += apart
    return points


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("first", "second", "apart"), [(60, 20, 3.0), (40, 40, 5.0), (75, 5, 4.0)])
def test_clusters_are_those_of_scikit_learn(first: int, second: int, apart: float, seed: int) -> None:
    points = blobs(first, second, apart=apart, seed=seed)
    ours = two_means(points, torch.Generator().manual_seed(seed))
    theirs = torch.from_numpy(KMeans(2, n_init=10, random_state=seed).fit_predict(points.numpy())) == 1
    assert int((ours != theirs).sum()) in {0, len(points)}


@pytest.mark.parametrize("apart", [0.0, 1.0, 8.0])
def test_the_silhouette_is_that_of_scikit_learn(apart: float) -> None:
    points = blobs(50, 9, apart=apart, seed=1)
    second = torch.arange(59) >= 50
    assert silhouette(points, second) == pytest.approx(silhouette_score(points.numpy(), second.numpy()), abs=1e-5)
    one = torch.arange(59) >= 58
    assert silhouette(points, one) == pytest.approx(silhouette_score(points.numpy(), one.numpy()), abs=1e-5)


def test_one_cluster_is_apart_from_nothing() -> None:
    points = torch.ones((30, 3))
    assert silhouette(points, torch.zeros(30, dtype=torch.bool)) == 0
    links = Links(points, torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64), ("a",))
    assert activation_clusters(links).tolist() == [0.0] * 30


def test_the_smaller_cluster_of_a_class_is_suspicious() -> None:
    points = torch.cat((blobs(90, 10, apart=6.0, seed=2), blobs(100, 0, apart=0, seed=3)))
    labels = torch.arange(200) // 100
    links = Links(points, labels, torch.zeros(200, dtype=torch.int64), ("a",))
    found = activation_clusters(links)
    assert float(found[90:100].min()) > 0.3
    assert float(found[:90].max()) == 0
    assert float(found[100:].max()) < 0.3


def test_clusters_are_looked_for_where_a_class_differs_most_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "_DIMS", 1)
    points, labels = blobs(90, 10, apart=6.0, seed=2), torch.zeros(100, dtype=torch.int64)
    aside = 50 * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    here, there = (activation_clusters(Links(at, labels, labels, ("a",))) for at in (points, points + aside))
    assert float(here[90:].min()) > 0.5
    assert torch.allclose(here, there, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("first", "second"), [(80, 20), (60, 40), (40, 60)])
def test_the_score_is_the_silhouette_times_how_unequal_the_clusters_are(first: int, second: int, seed: int) -> None:
    """Whichever of them is found first, the smaller one has it."""
    points, later = blobs(first, second, apart=6.0, seed=4), torch.arange(100) >= first
    labels = torch.zeros(100, dtype=torch.int64)
    found = activation_clusters(Links(points, labels, labels, ("a",)), seed=seed)
    smaller = later if second < first else ~later
    expected = silhouette(points, later) * (1 - 2 * min(first, second) / 100)
    assert found[smaller].tolist() == pytest.approx([expected] * min(first, second), abs=1e-4)
    assert float(found[~smaller].abs().max()) == 0
