"""The black-box inverter: a party that colludes with the host has pairs, its own pictures and what crosses of them.

From the pairs it trains a network that goes back, and applies that to what crosses of other parties' records. It needs
no weights of the FrontNet. In training the host sees what crosses of each record again in every epoch, augmented; so
the pairs here are as many as the steps ask for, of pictures that are mirrored at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from caltrain.exposure.attacks.decoder import OURS, Design, draw
from caltrain.exposure.precision import fast
from caltrain.exposure.subject import Cut
from caltrain.models.network import lay_out

OnStep = Callable[[int, int], None]
_AT_ONCE = 128
_LEAST_STD = 0.01  # of the mean over channels: one that is silent in the sample may speak later
_SAMPLE = 256


@dataclass(frozen=True)
class InverterBudget:
    """What the attack spends: channels at the picture's size, residual blocks at every size, steps of `batch` pairs."""

    width: int
    depth: int
    steps: int
    batch: int = 32
    records: int = 20_000

    def doubled(self) -> InverterBudget:
        """Twice the width, twice the steps."""
        return replace(self, width=2 * self.width, steps=2 * self.steps)


BUDGETS = {
    "quick": InverterBudget(width=32, depth=1, steps=300),
    "standard": InverterBudget(width=48, depth=1, steps=1000),
    "thorough": InverterBudget(width=64, depth=2, steps=2000),
}


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of every channel (1, C, 1, 1); a channel that hardly varies counts as if it did."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, ir: Tensor) -> Moments:
        """Of stacked IRs (N, C, h, w)."""
        std, mean = torch.std_mean(ir.float(), dim=(0, 2, 3), keepdim=True, correction=0)
        return cls(mean, torch.maximum(std, _LEAST_STD * std.mean()).clamp_min(1e-6))

    def __call__(self, ir: Tensor) -> Tensor:
        """The IRs, normalised."""
        return (ir.float() - self.mean) / self.std


@dataclass(frozen=True)
class Inverter:
    """A trained way back."""

    network: nn.Module
    moments: Moments

    def __call__(self, ir: Tensor, *, moments: Moments | None = None) -> Tensor:
        """Pictures (N, C, H, W) in 0..1 of stacked IRs (N, channels, h, w), which may have `moments` of their own."""
        scaled = (moments or self.moments)(ir)
        with torch.inference_mode():
            return torch.cat([self.network(part).clamp(0, 1) for part in torch.split(scaled, _AT_ONCE)])


def train_inverter(
    see: Callable[[Tensor], Tensor],
    own: Tensor,
    *,
    budget: InverterBudget,
    seed: int,
    design: Design = OURS,
    on_step: OnStep = lambda _done, _total: None,
) -> Inverter:
    """Train on pairs of `own` pictures (N, C, H, W) and what `see` gives for them (N, channels, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    own = own[: budget.records]
    with torch.no_grad(), fast():
        sample = see(own[:_SAMPLE])
    moments = Moments.of(sample)
    network = draw(design.build(tuple(sample.shape[1:]), tuple(own.shape[1:]), budget.width, budget.depth), generator)
    lay_out(network, channels_last=True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=design.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, design.rate, total_steps=budget.steps, pct_start=0.2)
    for step in range(budget.steps):
        with fast():
            with torch.no_grad():
                pictures = some(own, budget.batch, generator)
                ir = moments(see(pictures))
            found = network(ir)
        loss = design.loss(found.float(), pictures)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        on_step(step + 1, budget.steps)
    return Inverter(network.eval(), moments)


def seen(cut: Cut, pictures: Tensor) -> Tensor:
    """What crosses of others' pictures, stacked: (N, channels, h, w)."""
    with torch.inference_mode():
        return torch.cat([cut.stacked(part) for part in torch.split(pictures, _AT_ONCE)])


def some(own: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Pictures drawn with replacement, each mirrored with probability one half."""
    drawn = own[torch.randint(len(own), (batch,), generator=generator)]
    mirrored = torch.rand((batch, 1, 1, 1), generator=generator) < 0.5
    return torch.where(mirrored, drawn.flip(3), drawn)
