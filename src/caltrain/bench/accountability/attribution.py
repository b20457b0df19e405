"""Peers that attribute an answer to records: by nearness, or by gradients of the last layer."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from caltrain.accountability.attribution import GradientDot, Seen
from caltrain.bench.accountability.peer import Peer
from caltrain.bench.accountability.questions import NEAR, Answer, Question


class Fingerprints(Peer):
    """The papers' own accountability (arXiv:1812.03230): the nearest fingerprints of the class speak for all."""

    @cached_property
    def suspicion(self) -> Tensor:
        """None without a query."""
        return torch.zeros(len(self.given))

    def answer(self, question: Question) -> Answer:
        """The nine nearest of each query; all of them together are held responsible."""
        near = F.normalize(question.queries.features) @ F.normalize(self.records.features).T
        nearest = torch.topk(near.masked_fill(self.given != question.predicted[:, None], -torch.inf), NEAR).indices
        counts = torch.bincount(self.owner[nearest.flatten()], minlength=self.parties)
        named = torch.argsort(counts, descending=True, stable=True)[: self.culprits]
        return Answer(tuple(sorted(named.tolist())), torch.unique(nearest), nearest)

    def labels(self) -> None:
        """They speak of queries only."""


class Gradients(Peer):
    """TracIn (Pruthi et al. 2020, arXiv:2002.08484) with the last layer's gradients at the last checkpoint.

    A gradient of the cross-entropy is the outer product of (probabilities - label) and (features, 1), so the product of
    two gradients is that of their two parts. As for suspicion of a label, it is a record's influence on itself.
    """

    @cached_property
    def errors(self) -> Tensor:
        """Probabilities less the given label (N, C)."""
        return self.records.probabilities - F.one_hot(self.given, self.classes)

    @cached_property
    def suspicion(self) -> Tensor:
        """Influence of each record on itself."""
        return self.errors.square().sum(1) * (self.records.features.square().sum(1) + 1)

    def influence(self, question: Question) -> Tensor:
        """Of each record on each answer that is asked about (N, Q): positive where it made it likelier."""
        queries = Seen(question.queries.features, question.queries.probabilities, question.predicted)
        return GradientDot(Seen(self.records.features, self.records.probabilities, self.given)).scores(queries).T

    def answer(self, question: Question) -> Answer:
        """By influence on all queries of a class together, and on each."""
        found, predicted = self.influence(question), question.predicted
        suspects = [
            self._top(found[:, predicted == label].sum(1), label, self.planted)
            for label in torch.unique(predicted).tolist()
        ]
        nearest = [self._top(column, label, NEAR) for column, label in zip(found.T, predicted.tolist(), strict=True)]
        return Answer(self._most(torch.cat(suspects)), torch.cat(suspects), torch.stack(nearest))


class Cosines(Gradients):
    """The same gradients, each of length one: a record that was learned well still counts (Barshan et al. 2020)."""

    def influence(self, question: Question) -> Tensor:
        """Cosine of each record's gradient and each answer's (N, Q)."""
        asked = question.queries.probabilities - F.one_hot(question.predicted, self.classes)
        errors = F.normalize(self.errors, eps=1e-30) @ F.normalize(asked, eps=1e-30).T
        return errors * (F.normalize(self.records.features) @ F.normalize(question.queries.features).T)


class Trak(Gradients):
    """TRAK (Park et al. 2023, arXiv:2303.14186) on the last layer, where its features need no projection."""

    @cached_property
    def leaning(self) -> Tensor:
        """Inverse of the features' second moments (D, D), held away from zero."""
        x = self.records.features
        moments = x.T @ x
        inverse: Tensor = torch.linalg.inv(moments + 1e-3 * moments.diagonal().mean() * torch.eye(len(moments)))
        return inverse

    @cached_property
    def doubts(self) -> Tensor:
        """One less the probability of the given label (N,)."""
        return 1 - self.records.probabilities.gather(1, self.given[:, None])[:, 0]

    @cached_property
    def suspicion(self) -> Tensor:
        """Influence of each record on itself."""
        x = self.records.features
        return self.doubts * ((x @ self.leaning) * x).sum(1)

    def influence(self, question: Question) -> Tensor:
        """As published, for one model: of each record on each answer (N, Q)."""
        return self.doubts[:, None] * (self.records.features @ self.leaning @ question.queries.features.T)
