"""Peers that look for wrong labels."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from caltrain.accountability.neighbours import label_disagreement
from caltrain.bench.accountability.peer import Peer
from caltrain.bench.accountability.questions import LabelView

_FOLDS = 5
_NEIGHBOURS = 15


class Neighbours(Peer):
    """The share of a record's nearest fingerprints, of whatever label, that have another label than it."""

    @cached_property
    def suspicion(self) -> Tensor:
        """As `accountability.neighbours.label_disagreement`."""
        return label_disagreement(F.normalize(self.records.features), self.given, k=_NEIGHBOURS)


class Confident(Peer):
    """Confident learning (Northcutt et al. 2021, arXiv:1911.00068), by `cleanlab`.

    Class probabilities are out of fold, by logistic regression over fingerprints.
    """

    @cached_property
    def out_of_fold(self) -> NDArray[np.float64]:
        """Class probabilities (N, C) of every record by a regression that has not seen it."""
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
        from sklearn.model_selection import StratifiedKFold, cross_val_predict  # noqa: PLC0415

        folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=self.seed)
        prints = F.normalize(self.records.features).numpy() * 8
        regression = LogisticRegression(max_iter=300, tol=1e-3)
        found = cross_val_predict(regression, prints, self.given.numpy(), cv=folds, method="predict_proba")
        return np.asarray(found, np.float64)

    @cached_property
    def suspicion(self) -> Tensor:
        """One less the quality that cleanlab gives a label, by self-confidence."""
        from cleanlab.rank import get_label_quality_scores  # noqa: PLC0415

        quality = get_label_quality_scores(self.given.numpy(), self.out_of_fold, method="self_confidence")
        return torch.from_numpy(1 - quality).float()

    @cached_property
    def issues(self) -> Tensor:
        """Records that cleanlab calls wrongly labelled, as a mask (N,)."""
        from cleanlab.filter import find_label_issues  # noqa: PLC0415

        return torch.from_numpy(find_label_issues(self.given.numpy(), self.out_of_fold, n_jobs=1))

    def flagged(self, label: int) -> Tensor:
        """Its issues among the class."""
        return ((self.given == label) & self.issues).nonzero().squeeze(1)

    def labels(self) -> LabelView:
        """Suspicion, and each contributor's share of issues."""
        shares = [self.issues[self.owner == party].double().mean() for party in range(self.parties)]
        return LabelView(self.suspicion, torch.stack(shares))
