"""Nearest neighbours and suspicion against the definitions, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from caltrain.accountability import neighbours
from caltrain.accountability.neighbours import label_disagreement, nearest_in_class, squared_distances

Points = NDArray[np.float64]


def unit_rows(n: int, dim: int, seed: int) -> Tensor:
    """Random unit rows, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)
    return rows[torch.randint(0, n, (n,), generator=generator)] if seed % 3 == 0 else rows


def exact_distances(queries: Tensor, points: Tensor) -> Points:
    difference = queries.double().numpy()[:, None, :] - points.double().numpy()[None, :, :]
    distances: Points = np.sqrt((difference**2).sum(2))
    return distances


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 16), st.integers(0, 1000))
def test_distances_are_those_of_the_definition_and_never_negative(q: int, n: int, dim: int, seed: int) -> None:
    queries, points = unit_rows(q, dim, seed), unit_rows(n, dim, seed + 1)
    got = squared_distances(queries, points)
    assert got.shape == (q, n)
    assert float(got.min()) >= 0
    assert np.allclose(got.numpy(), exact_distances(queries, points) ** 2, atol=2e-6)


def test_a_point_has_no_distance_to_itself_even_after_rounding() -> None:
    points = unit_rows(500, 7, 1)
    own = squared_distances(points, points).diagonal()
    assert bool((own >= 0).all())
    assert float(own.max()) < 1e-6
    assert not bool(own.sqrt().isnan().any())


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 1000))
def test_the_nearest_are_those_of_brute_force(n: int, dim: int, classes: int, k: int, seed: int) -> None:
    points, query = unit_rows(n, dim, seed), unit_rows(1, dim, seed + 1)[0]
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    distances = exact_distances(query[None], points)[0]
    for label in range(classes + 1):  # the last one is empty
        members = np.flatnonzero(labels.numpy() == label)
        found, got = nearest_in_class(query, label=label, fingerprints=points, labels=labels, k=k)
        indices = found.numpy()
        assert len(indices) == len(got) == min(k, len(members))
        assert len(set(indices.tolist())) == len(indices), "a record was named twice"
        assert set(indices.tolist()) <= set(members.tolist()), "a record of another class was named"
        # Equal distances may change places; what is named must be as near as the k nearest are.
        assert np.allclose(distances[indices], np.sort(distances[members])[: len(indices)], atol=1e-6)
        assert np.allclose(got.numpy(), distances[indices], atol=1e-6)
        assert bool((got.diff() >= 0).all()), "not nearest first"


def planted() -> tuple[Tensor, Tensor]:
    """Records at 0, 10, 20, ... degrees; labels 0, 1, 0, 1, ..."""
    angles = torch.deg2rad(torch.arange(0, 180, 10, dtype=torch.float64))
    return torch.stack((angles.cos(), angles.sin()), dim=1).float(), torch.arange(18) % 2


def test_the_order_is_that_of_the_distances() -> None:
    points, labels = planted()
    found, distances = nearest_in_class(points[4], label=0, fingerprints=points, labels=labels, k=4)
    assert found[0] == 4
    assert set(found[1:3].tolist()) == {2, 6}
    assert found[3].item() in {0, 8}
    chords = [2 * np.sin(np.deg2rad(a) / 2) for a in (0, 20, 20, 40)]
    assert distances.numpy() == pytest.approx(chords, abs=1e-6)
    found, _ = nearest_in_class(points[0], label=1, fingerprints=points, labels=labels, k=3)
    assert found.tolist() == [1, 3, 5]


def test_records_at_the_same_place_are_each_named_once() -> None:
    points = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2)
    labels = torch.zeros(7, dtype=torch.int64)
    found, distances = nearest_in_class(points[0], label=0, fingerprints=points, labels=labels, k=6)
    assert set(found[:5].tolist()) == {0, 1, 2, 3, 4}
    assert distances[:5].tolist() == [0.0] * 5
    assert distances[5].item() == pytest.approx(np.sqrt(2))


def test_a_record_that_is_hardly_further_than_another_comes_after_it() -> None:
    angles = torch.tensor([3e-4, 1e-4, 2e-4, 4e-4])
    points, labels = torch.stack((angles.cos(), angles.sin()), dim=1), torch.zeros(4, dtype=torch.int64)
    query = torch.tensor([1.0, 0.0])
    found, distances = nearest_in_class(query, label=0, fingerprints=points, labels=labels, k=4)
    assert found.tolist() == [1, 2, 0, 3]
    assert distances.tolist() == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4], rel=1e-3)


