"""Wrong labels: how likely each record's is wrong, and what share of each contributor's.

Two views of a record are multiplied: the witness's, which never saw its contributor, and the trained network's, which
saw it but has not made room for what does not fit (for the shares, where it must not have seen it, a regression on
fingerprints, out of fold). Given labels are then taken as what annotators of unequal care made
of true ones: a contributor has one rate of error, and where a class's wrong labels fall is the same for all (Dawid and
Skene 1979; Raykar et al., JMLR 2010, here with one label a record).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.cases import Dossier
from caltrain.accountability.quality import Shares, shares_of_wrong_labels
from caltrain.accountability.regression import out_of_fold

_ROUNDS = 3
_LEAST = 1e-9
_CAREFUL = 0.02
"""Nobody is taken to be more careful than this: a rate of zero would clear a contributor whatever its records show."""
_SCATTERED = 5.0  # wrong labels of each class that are taken to fall anywhere, before any is seen


@dataclass(frozen=True)
class LabelFindings:
    """`suspicion` (N,) in 0..1 that a record's label is wrong; the contributors' shares of wrong labels.

    `view` (N, C) are class probabilities of every record by fits to others, out of fold.
    """

    suspicion: Tensor
    shares: Shares
    view: Tensor


def examine(dossier: Dossier, probabilities: Tensor) -> LabelFindings:
    """Look at all labels; `probabilities` (N, C) are the trained network's for its own records."""
    links = dossier.links
    given = F.one_hot(links.labels, probabilities.shape[1]).float()
    # The witness is not sharp enough as it is: how sure it may be is learned on records that it is not used on.
    witness = out_of_fold(dossier.said.clamp_min(_LEAST).log(), given, decay=1e-4)
    view = (witness + out_of_fold(links.fingerprints, given, decay=1e-4)).softmax(1)
    shares = shares_of_wrong_labels(view, links.labels, links.sources, len(links.contributors))
    rates = shares.estimate.clamp(_CAREFUL, 0.9)[links.sources]
    believed = (witness + probabilities.clamp_min(_LEAST).log()).softmax(1)
    flips = _without_own(torch.ones_like(given[0]).expand(given.shape[1], -1))
    suspicion = torch.zeros(len(given))
    for _ in range(_ROUNDS):
        right = believed * given * (1 - rates)[:, None]
        wrong = believed * flips.T[links.labels] * rates[:, None]
        joint = (right + wrong) / (right + wrong).sum(1, keepdim=True).clamp_min(_LEAST)
        suspicion = wrong.sum(1) / (right + wrong).sum(1).clamp_min(_LEAST)
        flips = _without_own(joint.T @ given + _SCATTERED / given.shape[1])
    return LabelFindings(suspicion, shares, view)


def _without_own(counts: Tensor) -> Tensor:
    """Where wrong labels of each true class (C,) fall (C, C): not on itself; rows sum to one."""
    counts = counts * (1 - torch.eye(len(counts)))
    return counts / counts.sum(1, keepdim=True).clamp_min(_LEAST)
