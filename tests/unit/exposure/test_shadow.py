"""The shadow never computes with the victim's FrontNet, and yet finds pictures in what crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.exposure.attacks.inverter import Inverter, InverterBudget, Moments, seen
from caltrain.exposure.attacks.shadow import BUDGETS, ShadowBudget, Statistics, _front, shadow, train_shadow
from caltrain.exposure.material import Material, gather
from caltrain.exposure.measures import ssim
from caltrain.exposure.subject import Cut, Live, subject_of
from caltrain.models.network import Network
from caltrain.models.spec import Partition
from caltrain.models.weights import state_of
from caltrain.presets import PRESETS
from caltrain.records.readers.digits import read_digits
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from support.exposed import subject

TINY = ShadowBudget(steps=3, inverter=InverterBudget(width=4, depth=1, steps=2, batch=4), batch=4)
SMALL = ShadowBudget(steps=150, inverter=InverterBudget(width=16, depth=1, steps=80, batch=32))


def noise(cut: Cut, *, seed: int = 0) -> Material:
    generator = torch.Generator().manual_seed(seed)
    own, others = (torch.rand(12, *cut.subject.shape, generator=generator) for _ in range(2))
    labels = torch.randint(0, len(cut.subject.data.classes), (12,), generator=generator)
    return Material(own, labels, others[:8], labels, others)


@pytest.fixture(scope="module")
def digits() -> tuple[Cut, Material]:
    """The digits' network, trained for some epochs and cut after one layer, and digits."""
    preset, split = PRESETS["digits"], read_digits()
    train, test = ((torch.from_numpy(p.images), torch.from_numpy(p.labels)) for p in (split.train, split.test))
    training = msgspec.structs.replace(preset.training, epochs=4, threads=1)
    module = train_plain(
        preset.model,
        Partition(front=1),
        preset.data,
        training,
        pixels=train[0],
        labels=train[1],
        seeds=RunSeeds.from_run_seed(bytes(32)),
    )
    victim = subject_of(preset.model, preset.data, state_of(module))
    return Cut(victim, 1), gather(victim, train, test, targets=64, candidates=100)


def test_it_beats_the_mean_image_without_the_front_net(digits: tuple[Cut, Material]) -> None:
    cut, material = digits
    found = shadow(cut, material, budget=SMALL, seed=1)
    floor = material.own.mean(0, keepdim=True).expand_as(found)
    assert float(ssim(found, material.targets).mean()) > float(ssim(floor, material.targets).mean()) + 0.1


def test_its_front_net_serves_the_victims_rest(digits: tuple[Cut, Material]) -> None:
    """A shadow that classifies own records through weights that are not its own has found what these expect."""
    cut, material = digits
    victim = Statistics(seen(cut, material.targets), torch.Generator().manual_seed(0))
    see = train_shadow(cut, material, victim, budget=SMALL, seed=1, on_step=lambda _done, _total: None)
    with torch.no_grad():
        right = (cut.answer((see(material.targets),)).argmax(1) == material.target_labels).float().mean()
    assert float(right) > 0.7


def test_the_victims_front_net_meets_the_targets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(subject("18-layer"), 4)
    material, met = noise(cut), list[Tensor]()
    through = Network.through

    def spy(net: Network, live: Sequence[Tensor], *, keep: int | None = None) -> tuple[Live, Tensor | None]:
        if any(module is own for module in net.children() for own in cut._front.children()):
            met.append(live[0].detach().clone())
        return through(net, live, keep=keep)

    monkeypatch.setattr(Network, "through", spy)
    shadow(cut, material, budget=TINY, seed=0)
    assert len(met) == 1
    assert torch.equal(met[0], cut.subject.inputs(material.targets))


