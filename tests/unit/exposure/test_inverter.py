"""The inverter learns from the adversary's own pictures alone, and finds others' in what crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from caltrain.exposure.attacks.inverter import BUDGETS, InverterBudget, Moments, OnStep, seen, some, train_inverter
from caltrain.exposure.material import Material, gather
from caltrain.exposure.measures import ssim
from caltrain.exposure.subject import Cut, Live, Subject, candidate_cuts, subject_of
from caltrain.models.network import build
from caltrain.models.weights import state_of
from caltrain.presets import PRESETS
from caltrain.records.readers.digits import read_digits
from caltrain.training.seeds import initialise
from support.exposed import subject

TINY = InverterBudget(width=4, depth=1, steps=2, batch=4)
SMALL = InverterBudget(width=16, depth=1, steps=60, batch=32)


@pytest.fixture(scope="module")
def digits() -> tuple[Subject, Material]:
    """The digits' network with first weights, and digits."""
    preset, split = PRESETS["digits"], read_digits()
    module = build(preset.model, input_shape=preset.data.shape)
    initialise(module, bytes(32))
    of_digits = subject_of(preset.model, preset.data, state_of(module))
    train, test = ((torch.from_numpy(p.images), torch.from_numpy(p.labels)) for p in (split.train, split.test))
    return of_digits, gather(of_digits, train, test, targets=32, candidates=100)


def invert(
    cut: Cut, material: Material, *, budget: InverterBudget, seed: int, on_step: OnStep = lambda _done, _total: None
) -> Tensor:
    """The targets, as who has pairs of `own` alone gets them back."""
    inverter = train_inverter(cut.stacked, material.own, budget=budget, seed=seed, on_step=on_step)
    return inverter(seen(cut, material.targets))


def noise(of: Subject, *, seed: int = 0) -> Material:
    generator = torch.Generator().manual_seed(seed)
    own, others = (torch.rand(12, *of.shape, generator=generator) for _ in range(2))
    labels = torch.randint(0, len(of.data.classes), (12,), generator=generator)
    return Material(own, labels, others[:8], labels, others)


def test_it_beats_the_mean_image_at_the_first_cut(digits: tuple[Subject, Material]) -> None:
    of_digits, material = digits
    found = invert(Cut(of_digits, 1), material, budget=SMALL, seed=1)
    floor = material.own.mean(0, keepdim=True).expand_as(found)
    assert float(ssim(found, material.targets).mean()) > float(ssim(floor, material.targets).mean()) + 0.3
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


KINDS = ["18-layer", "resnet18", "vit"]