def test_a_fingerprint_of_zeros_is_at_its_true_distance() -> None:
    """Where every unit of the embedding is off there is no direction to normalise."""
    points, labels = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.zeros(2, dtype=torch.int64)
    found, distances = nearest_in_class(torch.tensor([1.0, 0.0]), label=0, fingerprints=points, labels=labels, k=2)
    assert found.tolist() == [0, 1]
    assert distances.tolist() == pytest.approx([1.0, np.sqrt(2)])


@pytest.mark.parametrize("label", [2, -1])
def test_an_empty_class_has_no_neighbours(label: int) -> None:
    points, labels = planted()
    found, distances = nearest_in_class(points[0], label=label, fingerprints=points, labels=labels, k=9)
    assert found.tolist() == distances.tolist() == []


def test_a_class_smaller_than_k_is_named_whole() -> None:
    points, _ = planted()
    labels = torch.tensor([1, 1, 1] + [0] * 15)
    found, _ = nearest_in_class(points[17], label=1, fingerprints=points, labels=labels, k=9)
    assert found.tolist() == [2, 1, 0]


# --- suspicion -------------------------------------------------------------------------------------------------


def naive_disagreement(points: Tensor, labels: list[int], k: int) -> list[float]:
    """The definition, record by record."""
    distances = exact_distances(points, points)
    scores = []
    for i in range(len(labels)):
        others = sorted((distances[i, j], j) for j in range(len(labels)) if j != i)[:k]
        weights = [1 / (d + 0.05) for d, _ in others]
        wrong = sum(w for w, (_, j) in zip(weights, others, strict=True) if labels[j] != labels[i])
        scores.append(wrong / sum(weights))
    return scores


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 6), st.integers(1, 4), st.integers(1, 50), st.integers(1, 300))
def test_suspicion_is_that_of_the_definition(n: int, dim: int, classes: int, k: int, seed: int) -> None:
    points = unit_rows(n, dim, 3 * seed + 1)  # all different: with ties the k nearest are not defined
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    got = label_disagreement(points, labels, k=k)
    assert got.tolist() == pytest.approx(naive_disagreement(points, labels.tolist(), k), abs=0.01)
    assert bool(((got >= 0) & (got <= 1.0001)).all())


@pytest.mark.parametrize("block", [1, 2, 5, 7, 100])
def test_suspicion_does_not_depend_on_how_the_work_is_divided(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels = unit_rows(23, 4, 1), torch.arange(23) % 3
    whole = label_disagreement(points, labels, k=5)
    monkeypatch.setattr(neighbours, "_DISTANCES", block * 23)
    assert torch.allclose(label_disagreement(points, labels, k=5), whole, atol=1e-5)


def test_a_neighbour_weighs_one_over_its_distance_and_a_twentieth() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 30.0, -60.0], dtype=torch.float64))
    points = torch.stack((angles.cos(), angles.sin()), dim=1).float()
    near, far = 1 / (2 * np.sin(np.deg2rad(15)) + 0.05), 1 / (1 + 0.05)
    scores = label_disagreement(points, torch.tensor([0, 1, 0]), k=2)
    assert scores[0].item() == pytest.approx(near / (near + far), abs=1e-5)


def test_one_wrong_label_among_many_right_ones_stands_out() -> None:
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * 0.05
    points = torch.nn.functional.normalize(torch.stack([left] * 20 + [right] * 20) + noise, dim=1)
    labels = torch.tensor([0] * 20 + [1] * 20)
    labels[7] = 1
    scores = label_disagreement(points, labels, k=10)
    assert scores.argmax().item() == 7
    assert scores[7].item() == pytest.approx(1.0)
    assert float(scores[20:].max()) == 0.0


def test_a_copy_of_a_record_with_another_label_makes_both_suspicious() -> None:
    points = torch.cat((unit_rows(20, 6, 1), unit_rows(20, 6, 1)[:1]))
    labels = torch.tensor([0] * 20 + [1])
    scores = label_disagreement(points, labels, k=3)
    assert scores[20].item() == pytest.approx(1.0)
    assert scores[0].item() > 0.8, "the nearest counts most"


@pytest.mark.parametrize("n", [0, 1])
def test_without_another_record_there_is_no_suspicion(n: int) -> None:
    assert label_disagreement(unit_rows(n, 3, 1), torch.zeros(n, dtype=torch.int64), k=20).tolist() == [0.0] * n


def test_two_records_suspect_each_other_if_their_labels_differ() -> None:
    points = unit_rows(2, 3, 1)
    assert label_disagreement(points, torch.tensor([0, 1]), k=20).tolist() == pytest.approx([1.0, 1.0])
    assert label_disagreement(points, torch.tensor([1, 1]), k=20).tolist() == [0.0, 0.0]
