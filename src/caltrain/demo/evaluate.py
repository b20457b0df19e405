"""Figures of a finished demo, against the scenario's ground truth."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from caltrain.boundary.sealed import Scan, SuspicionReport
from caltrain.demo.scenario import Holding, Scenario
from caltrain.records.commitment import RecordRef

Traced = Sequence[Sequence[RecordRef]]
"""For each traced input its neighbours, nearest first."""


@dataclass(frozen=True)
class Lineage:
    """Which row of which holding each sealed record is: the demo's knowledge, nobody else's."""

    rows: Mapping[RecordRef, tuple[Holding, int]]

    def is_poisoned(self, reference: RecordRef) -> bool:
        """Whether a record was planted."""
        holding, row = self.rows[reference]
        return bool(holding.poisoned[row])

    def is_mislabelled(self, reference: RecordRef) -> bool:
        """Whether a record was given a wrong label by carelessness."""
        holding, row = self.rows[reference]
        return bool(holding.mislabelled[row])


def same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same tensors by name, each with the same shape, element type and bits."""
    return ours.keys() == theirs.keys() and all(_same_bits(ours[name], theirs[name]) for name in ours)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # Bytes, not values: 0.0 equals -0.0, and a NaN not even itself.
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def accuracy(scenario: Scenario, predicted: NDArray[np.int64]) -> float:
    """Share of the test set that was predicted right."""
    return float((predicted == scenario.test.labels).mean())


def triggered_inputs(scenario: Scenario, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Test records of other classes than the target that the model gets right without the trigger."""
    labels = scenario.test.labels
    return np.flatnonzero((labels != scenario.attack.target) & (predicted == labels))


def attack_success(scenario: Scenario, predicted_triggered: NDArray[np.int64]) -> float:
    """Share of all test records of other classes that the trigger turns into the target."""
    others = scenario.test.labels != scenario.attack.target
    return float((predicted_triggered[others] == scenario.attack.target).mean())


def trace_precision(traced: Traced, lineage: Lineage) -> float:
    """Mean share of planted records among the neighbours."""
    return float(np.mean([np.mean([lineage.is_poisoned(r) for r in neighbours]) for neighbours in traced]))


def trace_contributor_accuracy(traced: Traced, culprit: str) -> float:
    """Share of traces whose neighbours are mostly the culprit's."""
    return float(np.mean([sum(r.party == culprit for r in rows) * 2 > len(rows) for rows in traced]))


def poison_precision(named: Collection[RecordRef], lineage: Lineage) -> float | None:
    """Share of the records that a verdict names that were planted; None where it names none."""
    return sum(map(lineage.is_poisoned, named)) / len(named) if named else None


def poison_recall(named: Collection[RecordRef], lineage: Lineage) -> float:
    """Share of the planted records that a verdict names."""
    planted = [r for r in lineage.rows if lineage.is_poisoned(r)]
    return sum(r in named for r in planted) / len(planted)


def suspicion(hunts: Mapping[str, SuspicionReport], scans: Sequence[Scan]) -> dict[RecordRef, float]:
    """Of every record that was trained on the highest score by these scans, from all parties' reports."""
    scores: dict[RecordRef, float] = {}
    for party, report in hunts.items():
        for scan in scans:
            for shard in report.scores[scan]:
                for leaf, score in enumerate(report.of(shard, scan=scan)):
                    if score is not None:
                        reference = RecordRef(party, shard, leaf)
                        scores[reference] = max(scores.get(reference, 0.0), score / 1000)
    return scores


def mislabel_auroc(scores: Mapping[RecordRef, float], lineage: Lineage) -> float:
    """Area under the ROC curve of the suspicion scores: mislabelled records against all others.

    The planted backdoor records count as others: they are another party's doing, and another finding.
    """
    references = sorted(scores)
    truth = [lineage.is_mislabelled(r) for r in references]
    return float(roc_auc_score(truth, [scores[r] for r in references]))