@pytest.mark.parametrize("name", KINDS)
def test_it_works_at_every_cut(name: str) -> None:
    victim = subject(name)
    material = noise(victim)
    fronts = candidate_cuts(victim.spec)
    for front in {fronts[0], fronts[len(fronts) // 3], fronts[len(fronts) // 2], fronts[-1]}:
        found = invert(Cut(victim, front), material, budget=TINY, seed=0)
        assert found.shape == material.targets.shape
        assert bool(torch.isfinite(found).all())


def test_several_tensors_that_cross_are_used_together() -> None:
    victim = subject("resnet18")
    front = next(f for f in candidate_cuts(victim.spec) if len(Cut(victim, f).ir(noise(victim).own)) > 1)
    cut = Cut(victim, front)
    inverter = train_inverter(cut.stacked, noise(victim).own, budget=TINY, seed=0)
    assert inverter.moments.mean.shape[1] == sum(tensor.shape[1] for tensor in cut.ir(noise(victim).own))


def test_the_same_seed_gives_the_same_pictures_and_another_gives_others() -> None:
    victim = subject("18-layer")
    first, again, other = (invert(Cut(victim, 4), noise(victim), budget=TINY, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_stream_neither_matters_nor_moves_the_result() -> None:
    victim = subject("18-layer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = invert(Cut(victim, 4), noise(victim), budget=TINY, seed=3)
        torch.manual_seed(2)
        again = invert(Cut(victim, 4), noise(victim), budget=TINY, seed=3)
    assert torch.equal(first, again)


def test_others_pictures_teach_it_nothing() -> None:
    """Other targets change only their own reconstructions: no weight, and no moment, depends on them."""
    victim, material = subject("18-layer"), noise(subject("18-layer"))
    changed = material.targets.clone()
    changed[1:] = 0.5
    first = invert(Cut(victim, 4), material, budget=TINY, seed=0)
    again = invert(Cut(victim, 4), replace(material, targets=changed), budget=TINY, seed=0)
    assert torch.allclose(first[0], again[0], atol=1e-5)
    assert not torch.allclose(first[1], again[1], atol=1e-3)


def test_only_the_records_of_the_budget_are_used() -> None:
    victim, material = subject("18-layer"), noise(subject("18-layer"))
    least = replace(TINY, records=6)
    poisoned = material.own.clone()
    poisoned[6:] = torch.nan
    first = invert(Cut(victim, 4), material, budget=least, seed=0)
    assert torch.equal(first, invert(Cut(victim, 4), replace(material, own=poisoned), budget=least, seed=0))


def test_a_channel_that_is_silent_in_the_sample_may_speak_later() -> None:
    ir = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ir[:, 1] = 0
    scaled = Moments.of(ir)
    ir[:, 1] = 1
    assert float(scaled(ir).abs().max()) < 1000
    assert bool(torch.isfinite(Moments.of(torch.zeros(2, 1, 1, 1))(torch.ones(1, 1, 1, 1))).all())


def test_moments_bring_every_channel_to_mean_0_and_deviation_1() -> None:
    ir = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 5 + 7
    scaled = Moments.of(ir)(ir)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-5
    assert (scaled.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_how_large_a_channel_is_makes_no_difference() -> None:
    victim, material = subject("18-layer"), noise(subject("18-layer"))
    scales = 2.0 ** (torch.arange(16).reshape(1, -1, 1, 1) % 5 - 2)

    def louder(pictures: Tensor) -> Tensor:
        return Cut(victim, 4).stacked(pictures) * scales

    ir = seen(Cut(victim, 4), material.targets)
    first = train_inverter(Cut(victim, 4).stacked, material.own, budget=TINY, seed=0)
    again = train_inverter(louder, material.own, budget=TINY, seed=0)
    assert torch.allclose(first(ir), again(ir * scales), atol=1e-2)
    own, louder_own = Moments.of(ir), Moments.of(ir * scales)
    assert torch.allclose(first(ir, moments=own), first(ir * scales, moments=louder_own), atol=1e-4)
    assert not torch.allclose(first(ir), first(ir * scales), atol=1e-2)


def test_pictures_are_mirrored_about_half_of_the_time() -> None:
    own = torch.zeros(1, 1, 1, 2)
    own[0, 0, 0, 1] = 1
    right = some(own, 400, torch.Generator().manual_seed(0))[:, 0, 0, 1]
    assert 0.4 < float(right.mean()) < 0.6


def test_it_sees_what_crosses_a_defended_cut() -> None:
    victim = subject("18-layer")

    def nothing(live: Live) -> Live:
        return tuple(torch.zeros_like(tensor) for tensor in live)

    found = invert(Cut(victim, 4, nothing), noise(victim), budget=TINY, seed=0)
    assert all(torch.equal(found[0], other) for other in found)


def test_progress_is_told_step_by_step() -> None:
    told: list[tuple[int, int]] = []
    victim = subject("18-layer")
    invert(Cut(victim, 2), noise(victim), budget=TINY, seed=0, on_step=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_what_is_seen_in_parts_is_what_is_seen_at_once() -> None:
    victim = subject("18-layer")
    pictures: Tensor = torch.rand(130, *victim.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seen(Cut(victim, 4), pictures), Cut(victim, 4).stacked(pictures), atol=1e-5)


def test_doubled_is_twice_as_wide_and_twice_as_long() -> None:
    assert BUDGETS["quick"].steps < BUDGETS["standard"].steps < BUDGETS["thorough"].steps
    doubled = SMALL.doubled()
    assert (doubled.width, doubled.steps, doubled.batch) == (32, 120, 32)
