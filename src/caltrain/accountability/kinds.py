"""What kind of mistake a misprediction is, from where it lies among all records.

trigger              its neighbours in the predicted class are suspects, and the model is at ease with them: their
                     own neighbours have the same label
mislabelled          its neighbours are suspects whose own neighbours have other labels
out-of-distribution  farther from every record than all but one in a hundred records are from the next
ambiguous            the records around it have several labels
hard                 none of these
"""

from __future__ import annotations

import torch
from torch import Tensor

from caltrain.accountability.cases import Dossier, Kind, Links, Mispredictions

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
    guilty = torch.zeros(len(links.labels), dtype=torch.bool)
    guilty[suspects] = True
    alien = _alien(links, suspects)
    kinds: list[Kind] = []
    for start in range(0, len(asked.predicted), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        distances = torch.cdist(asked.fingerprints[part], links.fingerprints)
        for row, label in zip(distances, asked.predicted[part].tolist(), strict=True):
            kinds.append(_kind(row, links.labels, label, guilty, usual=dossier.usual_distance, alien=alien))
    return tuple(kinds)


def _kind(distances: Tensor, labels: Tensor, label: int, guilty: Tensor, *, usual: float, alien: bool) -> Kind:
    inside = distances.masked_fill(labels != label, torch.inf)
    count = min(_NEIGHBOURS, int((labels == label).sum()))
    near = torch.topk(inside, count, largest=False).indices
    if count and float(guilty[near].float().mean()) > 0.5:
        return "mislabelled" if alien else "trigger"
    around = torch.topk(distances, min(_NEIGHBOURS, len(distances)), largest=False)
    if float(around.values[0]) > usual:
        return "out-of-distribution"
    commonest = int(labels[around.indices].bincount().max())
    return "ambiguous" if commonest <= _MIXED * len(around.indices) else "hard"


def _alien(links: Links, suspects: Tensor) -> bool:
    """Whether most suspects lie among records of other labels: the model has not made them its own."""
    if not len(suspects) or len(links.labels) < 2:
        return False
    sample = suspects[torch.arange(0, len(suspects), max(1, len(suspects) // 200))]
    distances = torch.cdist(links.fingerprints[sample], links.fingerprints)
    distances[torch.arange(len(sample)), sample] = torch.inf
    near = torch.topk(distances, min(_NEIGHBOURS, len(links.labels) - 1), largest=False).indices
    return float((links.labels[near] != links.labels[sample, None]).float().mean()) > 0.5
