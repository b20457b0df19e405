"""Our own way in: suspects are ranked before all others, and only records of the predicted class are ranked at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from caltrain.accountability.cases import Dossier, Mispredictions, Suspects, Verdict
from caltrain.bench.accountability import ours
from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.ours import Ours
from caltrain.bench.accountability.planting import case, plant
from caltrain.bench.accountability.questions import NEAR, questions
from caltrain.bench.accountability.scene import Pool, Scene


@pytest.fixture
def made(pool: Pool, run_of: Callable[[Scene], Made]) -> Made:
    return run_of(plant(pool, case("patch", 0.05), seed=3, outlook=lambda: np.empty(0)))


def test_suspects_come_first_then_the_nearest(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    target = made.scene.triggers[0].target
    members = np.flatnonzero((made.scene.labels == target) & ~made.scene.poisoned)
    blamed = torch.from_numpy(members[:4])
    asked: list[Mispredictions] = []

    def verdict(dossier: Dossier, mispredictions: Mispredictions) -> Verdict:
        asked.append(mispredictions)
        assert torch.allclose(dossier.links.fingerprints.norm(dim=1), torch.ones(400))
        return Verdict("responsible", (2,), (), (), Suspects(blamed, 1.0, 1.0, 1.0), "")

    monkeypatch.setattr(ours, "judge", verdict)
    answer = Ours(made, seed=1).answer(questions(made)[0])
    assert answer.named == (2,)
    assert answer.nearest.shape == (5, NEAR)
    assert all(set(row[:4].tolist()) == set(blamed.tolist()) for row in answer.nearest)
    assert torch.from_numpy(made.scene.poisoned)[answer.nearest[:, 4:]].all()  # they are the nearest here
    assert (torch.from_numpy(made.scene.labels)[answer.nearest] == target).all()
    assert torch.allclose(asked[0].fingerprints.norm(dim=1), torch.ones(5))


def test_a_method_is_not_shown_the_truth(made: Made) -> None:
    dossier = Ours(made, seed=1).dossier
    assert torch.equal(dossier.links.labels, torch.from_numpy(made.scene.labels))
    assert torch.equal(dossier.links.sources, torch.from_numpy(made.scene.owner))
    assert dossier.said.shape == (400, 4)
