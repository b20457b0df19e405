"""What kind of mistake a misprediction is, from where it lies among all records.

trigger              its neighbours in the predicted class are suspects, and the model is at ease with them: their
                     own neighbours have the same label
mislabelled          its neighbours are suspects whose own neighbours have other labels
out-of-distribution  farther from every record than all but one in a hundred records are from the next
ambiguous            the records around it have several labels
hard                 none of these
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from caltrain.accountability.cases import Dossier, Links, Mispredictions
from caltrain.accountability.outcomes import Kind
from caltrain.accountability.subset import CERTAIN, fisher

CAUSED: tuple[Kind, ...] = ("trigger", "mislabelled")
"""Mistakes that records stand behind."""
_NEIGHBOURS = 9
_MIXED = 2 / 3
_AT_ONCE = 128


def kinds_of(dossier: Dossier, asked: Mispredictions, *, suspects: Tensor) -> tuple[Kind, ...]:
    """Of each misprediction (Q) its kind, given the rows (R,) that contradict their labels."""
    links = dossier.links
    if not len(links.labels):
        return tuple("out-of-distribution" for _ in asked.predicted)
    caused = _caused(links, asked, suspects)
    theirs: Kind = "mislabelled" if _alien(links, suspects) else "trigger"
    parts = torch.split(asked.fingerprints, _AT_ONCE)
    others = [kind for part in parts for kind in _others(links, part, usual=dossier.usual_distance)]
    return tuple(theirs if own else kind for own, kind in zip(caused, others, strict=True))


def _caused(links: Links, asked: Mispredictions, suspects: Tensor) -> list[bool]:
    """Whether a misprediction (Q) lies with the suspects of its class, and not with the rest of the class."""
    caused = torch.zeros(len(asked.predicted), dtype=torch.bool)
    guilty = torch.zeros(len(links.labels), dtype=torch.bool)
    guilty[suspects] = True
    for label in set(links.labels[suspects].tolist()):
        rows, here = links.labels == label, asked.predicted == label
        yes, no = links.fingerprints[rows & guilty], links.fingerprints[rows & ~guilty]
        if len(no) < 2 or not here.any():
            caused |= here
        elif len(yes) > 1:
            caused[here] = fisher(yes, no, asked.fingerprints[here]) > CERTAIN
    return [bool(own) for own in caused]


def _others(links: Links, fingerprints: Tensor, *, usual: float) -> Iterator[Kind]:
    distances = torch.cdist(fingerprints, links.fingerprints)
    around = torch.topk(distances, min(_NEIGHBOURS, distances.shape[1]), largest=False)
    for near, first in zip(links.labels[around.indices], around.values[:, 0].tolist(), strict=True):
        if first > usual:
            yield "out-of-distribution"
        else:
            yield "ambiguous" if int(near.bincount().max()) <= _MIXED * len(near) else "hard"


def _alien(links: Links, suspects: Tensor) -> bool:
    """Whether most suspects lie among records of other labels: the model has not made them its own."""
    if not len(suspects) or len(links.labels) < 2:
        return False
    sample = suspects[torch.arange(0, len(suspects), max(1, len(suspects) // 200))]
    distances = torch.cdist(links.fingerprints[sample], links.fingerprints)
    distances[torch.arange(len(sample)), sample] = torch.inf
    near = torch.topk(distances, min(_NEIGHBOURS, len(links.labels) - 1), largest=False).indices
    return float((links.labels[near] != links.labels[sample, None]).float().mean()) > 0.5
