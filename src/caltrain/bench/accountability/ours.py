"""The verdict of this package as a method of the benchmark: its only way in."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from caltrain.accountability.cases import Dossier, Links, Mispredictions
from caltrain.accountability.labels import examine
from caltrain.accountability.verdict import judge
from caltrain.accountability.witness import witnesses
from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.questions import NEAR, Answer, LabelView, Question


class Ours:
    """Fingerprints of length one, and witnesses to the pictures. `seed` is theirs."""

    def __init__(self, made: Made, *, seed: int) -> None:
        scene = made.scene
        self._seed, self._scene, self._probabilities = seed, scene, made.records.probabilities
        self.links = Links(
            fingerprints=F.normalize(made.records.features),
            labels=torch.from_numpy(scene.labels),
            sources=torch.from_numpy(scene.owner),
            contributors=tuple(f"party-{party}" for party in range(scene.parties)),
        )

    @cached_property
    def dossier(self) -> Dossier:
        """The links, with witnesses to what the pictures show."""
        scene, links = self._scene, self.links
        images = torch.from_numpy(scene.images)
        found = witnesses(images, links.labels, links.sources, classes=scene.classes, seed=self._seed)
        return Dossier(links, found)

    def answer(self, question: Question) -> Answer:
        """As `Method.answer`. Ranked highest are the suspects, nearest first, then the nearest other fingerprints."""
        prints = F.normalize(question.queries.features)
        verdict = judge(self.dossier, Mispredictions(prints, question.predicted))
        nearest = _ranked(prints, question.predicted, self.links, verdict.suspects.rows)
        return Answer(verdict.contributors, verdict.suspects.rows, nearest)

    def labels(self) -> LabelView:
        """As `Method.labels`."""
        found = examine(self.dossier, self._probabilities)
        return LabelView(found.suspicion, found.shares.estimate, found.shares.low, found.shares.high)


def _ranked(prints: Tensor, predicted: Tensor, links: Links, suspects: Tensor) -> Tensor:
    """Of each query the `NEAR` nearest (Q, NEAR) of the class, suspects before all others."""
    first = torch.zeros(len(links.labels)).index_fill(0, suspects, 2.0)  # cosines differ by at most two
    scores = prints @ links.fingerprints.T + first
    return torch.topk(scores.masked_fill(links.labels != predicted[:, None], -torch.inf), NEAR).indices