def test_the_shadow_shares_no_weight_with_the_victim_and_leaves_it_as_it_was() -> None:
    """With other weights in the victim's FrontNet, and the same IRs and the same rest, the shadow is the same."""
    cut, other = (Cut(subject("18-layer", seed=seed), 4) for seed in (0, 1))
    other._rest = cut._rest
    before = {name: value.clone() for name, value in cut.subject.module.state_dict().items()}
    material = noise(cut)
    victim = Statistics(seen(cut, material.targets), torch.Generator().manual_seed(0))
    sights = [
        train_shadow(c, material, victim, budget=TINY, seed=0, on_step=lambda _done, _total: None) for c in (cut, other)
    ]
    first, second = (see(material.own).detach() for see in sights)
    assert torch.equal(first, second)
    assert not torch.allclose(first, cut.stacked(material.own), atol=1e-2)
    after = cut.subject.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("name", "front"), [("18-layer", 9), ("resnet18", 6), ("resnet18", 30), ("vit", 3)])
def test_it_works_at_every_kind_of_cut_and_again_with_the_same_seed(name: str, front: int) -> None:
    cut = Cut(subject(name), front)
    material = noise(cut)
    first, again, other = (shadow(cut, material, budget=TINY, seed=seed) for seed in (0, 0, 1))
    assert first.shape == material.targets.shape
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_its_first_weights_are_its_seeds() -> None:
    cut, own = Cut(subject("18-layer"), 4), noise(Cut(subject("18-layer"), 4)).own
    first, again, other = (_front(cut, seed).eval().through((own,))[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_the_victims_irs_are_normalised_by_their_own_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the shadow's, whose channels are louder or quieter."""
    cut, used = Cut(subject("18-layer"), 4), list[Moments | None]()

    def spy(_inverter: Inverter, _ir: Tensor, *, moments: Moments | None = None) -> Tensor:
        used.append(moments)
        return torch.zeros(8, *cut.subject.shape)

    monkeypatch.setattr(Inverter, "__call__", spy)
    material = noise(cut)
    shadow(cut, material, budget=TINY, seed=0)
    assert used[0] is not None
    assert torch.equal(used[0].mean, Moments.of(seen(cut, material.targets)).mean)


def test_labels_of_targets_are_not_known_to_it() -> None:
    cut = Cut(subject("resnet18"), 30)
    material = noise(cut)
    first = shadow(cut, material, budget=TINY, seed=0)
    assert torch.equal(first, shadow(cut, replace(material, labels=-material.labels), budget=TINY, seed=0))
    changed = replace(material, own_labels=(material.own_labels + 1) % 4)
    assert not torch.equal(first, shadow(cut, changed, budget=TINY, seed=0))


def test_the_gap_of_statistics_is_0_at_the_victims_own_and_grows_with_what_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    ir = torch.randn(64, 6, 3, 3, generator=generator)
    victim = Statistics(ir, generator)
    assert float(victim.gap(ir)) == pytest.approx(0, abs=1e-6)
    assert float(victim.gap(ir + 1)) > 0.5
    assert float(victim.gap(ir * 2)) > 0.5
    together = torch.cat([ir[:, :3], ir[:, :3]], dim=1)  # each channel alone is as before
    assert float(victim.gap(together)) > 0.1
    placed = ir + torch.linspace(-2, 2, 3)  # mirrored, only the places of what is loud change
    assert float(Statistics(placed, generator).gap(placed.flip(3))) > 0.5
    assert float(Statistics(torch.randn(8, 600, 1, 1, generator=generator), generator).gap(torch.zeros(8, 600, 1, 1)))


def test_progress_covers_the_shadow_and_its_inverter() -> None:
    cut, told = Cut(subject("18-layer"), 4), list[tuple[int, int]]()
    shadow(cut, noise(cut), budget=TINY, seed=0, on_step=lambda done, total: told.append((done, total)))
    assert told == [(step, 5) for step in range(1, 6)]


def test_budgets_have_the_names_of_the_inverters() -> None:
    assert list(BUDGETS) == ["quick", "standard", "thorough"]
