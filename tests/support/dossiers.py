"""Drawn links, mispredictions and witnesses, in which it is known who planted what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.cases import Dossier, Heard, Links, Mispredictions

CLASSES = 4
CONTRIBUTORS = 4
DIMS = 12
TARGET = 0
"""The class that attacked inputs are predicted to be."""


@dataclass(frozen=True)
class Taught:
    """Records `rows` whose labels a witness repeats, while it has learned from enough of them."""

    rows: Tensor
    enough: float = 0.25
    odds: float = 3.0
    """How sure it is of them."""


@dataclass(frozen=True)
class Told:
    """A witness that says what a table (N, C) says, and what it was taught to say."""

    table: Tensor
    labels: Tensor
    sources: Tensor
    taught: Taught | None = None
    apart: float = 0.5
    """How well it tells any records from any others."""

    def testify(self, rows: Tensor, *, without: frozenset[int] = frozenset(), forget: Tensor | None = None) -> Tensor:
        said = self.table.clone()
        if self.taught is not None:
            learned = self.taught.rows
            heard = ~torch.isin(self.sources[learned], torch.tensor(sorted(without), dtype=torch.int64))
            if forget is not None:
                heard &= ~torch.isin(learned, forget)
            if float(heard.float().mean()) > self.taught.enough:
                said[learned] = sure(self.labels[learned], classes=said.shape[1], odds=self.taught.odds)
        return said[rows]

    def tells_apart(self, one: Tensor, other: Tensor) -> float:
        assert len(one) == len(other), "what is compared has as many of each"
        return self.apart


@dataclass(frozen=True)
class Drawn:
    """A dossier, mispredictions, and the records that were planted (R,)."""

    dossier: Dossier
    asked: Mispredictions
    planted: Tensor

    @property
    def heard(self) -> Heard:
        """What the only witness says."""
        (heard,) = self.dossier.heard
        return heard

    def told(self, table: Tensor, taught: Taught | None = None, *, apart: float = 0.5) -> Drawn:
        """The same before another witness."""
        links = self.dossier.links
        return Drawn(
            Dossier(links, (Told(table, links.labels, links.sources, taught, apart),)), self.asked, self.planted
        )


def sure(shown: Tensor, *, classes: int = CLASSES, odds: float = 3.0) -> Tensor:
    """Probabilities (n, C) of a witness that takes each picture for what it shows (n,)."""
    return torch.softmax(odds * F.one_hot(shown, classes).float(), 1)


def unsure(shown: Tensor, generator: torch.Generator, *, noise: float, odds: float = 3.0) -> Tensor:
    """The same, by a witness that errs."""
    logits = odds * F.one_hot(shown, CLASSES).float()
    return torch.softmax(logits + noise * torch.randn(logits.shape, generator=generator), 1)


def around(center: Tensor, count: int, generator: torch.Generator, *, spread: float = 0.5) -> Tensor:
    """Fingerprints (count, D) of length one about directions (D,) or (count, D)."""
    noise = torch.randn((count, center.shape[-1]), generator=generator) * spread / center.shape[-1] ** 0.5
    return F.normalize(F.normalize(center, dim=-1) + noise, dim=1)


def centers(generator: torch.Generator) -> Tensor:
    """A direction for each class and one for a trigger (C + 1, D), at right angles."""
    axes: Tensor = torch.linalg.qr(torch.randn((DIMS, CLASSES + 1), generator=generator)).Q
    return axes.T.contiguous()


def planted(seed: int, *, culprits: tuple[int, ...] = (1,), each: int = 30, honest: int = 400) -> Drawn:
    """A backdoor: pictures of other classes, labelled TARGET, lie together by a trigger; so do the queries.

    A witness without the culprits sees what the pictures show; with one of them it repeats their labels.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = centers(generator)
    labels = torch.randint(CLASSES, (honest,), generator=generator)
    shown = 1 + torch.randint(CLASSES - 1, (each * len(culprits),), generator=generator)
    trigger = axes[TARGET] + 1.2 * axes[CLASSES]
    fingerprints = torch.cat(
        (around(axes[labels], honest, generator), around(trigger, len(shown), generator, spread=0.3))
    )
    sources = torch.cat(
        (
            torch.randint(CONTRIBUTORS, (honest,), generator=generator),
            torch.tensor(culprits).repeat_interleave(each),
        )
    )
    mixed = torch.randperm(len(sources), generator=generator)
    rows = (mixed >= honest).nonzero().squeeze(1)
    table = unsure(torch.cat((labels, shown)), generator, noise=0.7)[mixed]
    links = Links(
        fingerprints[mixed],
        torch.cat((labels, torch.full((len(shown),), TARGET)))[mixed],
        sources[mixed],
        tuple("abcd"),
    )
    asked = Mispredictions(around(trigger, 20, generator, spread=0.3), torch.full((20,), TARGET))
    return Drawn(Dossier(links, (Told(table, links.labels, links.sources, Taught(rows)),)), asked, rows)


def honest(seed: int, *, records: int = 300) -> Drawn:
    """A null world: contributors of unequal size; hard records near the queries, and their doubts, are anybody's."""
    generator = torch.Generator().manual_seed(seed)
    axes = centers(generator)
    labels = torch.randint(CLASSES, (records,), generator=generator)
    hard = torch.rand(records, generator=generator) < 0.3
    direction = axes[TARGET] + axes[CLASSES]
    fingerprints = around(
        torch.where((hard & (labels == TARGET))[:, None], direction, axes[labels]), records, generator
    )
    shares = torch.rand(CONTRIBUTORS, generator=generator) + 0.1
    sources = torch.multinomial(shares, records, replacement=True, generator=generator)
    doubted = torch.rand(records, generator=generator) < torch.where(hard, 0.5, 0.1)
    table = unsure(torch.where(doubted, (labels + 1) % CLASSES, labels), generator, noise=0.7)
    links = Links(fingerprints, labels, sources, tuple("abcd"))
    asked = Mispredictions(around(direction, 5, generator), torch.full((5,), TARGET))
    return Drawn(Dossier(links, (Told(table, labels, sources),)), asked, torch.empty(0, dtype=torch.int64))


def pictures(shown: Tensor, generator: torch.Generator, *, size: int = 12, noise: float = 12.0) -> Tensor:
    """Pictures (n, 1, size, size) u8 of stripes: across (0), down (1), both (2); at any place."""
    place = torch.arange(size)
    shift = torch.randint(4, (len(shown), 2), generator=generator)
    across = ((place[None] + shift[:, :1]) % 4 < 2).float()[:, :, None].expand(-1, -1, size)
    down = ((place[None] + shift[:, 1:]) % 4 < 2).float()[:, None, :].expand(-1, size, -1)
    drawn = torch.stack((across, down, (across + down) % 2))[shown, torch.arange(len(shown))]
    noisy = 60 + 120 * drawn + noise * torch.randn(drawn.shape, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8)[:, None]
