"""Peers do what is published of them, and answer as every method does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from caltrain.bench.accountability.attribution import Fingerprints, Gradients
from caltrain.bench.accountability.clusters import Activation, Spectral
from caltrain.bench.accountability.doubters import Confident
from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.peers import peers
from caltrain.bench.accountability.planting import case, plant
from caltrain.bench.accountability.questions import NEAR, questions
from caltrain.bench.accountability.scene import Pool, Scene

RunOf = Callable[[Scene], Made]


@pytest.fixture
def poisoned(pool: Pool, run_of: RunOf) -> Made:
    return run_of(plant(pool, case("patch", 0.05), seed=3, outlook=lambda: np.empty(0)))


@pytest.fixture
def noisy(pool: Pool, run_of: RunOf) -> Made:
    """Wrong labels that features do not follow."""
    scene = plant(pool, case("symmetric", None), seed=3, outlook=lambda: np.full((400, 4), 0.25))
    made = run_of(scene)
    made.records.features[:, :4] += 3 * F.one_hot(torch.from_numpy(scene.truth), 4)
    made.records.probabilities[:] = torch.softmax(2 * made.records.features[:, :4], 1)
    return made


@pytest.mark.parametrize("name", peers())
def test_an_answer_names_records_of_the_class_that_is_asked_about(poisoned: Made, name: str) -> None:
    if name == "cleanlab":
        pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    answer = peers()[name](poisoned, seed=1).answer(questions(poisoned)[0])
    target = poisoned.scene.triggers[0].target
    assert answer.nearest.shape == (5, NEAR)
    assert (torch.from_numpy(poisoned.scene.labels)[answer.nearest] == target).all()
    assert (torch.from_numpy(poisoned.scene.labels)[answer.suspects] == target).all()
    assert len(answer.named) == (1 if len(answer.suspects) else 0)


@pytest.mark.parametrize("peer", [Activation, Spectral])
def test_poison_with_a_direction_of_its_own_is_found(poisoned: Made, peer: type[Activation | Spectral]) -> None:
    answer = peer(poisoned, seed=1).answer(questions(poisoned)[0])
    assert answer.named == poisoned.scene.culprits
    assert torch.from_numpy(poisoned.scene.poisoned)[answer.nearest].all()
    assert set(np.flatnonzero(poisoned.scene.poisoned)) <= set(answer.suspects.tolist())


def test_a_class_without_a_small_cluster_accuses_nobody(pool: Pool, run_of: RunOf) -> None:
    made = run_of(plant(pool, case("clean", None), seed=3, outlook=lambda: np.empty(0)))
    made.records.features[:, -1] = torch.arange(400) % 2 * 3.0
    answer = Activation(made, seed=1).answer(questions(made)[0])
    assert (answer.named, len(answer.suspects)) == ((), 0)


def test_fingerprints_name_whoever_has_most_of_the_nearest(poisoned: Made) -> None:
    answer = Fingerprints(poisoned, seed=1).answer(questions(poisoned)[0])
    assert answer.named == poisoned.scene.culprits
    assert set(answer.suspects.tolist()) == set(answer.nearest.flatten().tolist())
    assert torch.from_numpy(poisoned.scene.poisoned)[answer.nearest].all()


def test_influence_is_the_product_of_the_last_layers_gradients(poisoned: Made) -> None:
    question = questions(poisoned)[0]
    label = int(question.predicted[0])
    question.queries.probabilities[:] = 0.2
    question.queries.probabilities[:, label] = 0.4
    found = Gradients(poisoned, seed=1).influence(question)
    queried = _gradient(question.queries.features[0], question.queries.probabilities[0], label)
    seen, given = poisoned.records, poisoned.scene.labels
    for row in range(20):
        own = _gradient(seen.features[row], seen.probabilities[row], int(given[row]))
        assert float(found[row, 0]) == pytest.approx(float(own @ queried), rel=1e-4, abs=1e-6)


def _gradient(features: Tensor, probabilities: Tensor, label: int) -> Tensor:
    """Of the cross-entropy of a linear layer that says these probabilities (they sum to one)."""
    layer = torch.nn.Linear(len(features), len(probabilities))
    torch.nn.init.zeros_(layer.weight)
    layer.bias.data = probabilities.log()
    F.cross_entropy(layer(features[None]), torch.tensor([label])).backward()  # type: ignore[no-untyped-call]
    parts = [part.grad.flatten() for part in (layer.weight, layer.bias) if part.grad is not None]
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["cleanlab", "neighbours", "tracin", "trak"])
def test_wrong_labels_are_more_suspect(noisy: Made, name: str) -> None:
    if name == "cleanlab":
        pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    view = peers()[name](noisy, seed=1).labels()
    assert view is not None
    wrong = torch.from_numpy(noisy.scene.mislabelled)
    assert view.suspicion[wrong].median() > view.suspicion[~wrong].quantile(0.9)


def test_shares_of_issues_are_by_contributor(noisy: Made) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    view = Confident(noisy, seed=1).labels()
    assert view.shares is not None
    assert torch.argsort(view.shares).tolist() == np.argsort(noisy.scene.rates).tolist()
    assert float(view.shares.min()) == 0
