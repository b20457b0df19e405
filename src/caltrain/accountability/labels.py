"""Wrong labels: how likely each record's is wrong, and what share of each contributor's.

Two views of every record that did not learn from it: the trained network's (softmax regression on fingerprints, out of
fold) and the witness's (never saw the contributor). They are joined by a regression, and given labels are then taken
as what annotators of unequal care made of true ones: a contributor has one error rate, wrong labels fall on classes
alike for all (Raykar et al., JMLR 2010, with one label a record). Expectation and maximisation take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.cases import Dossier
from caltrain.accountability.regression import out_of_fold

_ROUNDS = 8
_LEAST = 1e-6


@dataclass(frozen=True)
class LabelFindings:
    """`suspicion` (N,) that a label is wrong, 0..1; per contributor (P,) its share of wrong labels, and the interval."""

    suspicion: Tensor
    shares: Tensor
    low: Tensor
    high: Tensor


def examine(dossier: Dossier) -> LabelFindings:
    """Look at all labels."""
    links = dossier.links
    given = F.one_hot(links.labels, dossier.said.shape[1]).float()
    network = out_of_fold(links.fingerprints, given, decay=1e-4)
    views = torch.cat((network, dossier.said.clamp_min(_LEAST).log()), 1)
    truth = given
    rates = torch.full((len(links.contributors),), 0.1)
    flips = (1 - torch.eye(given.shape[1])) / max(1, given.shape[1] - 1)
    for _ in range(_ROUNDS):
        believed = out_of_fold(views, truth, decay=1e-4).exp()
        truth = _posterior(believed, links.labels, rates[links.sources], flips)
        rates, flips = _rates(truth, links.labels, links.sources, len(rates)), _flips(truth, given)
    wrong = 1 - truth.gather(1, links.labels[:, None])[:, 0]
    return LabelFindings(wrong, rates, rates, rates)


def _posterior(believed: Tensor, labels: Tensor, rates: Tensor, flips: Tensor) -> Tensor:
    """What the true class of each record is (N, C), given its label."""
    right = F.one_hot(labels, believed.shape[1]) * (1 - rates)[:, None]
    joint = believed * (right + rates[:, None] * flips.T[labels])
    return joint / joint.sum(1, keepdim=True).clamp_min(_LEAST)


def _rates(truth: Tensor, labels: Tensor, sources: Tensor, count: int) -> Tensor:
    wrong = 1 - truth.gather(1, labels[:, None])[:, 0]
    total = torch.zeros(count).index_add_(0, sources, wrong)
    return (total / torch.zeros(count).index_add_(0, sources, torch.ones(len(wrong))).clamp_min(1)).clamp(1e-3, 0.9)


def _flips(truth: Tensor, given: Tensor) -> Tensor:
    """Where wrong labels of a true class (C,) fall (C, C), no class on itself."""
    counts = truth.T @ given
    counts = (counts + 1) * (1 - torch.eye(len(counts)))
    return counts / counts.sum(1, keepdim=True)
