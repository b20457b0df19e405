"""The white-box attack: it gets pictures back from shallow cuts of every kind, each record by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.attacks.priors import Components, Cosines, basis_of, roughness
from caltrain.exposure.attacks.whitebox import (
    BUDGETS,
    PRACTICE,
    Attack,
    Channels,
    Prior,
    WhiteboxBudget,
    best_prior,
    whitebox,
)
from caltrain.exposure.defence_spec import parse_defence
from caltrain.exposure.defences import defended
from caltrain.exposure.measures import ssim
from caltrain.exposure.subject import Cut, Live
from support.exposed import subject
from support.samples import refused

SHORT = WhiteboxBudget(20, (Prior(0.01, 0.0),))
LONG = WhiteboxBudget(100, (Prior(0.003, 0.0),))


def pictures(count: int, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """Soft blobs in 0..1: neighbours are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, shape[0], 4, 4), generator=generator)
    fine = torch.rand((count, *shape), generator=generator)
    return 0.8 * F.interpolate(coarse, size=shape[1:], mode="bicubic").clamp(0, 1) + 0.2 * fine


def scene(name: str, front: int) -> tuple[Cut, Tensor, Tensor, Live]:
    """A cut, own pictures, six targets, and what crosses of these."""
    cut = Cut(subject(name), front)
    targets = pictures(6, cut.subject.shape, seed=1)
    with torch.inference_mode():  # as assessments do: the attack has to cope
        return cut, pictures(300, cut.subject.shape), targets, cut.ir(targets)


def attack(cut: Cut, observed: Live, own: Tensor, budget: WhiteboxBudget = SHORT, seed: int = 0) -> Tensor:
    return whitebox(cut, observed, own, budget=budget, seed=seed)


# --- what comes back -------------------------------------------------------------------------------------------

SHALLOW = {"convolution": ("18-layer", 1, 0.95), "shortcut": ("resnet18", 2, 0.85), "tokens": ("vit", 2, 0.7)}


@pytest.mark.parametrize("kind", SHALLOW)
def test_pictures_come_back_from_shallow_cuts_of_every_kind(kind: str) -> None:
    name, front, least = SHALLOW[kind]
    cut, own, targets, observed = scene(name, front)
    assert ssim(attack(cut, observed, own, LONG), targets).min() > least
    assert ssim(own.mean(0, keepdim=True).expand_as(targets), targets).max() < 0.5


