"""The pictures of an assessment: those that the adversary owns, and those of others that it wants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from caltrain.errors import DataError
from caltrain.exposure.subject import Subject

LEAST_TARGETS = 8


@dataclass(frozen=True)
class Material:
    """`own` (N, C, H, W) and `own_labels` (N,): the adversary's. `labels` are those of `candidates`.

    The first of `candidates` are `targets`, in order.
    """

    own: Tensor
    own_labels: Tensor
    targets: Tensor
    labels: Tensor
    candidates: Tensor

    @property
    def target_labels(self) -> Tensor:
        """Of `targets`."""
        return self.labels[: len(self.targets)]

    def widened(self) -> Material:
        """With every candidate as a target, for what costs little a picture."""
        return replace(self, targets=self.candidates)


def gather(
    subject: Subject,
    own: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    *,
    targets: int,
    candidates: int = 1000,
    most_own: int = 20_000,
    seed: int = 0,
) -> Material:
    """Draw targets and candidates out of others' records (elements, labels), and at most `most_own` of one's own.

    Raises DataError `exposure.too-few` for fewer than 8 targets, or fewer records than are asked for;
    `exposure.schema` for records of another schema.
    """
    rng = np.random.default_rng(seed)
    wanted = max(targets, candidates)
    if targets < LEAST_TARGETS or len(others[1]) < wanted or len(own[1]) < LEAST_TARGETS:
        raise DataError(
            "exposure.too-few",
            f"{targets} targets among {candidates} candidates were asked for, from {len(others[1])} records of others "
            f"and {len(own[1])} of the adversary's own",
            step="gather records",
            fix=f"Give more records, or ask for fewer candidates; at least {LEAST_TARGETS} targets are needed.",
        )
    rows = torch.from_numpy(rng.permutation(len(others[1]))[:wanted])
    mine = torch.from_numpy(rng.permutation(len(own[1]))[:most_own])
    drawn = subject.pictures(others[0][rows])
    return Material(
        own=subject.pictures(own[0][mine]),
        own_labels=own[1][mine],
        targets=drawn[:targets],
        labels=others[1][rows],
        candidates=drawn,
    )
