"""What a verdict is given and what it says: links, mispredictions, witnesses; blame, kinds, records."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from caltrain.accountability.outcomes import Kind, Outcome

_SAMPLE = 2000
_LEAST = 1e-9


@dataclass(frozen=True)
class Links:
    """One model's links: fingerprints (N, D) float32 of length one, labels (N,), sources (N,) into `contributors`."""

    fingerprints: Tensor
    labels: Tensor
    sources: Tensor
    contributors: tuple[str, ...]


@dataclass(frozen=True)
class Mispredictions:
    """Inputs that the model got wrong, as their user says: fingerprints (Q, D) of length one, predicted (Q,)."""

    fingerprints: Tensor
    predicted: Tensor


class Witness(Protocol):
    """A small model of what records show, which can be had without any contributor's records, and without some."""

    def testify(self, rows: Tensor, *, without: frozenset[int] = frozenset(), forget: Tensor | None = None) -> Tensor:
        """Class probabilities (R, C) of the records `rows` (R,).

        Learned from all contributors but `without`, and without the records `forget` (F,), of other contributors.
        """

    def tells_apart(self, one: Tensor, other: Tensor) -> float:
        """How well records `one` (R,) can be told from `other` (S,) by what they show (AUC): 0.5 not at all."""


@dataclass(frozen=True)
class Heard:
    """What one witness says of every record."""

    links: Links
    witness: Witness
    knows: dict[tuple[int, int, frozenset[int]], bool] = field(default_factory=dict, repr=False, compare=False)
    """What was found of whether it knows a contributor's pictures, but for a label's and for those of others."""

    @cached_property
    def said(self) -> Tensor:
        """Class probabilities (N, C) of every record, by a witness that never saw its contributor."""
        sources = self.links.sources
        parts = {c: (sources == c).nonzero().squeeze(1) for c in sorted(set(sources.tolist()))}
        heard = [self.witness.testify(rows, without=frozenset({c})) for c, rows in parts.items()]
        said = torch.empty((len(sources), heard[0].shape[1] if heard else 1))
        for rows, testimony in zip(parts.values(), heard, strict=True):
            said[rows] = testimony
        return said

    @cached_property
    def doubt(self) -> Tensor:
        """By how much (N,) another class than its label is likelier for a record, in log odds."""
        return doubt(self.said, self.links.labels)


@dataclass(frozen=True)
class Dossier:
    """One model's links and the witnesses to their content: what every verdict on that model starts from."""

    links: Links
    witnesses: tuple[Witness, ...]

    @cached_property
    def heard(self) -> tuple[Heard, ...]:
        """What each witness says."""
        return tuple(Heard(self.links, witness) for witness in self.witnesses)

    @cached_property
    def said(self) -> Tensor:
        """Class probabilities (N, C) of every record by all witnesses together: the mean of their log odds."""
        return torch.stack([heard.said.clamp_min(_LEAST).log() for heard in self.heard]).mean(0).softmax(1)

    @cached_property
    def usual_distance(self) -> float:
        """What 99 of 100 records do not exceed, to the next record."""
        prints = self.links.fingerprints
        rows = prints[:: max(1, len(prints) // _SAMPLE)]
        near = [
            torch.cdist(part, prints).topk(min(2, len(prints)), largest=False).values for part in torch.split(rows, 128)
        ]
        return float(torch.cat(near)[:, -1].quantile(0.99)) if near else 0.0


def doubt(said: Tensor, labels: Tensor) -> Tensor:
    """By how much (R,) another class than `labels` (R,) is likelier in `said` (R, C), in log odds."""
    given = said.gather(1, labels[:, None])[:, 0].clamp_min(_LEAST)
    others = said.scatter(1, labels[:, None], 0.0).max(1).values.clamp_min(_LEAST)
    return (others / given).log()


@dataclass(frozen=True)
class Blame:
    """One contributor before the verdict: how often it is near, how often chance alone would have it so."""

    contributor: int
    share_of_blame: float
    share_of_data: float
    p_value: float
    """Against the null that blame falls by share of data."""
    adjusted: float
    """The same, corrected for having looked at every contributor and class (Holm)."""


@dataclass(frozen=True)
class Suspects:
    """Records held responsible: row numbers (R,), and the share of them that is so, with a 95 % interval."""

    rows: Tensor
    precision: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Who is responsible for mispredictions, if that can be told; `contributors` is empty where it cannot."""

    outcome: Outcome
    contributors: tuple[int, ...]
    blames: tuple[Blame, ...]
    kinds: tuple[Kind, ...]
    """Of each misprediction."""
    suspects: Suspects
    reason: str
    """In words: what the outcome rests on, or what is missing."""
