"""How far clean queries are from the records of a class: what a traced distance is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Basis = Literal["held-out", "leave-one-out", "none"]
"""Clean queries: held-out records, by the class they are predicted as, or records of the class, each without itself."""


@dataclass(frozen=True)
class Reference:
    """Distances of clean queries to their neighbours, in steps: a row a rank, each rising, int64 (K, count)."""

    basis: Basis
    steps: NDArray[np.int64]

    @classmethod
    def of(cls, basis: Basis, distances: Sequence[Sequence[float]], *, step: float) -> Reference:
        """From each query's distances, nearest first: as many for each."""
        steps = np.array([[in_steps(distance, step) for distance in near] for near in distances], np.int64)
        return cls(basis, np.sort(steps.T, axis=1))

    @property
    def count(self) -> int:
        """Clean queries."""
        return int(self.steps.shape[1])

    def told(self, rank: int, steps: int, *, floor: float, most: int) -> int:
        """So many steps as they are told: at least those of the share `floor` of clean queries at this rank.

        `most` where there are none to hide among. What is told never shrinks from one rank to the next.
        """
        if not floor:
            return steps
        if not len(self.steps):
            return most
        row = self.steps[min(rank, len(self.steps)) - 1]
        return max(steps, int(row[math.ceil(floor * self.count) - 1]))

    def unusual(self, rank: int, steps: int) -> float | None:
        """Share of clean queries whose neighbour of this rank (from 1) is at most so far, in steps of 0.01.

        None where no clean query has a neighbour of this rank.
        """
        if rank > len(self.steps):
            return None
        return round(int(np.searchsorted(self.steps[rank - 1], steps, side="right")) / self.count, 2)


NOTHING = Reference("none", np.empty((0, 0), np.int64))
"""Nothing to compare with."""


def in_steps(distance: float, step: float) -> int:
    """A distance as a trace tells it: in steps of the plan."""
    return round(distance / step)
