"""The shadow: an adversary that never computes with the FrontNet makes one of its own, and inverts that.

The host holds the rest of the network, and sees what crosses of others' records; it has labelled records of the same
kind. From random weights it trains a FrontNet of the same architecture until the *victim's* rest, frozen, classifies
its records rightly (query-free attack of He et al., ACSAC 2019, doi:10.1145/3359789.3359824), and until the statistics
of what crosses are the victim's: the rest pins down what the channels mean, the statistics how they go together. An
inverter trained on the shadow's IRs is then applied to the victim's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.exposure.attacks.inverter import BUDGETS as INVERTER_BUDGETS
from caltrain.exposure.attacks.inverter import InverterBudget, Moments, OnStep, seen, train_inverter
from caltrain.exposure.material import Material
from caltrain.exposure.precision import fast
from caltrain.exposure.subject import Cut, stacked
from caltrain.models.network import Network, build, lay_out
from caltrain.training.seeds import initialise

_MOST_CHANNELS = 512
_RATE = 3e-3


@dataclass(frozen=True)
class ShadowBudget:
    """What the attack spends: steps of `batch` records on the shadow, and an inverter."""

    steps: int
    inverter: InverterBudget
    batch: int = 64


BUDGETS = {
    "quick": ShadowBudget(steps=100, inverter=INVERTER_BUDGETS["quick"]),
    "standard": ShadowBudget(steps=400, inverter=INVERTER_BUDGETS["standard"]),
    "thorough": ShadowBudget(steps=1200, inverter=INVERTER_BUDGETS["thorough"]),
}


class Statistics:
    """First moments at every place of a victim's IRs, second ones over all places; of very many channels, of some.

    All are measured by the channels' mean deviation: each by its own would let those that hardly vary count most.
    """

    def __init__(self, ir: Tensor, generator: torch.Generator) -> None:
        moments = Moments.of(ir)
        self._center, self._scale = moments.mean, moments.std.mean()
        self._channels = torch.randperm(ir.shape[1], generator=generator)[:_MOST_CHANNELS]
        self._first, self._second = self._of(ir)

    def gap(self, ir: Tensor) -> Tensor:
        """How far the moments of other IRs (N, C, h, w) are from the victim's; 0 is equal."""
        first, second = self._of(ir)
        return (first - self._first).square().mean() + (second - self._second).square().mean()

    def _of(self, ir: Tensor) -> tuple[Tensor, Tensor]:
        scaled = ((ir.float() - self._center) / self._scale)[:, self._channels]
        rows = scaled.transpose(0, 1).flatten(1)
        return scaled.mean(0), rows @ rows.T / rows.shape[1]


def shadow(
    cut: Cut, material: Material, *, budget: ShadowBudget, seed: int, on_step: OnStep = lambda _done, _total: None
) -> Tensor:
    """Reconstructions (N, C, H, W) of `material.targets`, by somebody who has no output of the FrontNet for its own."""
    total = budget.steps + budget.inverter.steps
    victim = seen(cut, material.targets)
    see = train_shadow(
        cut,
        material,
        Statistics(victim, torch.Generator().manual_seed(seed)),
        budget=budget,
        seed=seed,
        on_step=lambda done, _: on_step(done, total),
    )
    inverter = train_inverter(
        see,
        material.own,
        budget=budget.inverter,
        seed=seed,
        on_step=lambda done, _: on_step(budget.steps + done, total),
    )
    return inverter(victim, moments=Moments.of(victim))


def train_shadow(
    cut: Cut, material: Material, victim: Statistics, *, budget: ShadowBudget, seed: int, on_step: OnStep
) -> Callable[[Tensor], Tensor]:
    """What would cross (N, channels, h, w), by a FrontNet trained on `material.own` before the rest of `cut`."""
    generator = torch.Generator().manual_seed(seed)
    front = _front(cut, seed)
    optimiser = torch.optim.AdamW(front.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=budget.steps, pct_start=0.2)
    for step in range(budget.steps):
        rows = torch.randint(len(material.own), (budget.batch,), generator=generator)
        with fast():
            live = cut.defence(front.through((cut.subject.inputs(material.own[rows]),))[0])
            logits = cut.answer(live)
        gap = victim.gap(stacked(live)).log1p()  # however far it begins, labels count as well
        loss = F.cross_entropy(logits.float(), material.own_labels[rows]) + gap
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        on_step(step + 1, budget.steps)
    front.eval()
    return lambda pictures: stacked(cut.defence(front.through((cut.subject.inputs(pictures),))[0]))


def _front(cut: Cut, seed: int) -> Network:
    """The victim's architecture, other weights."""
    subject = cut.subject
    layers = range(cut.front)
    front = build(subject.spec, input_shape=subject.data.shape, layers=layers, factory=subject.factory)
    initialise(front, seed.to_bytes(32, "big"))
    lay_out(front, channels_last=True)
    return front.train()  # batch normalisation measures its own records
