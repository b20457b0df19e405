"""Each contributor's share of wrong labels, with an interval, from how often a witness agrees with its labels.

A witness errs too, and more on hard records. What it errs on honest labels is read off the contributor with which it
agrees most, within strata of records of which it is about equally sure; there a share r of wrong labels lowers the
agreement by r times (1 - e - a), with e the witness's error and a how often it happens upon the very wrong label. a is
not known: it lies between chance and e (an annotator who errs exactly as the witness does), and the interval covers
both, and twice the standard error. What the records cannot tell: wrong labels that even the best contributor has
among records of which the witness is sure are within the interval's upper end, others that it has are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRATA = 8
_BLUNT = 0.3
"""Where agreement would fall by less than this with every label wrong, nothing is concluded from it."""
_SAMPLE = 100_000


@dataclass(frozen=True)
class Shares:
    """Per contributor (P,): the estimated share of wrong labels, and an interval that is to hold in 95 % of cases."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def shares_of_wrong_labels(said: Tensor, labels: Tensor, sources: Tensor, contributors: int) -> Shares:
    """From what the witness says (N, C), which never saw a record's contributor. Needs two contributors to compare.

    A contributor without records has a share anywhere from 0 to 1.
    """
    agreed, count = _agreement(said, labels, sources, contributors)
    weights = count / count.sum(1, keepdim=True).clamp_min(1)
    best = int((agreed * weights).sum(1).argmax())
    error, spread = 1 - agreed[best], (agreed * (1 - agreed) + 0.25 / count.clamp_min(1)) / count.clamp_min(1)
    drop, doubt = agreed[best] - agreed, spread + spread[best]
    chance = 1 / max(1, said.shape[1] - 1)

    def share(meets: float) -> tuple[Tensor, Tensor]:
        """Estimate and standard error, if a share `meets` of the witness's errors are the annotator's."""
        falls = 1 - error * (1 + meets)
        told = falls >= _BLUNT
        part = torch.where(told, drop / falls.clamp_min(_BLUNT), 0.0) * weights
        known = (told * weights).sum(1).clamp_min(1e-6)
        sure = torch.where(told, doubt / falls.clamp_min(_BLUNT).square(), 0.0) * weights.square()
        # Where nothing can be told, labels are taken to be as often wrong as where something can.
        return part.sum(1) / known, sure.sum(1).sqrt() / known

    (few, few_error), (some, _), (many, many_error) = share(chance), share((chance + 1) / 2), share(1.0)
    unseen = float((error + 2 * spread[best].sqrt()).min())
    low = (torch.minimum(few, some) - 2 * few_error).clamp(0, 1)
    high = torch.maximum(torch.maximum(many, some) + 2 * many_error, torch.zeros(())) + unseen
    low[best] = 0.0
    empty = count.sum(1) == 0
    return Shares(some.clamp(0, 1), torch.where(empty, 0.0, low), torch.where(empty, 1.0, high.clamp(0, 1)))


def _agreement(said: Tensor, labels: Tensor, sources: Tensor, contributors: int) -> tuple[Tensor, Tensor]:
    """How often the witness agrees, and with how many records, by contributor and stratum (P, S)."""
    top = said.topk(min(2, said.shape[1]), dim=1).values.clamp_min(1e-9)
    lead = (top[:, 0] / top[:, -1]).log()
    sample = lead[:: max(1, len(lead) // _SAMPLE)]
    edges = torch.quantile(sample, torch.linspace(0, 1, _STRATA + 1)[1:-1])
    cell = sources * _STRATA + torch.bucketize(lead, edges)
    count = torch.bincount(cell, minlength=contributors * _STRATA).float()
    right = torch.zeros(len(count)).index_add_(0, cell, (said.argmax(1) == labels).float())
    return (right / count.clamp_min(1)).view(contributors, _STRATA), count.view(contributors, _STRATA)
