"""What others would answer: published methods beside ours, each given more than it would have in the field.

They are told which class is asked about and, where a method needs it, how many records were planted (1 % of all where
none were): a published method is not to look worse for want of a setting. They name as many contributors as there are
culprits, those with the most records among what they hold responsible.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.questions import NEAR, Answer, LabelView, Question

_ASSUMED = 0.01


class Peer:
    """A method as `questions.Method`, by suspicion: (N,) of every record, whatever is asked."""

    def __init__(self, made: Made, *, seed: int) -> None:
        scene = made.scene
        self.seed, self.classes, self.parties = seed, scene.classes, scene.parties
        self.records, self.tests = made.records, made.tests
        self.given, self.owner = torch.from_numpy(scene.labels), torch.from_numpy(scene.owner)
        tampered = int((scene.poisoned | scene.mislabelled).sum())
        self.planted = tampered or round(_ASSUMED * len(scene.labels))
        self.culprits = max(1, len(scene.culprits))

    @cached_property
    @abstractmethod
    def suspicion(self) -> Tensor:
        """How much each record is suspected (N,)."""

    def flagged(self, label: int) -> Tensor:
        """Records of a class that are held responsible: as many of the most suspected as were planted."""
        return self._top(self.suspicion, label, self.planted)

    def answer(self, question: Question) -> Answer:
        """As `Method.answer`."""
        labels = torch.unique(question.predicted).tolist()
        suspects = torch.cat([self.flagged(label) for label in labels])
        near = {label: self._top(self.suspicion, label, NEAR) for label in labels}
        nearest = torch.stack([near[label] for label in question.predicted.tolist()])
        return Answer(self._most(suspects), suspects, nearest)

    def labels(self) -> LabelView | None:
        """As `Method.labels`."""
        return LabelView(self.suspicion)

    def _top(self, score: Tensor, label: int, count: int) -> Tensor:
        rows = (self.given == label).nonzero().squeeze(1)
        return rows[torch.argsort(score[rows], descending=True, stable=True)[:count]]

    def _most(self, rows: Tensor) -> tuple[int, ...]:
        if not len(rows):
            return ()
        counts = torch.bincount(self.owner[rows], minlength=self.parties)
        return tuple(sorted(torch.argsort(counts, descending=True, stable=True)[: self.culprits].tolist()))


class Chance(Peer):
    """Records and contributors drawn by lot."""

    @cached_property
    def suspicion(self) -> Tensor:
        """By lot."""
        return torch.rand(len(self.given), generator=torch.Generator().manual_seed(self.seed))
