"""The adversaries by name: what each is given, and that who knows the FrontNet begins where the inverter ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from caltrain.exposure import lineup as module
from caltrain.exposure.attacks import inverter, shadow
from caltrain.exposure.attacks import whitebox as whitebox_module
from caltrain.exposure.attacks.whitebox import PRACTICE
from caltrain.exposure.figures import BudgetName
from caltrain.exposure.lineup import Lineup
from caltrain.exposure.material import Material
from caltrain.exposure.policy import ADVERSARIES, Adversary
from caltrain.exposure.subject import Cut
from support.assessment import hardly_computing
from support.exposed import bright_or_dark, subject

SUBJECT = subject()


def material() -> Material:
    own, labels = bright_or_dark(SUBJECT.shape, 40, seed=0)
    others, theirs = bright_or_dark(SUBJECT.shape, 30, seed=1)
    return Material(own, labels, others[:10], theirs, others)


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("front", [1, 2])
def test_every_adversary_reconstructs_the_targets_of_any_cut(name: Adversary, front: int) -> None:
    steps: list[tuple[int, int]] = []
    with hardly_computing():
        found = Lineup(material(), "quick", 0, lambda *step: steps.append(step)).reconstruct(name, Cut(SUBJECT, front))
    assert found.shape == (10, *SUBJECT.shape)
    assert found.min() >= 0
    assert found.max() <= 1
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("name", ADVERSARIES)
def test_the_same_seed_gives_the_same_pictures(name: Adversary) -> None:
    with hardly_computing():
        one, other = (Lineup(material(), "quick", 3).reconstruct(name, Cut(SUBJECT, 1)) for _ in range(2))
    assert torch.equal(one, other)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The own pictures of each inverter that is trained: it always answers with 0.25."""
    seen: list[Tensor] = []

    def train(_see: object, own: Tensor, **_: object) -> Callable[[Tensor], Tensor]:
        seen.append(own)
        return lambda ir: torch.full((len(ir), *SUBJECT.shape), 0.25)

    monkeypatch.setattr(module, "train_inverter", train)
    return seen


def test_the_inverter_of_a_cut_is_trained_once_and_that_of_another_anew(trained: list[Tensor]) -> None:
    with hardly_computing():
        attacks, first, second = Lineup(material(), "quick", 0), Cut(SUBJECT, 1), Cut(SUBJECT, 1)
        for name, cut in (("inverter", first), ("whitebox", first), ("whitebox", second), ("inverter", second)):
            attacks.reconstruct(name, cut)  # type: ignore[arg-type]
    assert len(trained) == 2


def test_the_inverter_has_not_seen_what_the_white_box_practises_on(trained: list[Tensor]) -> None:
    given = material()
    with hardly_computing():
        Lineup(given, "quick", 0).reconstruct("inverter", Cut(SUBJECT, 1))
    assert torch.equal(trained[0], given.own[:-PRACTICE])


def test_the_white_box_begins_with_the_inverters_pictures(
    trained: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Tensor] = []

    def whitebox(_cut: Cut, observed: Any, _own: Tensor, **options: Any) -> Tensor:
        begun.append(options["start"](observed))
        return begun[0]

    monkeypatch.setattr(whitebox_module, "whitebox", whitebox)
    Lineup(material(), "quick", 0).reconstruct("whitebox", Cut(SUBJECT, 2))
    assert torch.equal(begun[0], torch.full((10, *SUBJECT.shape), 0.25))
    assert len(trained) == 1


def test_every_budget_is_one_of_each_adversary() -> None:
    for attack in (inverter, shadow, whitebox_module):
        assert set(attack.BUDGETS) == set(get_args(BudgetName))
