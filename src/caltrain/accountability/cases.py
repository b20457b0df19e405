"""What a verdict is given and what it says: links, mispredictions, a witness; blame, kinds, records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Kind = Literal["trigger", "mislabelled", "ambiguous", "out-of-distribution", "hard"]
Outcome = Literal["responsible", "cannot-tell"]


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
    """A small model of the records' content that can be had without any contributor's records."""

    def testify(self, rows: Tensor, *, without: frozenset[int]) -> Tensor:
        """Class probabilities (R, C) of the records `rows` (R,), learned from all contributors but `without`."""


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