KINDS = {
    "convolution": ("18-layer", 1),
    "shortcut": ("resnet18", 2),
    "tokens": ("vit", 2),
    "pooled": ("18-layer", 9),
    "deep": ("18-layer", 14),
    "vector": ("vit", 9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_of_cut_explain_more_than_the_mean_picture(kind: str) -> None:
    cut, own, targets, observed = scene(*KINDS[kind])
    found = attack(cut, observed, own)
    assert found.shape == targets.shape
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    judge = Attack.of(cut, own, seed=0)
    guess = own.mean(0, keepdim=True).expand_as(targets)
    with torch.no_grad():
        assert (judge.residual(found, observed) < 0.9 * judge.residual(guess, observed)).all()
        assert (judge.residual(targets, observed) < 1).all()  # what fast arithmetic loses must not count for much


def test_the_start_is_where_the_descent_begins() -> None:
    cut, own, targets, observed = scene("18-layer", 14)
    near = WhiteboxBudget(5, (Prior(1e4, 0.0),))
    with torch.inference_mode():  # what an inverter gives
        close = (targets + 0.01).clamp(0, 1)
    given = whitebox(cut, observed, own, budget=near, seed=0, start=lambda live: close[: len(live[0])])
    assert ssim(given, targets).min() > 0.8 > ssim(attack(cut, observed, own, near), targets).max()


# --- reproducible, record by record ----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    cut, own, _, observed = scene("18-layer", 4)
    first = attack(cut, observed, own)
    assert torch.equal(first, attack(cut, observed, own))
    assert not torch.equal(first, attack(cut, observed, own, seed=1))


def test_each_record_comes_back_alone_as_it_does_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caltrain.exposure.attacks.whitebox.fast", contextlib.nullcontext)  # rounds by batch size
    cut, own, _, observed = scene("resnet18", 2)
    few = WhiteboxBudget(8, (Prior(0.01, 0.0),))
    together = attack(cut, observed, own, few)
    for i in range(len(together)):
        alone = attack(cut, tuple(tensor[i : i + 1] for tensor in observed), own, few)
        torch.testing.assert_close(alone[0], together[i], atol=0.002, rtol=0)
    monkeypatch.setattr("caltrain.exposure.attacks.whitebox._AT_ONCE", 4)
    torch.testing.assert_close(attack(cut, observed, own, few), together, atol=0.002, rtol=0)


def test_what_was_observed_and_the_subject_stay_as_they_were() -> None:
    cut, own, _, observed = scene("resnet18", 2)
    before = [tensor.clone() for tensor in (*observed, own, *cut.subject.module.state_dict().values())]
    attack(cut, observed, own)
    after = (*observed, own, *cut.subject.module.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_step_is_told_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caltrain.exposure.attacks.whitebox._AT_ONCE", 4)
    cut, own, _, observed = scene("18-layer", 1)
    told: list[tuple[int, int]] = []
    budget = WhiteboxBudget(3, (Prior(0.0, 0.0), Prior(1.0, 0.0)))
    whitebox(cut, observed, own, budget=budget, seed=0, on_step=lambda *at: told.append(at))
    assert told == [(i, 9) for i in range(1, 10)]


def test_budgets_grow() -> None:
    steps = [budget.steps for budget in BUDGETS.values()]
    assert list(BUDGETS) == ["quick", "standard", "thorough"]
    assert steps == sorted(set(steps))


# --- priors ----------------------------------------------------------------------------------------------------


def test_total_variation_makes_pictures_smoother_and_distance_keeps_them_near_the_centre() -> None:
    cut, own, _, observed = scene("18-layer", 9)
    free, smooth, near = (
        attack(cut, observed, own, WhiteboxBudget(40, (Prior(*weights),))) for weights in ((0, 0), (0, 10), (100, 0))
    )
    assert (roughness(smooth) < 0.7 * roughness(free)).all()
    middle = own.mean(0, keepdim=True)
    assert ((near - middle).square().flatten(1).sum(1) < 0.5 * (free - middle).square().flatten(1).sum(1)).all()


def test_roughness_is_the_mean_length_of_a_step() -> None:
    stairs = torch.zeros((2, 1, 4, 4))
    stairs[1, :, :, 2:] = 0.5
    assert roughness(stairs).tolist() == pytest.approx([9 * 0.001 / 16, (6 * 0.001 + 3 * 0.5) / 16], abs=1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_the_prior_that_serves_own_pictures_best_is_chosen(order: int) -> None:
    cut, own, _, _ = scene("18-layer", 1)
    good, bad = Prior(0.001, 0.0), Prior(100.0, 0.0)
    budget = WhiteboxBudget(20, (good, bad)[::order])
    assert best_prior(Attack.of(cut, own, seed=0), cut, own[-PRACTICE:], budget) == good


@pytest.mark.parametrize("kind", [Components, Cosines])
def test_a_basis_reaches_every_picture_and_gives_pictures_of_the_same_variance(
    kind: type[Components] | type[Cosines],
) -> None:
    own = pictures(800, (3, 6, 8))
    basis = kind.of(own)
    unit = torch.eye(144).view(144, 3, 6, 8)
    matrix = basis.offset(unit).flatten(1)
    assert torch.linalg.matrix_rank(matrix) == 144
    variance = matrix.square().sum(0)  # of coordinates that are N(0, 1)
    torch.testing.assert_close(variance.sum(), own.var(0).sum(), rtol=0.02, atol=0)
    torch.testing.assert_close(basis.mean[0], own.mean(0))
    assert torch.linalg.vector_norm(matrix, dim=1).max() > 3 * torch.linalg.vector_norm(matrix, dim=1).median()


def test_large_pictures_have_a_basis_of_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caltrain.exposure.attacks.priors._MOST_COMPONENTS", 48)
    assert isinstance(basis_of(torch.rand(20, 3, 4, 4)), Components)
    assert isinstance(basis_of(torch.rand(20, 1, 7, 7)), Cosines)
    cut, own, targets, observed = scene("18-layer", 1)
    assert ssim(attack(cut, observed, own, LONG), targets).min() > 0.9


def test_a_tensor_that_is_the_same_for_all_records_counts_for_nothing() -> None:
    dead = torch.ones((9, 4, 3, 3))
    assert Channels.of(dead, dead).residual(dead, dead + 1).tolist() == [0.0] * 9


def test_noise_makes_a_channel_count_less_and_a_masked_one_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 400, 3, 4, 4), generator=generator)
    crossed = clean + noise * torch.tensor([0.0, 3.0, 0.0])[:, None, None]
    crossed[:, 2] = 0
    channels = Channels.of(clean, crossed)
    wrong = [channels.residual(clean + torch.eye(3)[i][:, None, None], clean).mean().item() for i in range(3)]
    right = channels.residual(clean, clean).mean().item()
    assert wrong[0] - right > 20 * (wrong[1] - right) > 0
    assert wrong[2] == pytest.approx(right, rel=1e-3)


# --- defences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defence", ["bits=3", "keep=0.5", "noise=0.3"])
def test_a_defence_that_lets_enough_cross_does_not_blind_the_attack(defence: str) -> None:
    bare, own, targets, _ = scene("18-layer", 1)
    cut = defended(bare, parse_defence(defence), own, seed=0)
    with torch.no_grad():
        observed = cut.ir(targets)
    assert ssim(attack(cut, observed, own, LONG), targets).mean() > 0.8


# --- refused ---------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[Live], Live]] = {
    "a tensor too few": lambda live: live[:1],
    "a tensor of another shape": lambda live: (live[0], live[1][:, :-1]),
    "tensors of other records": lambda live: (live[0], live[1][:-1]),
    "no record": lambda live: tuple(tensor[:0] for tensor in live),
}


def steps_of(cut: Cut, observed: Live, own: Tensor) -> list[int]:
    """Steps that were taken: none, where all is refused before."""
    taken: list[int] = []
    whitebox(cut, observed, own, budget=SHORT, seed=0, on_step=lambda done, _total: taken.append(done))
    return taken


@pytest.mark.parametrize("how", OTHERS)
def test_what_cannot_have_crossed_at_this_cut_is_refused(how: str) -> None:
    cut, own, _, observed = scene("resnet18", 2)
    with refused(DataError, "exposure.other-ir"):
        attack(cut, OTHERS[how](observed), own)


@pytest.mark.parametrize(
    ("value", "code"), [(torch.nan, "not-finite"), (torch.inf, "not-finite"), (0.0, "constant-ir")]
)
def test_an_observation_that_says_nothing_is_refused(value: float, code: str) -> None:
    cut, own, _, observed = scene("18-layer", 4)
    with refused(IntegrityError, f"exposure.{code}"):
        attack(cut, tuple(torch.full_like(tensor, value) for tensor in observed), own)


def test_too_few_own_pictures_are_refused() -> None:
    cut, own, _, observed = scene("18-layer", 1)
    with refused(DataError, "exposure.too-few"):
        attack(cut, observed, own[: 2 * PRACTICE - 1])
    assert attack(cut, observed, own[: 2 * PRACTICE]).shape == (6, *cut.subject.shape)
