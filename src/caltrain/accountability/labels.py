"""Which labels a witness contradicts, and each contributor's share of wrong ones (a stand-in)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from caltrain.accountability.cases import Links, Witness


@dataclass(frozen=True)
class Share:
    """A contributor's share of wrong labels with a 95 % interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class LabelFindings:
    """Suspicion (N,) in 0..1 that a label is wrong; by contributor its share of wrong labels."""

    suspicion: Tensor
    shares: tuple[Share, ...]


def examine(links: Links, witness: Witness) -> LabelFindings:
    """What a witness that never saw a contributor's records says of their labels."""
    suspicion, shares = torch.zeros(len(links.labels)), []
    for c in range(len(links.contributors)):
        rows = (links.sources == c).nonzero().squeeze(1)
        odds = witness.testify(rows, without=frozenset({c}))
        suspicion[rows] = 1 - odds[torch.arange(len(rows)), links.labels[rows]]
        share = float((odds.argmax(1) != links.labels[rows]).float().mean()) if len(rows) else 0.0
        shares.append(Share(share, max(0.0, share - 0.1), min(1.0, share + 0.1)))
    return LabelFindings(suspicion, tuple(shares))
