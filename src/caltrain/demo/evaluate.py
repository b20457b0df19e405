"""Figures of a finished demo, against the scenario's ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from caltrain.boundary.sealed import TraceStatement
from caltrain.demo.scenario import Holding, Scenario
from caltrain.records.commitment import RecordRef


@dataclass(frozen=True)
class Lineage:
    """Which row of which holding each sealed record is: the demo's knowledge, nobody else's."""

    rows: Mapping[RecordRef, tuple[Holding, int]]

    def is_poisoned(self, reference: RecordRef) -> bool:
        """Whether a record was planted."""
        holding, row = self.rows[reference]
        return bool(holding.poisoned[row])


def triggered_inputs(scenario: Scenario, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Test records of other classes than the target that the model gets right without the trigger."""
    labels = scenario.test.labels
    return np.flatnonzero((labels != scenario.attack.target) & (predicted == labels))


def attack_success(scenario: Scenario, predicted_triggered: NDArray[np.int64]) -> float:
    """Share of all test records of other classes that the trigger turns into the target."""
    others = scenario.test.labels != scenario.attack.target
    return float((predicted_triggered[others] == scenario.attack.target).mean())


def trace_precision(traces: list[TraceStatement], lineage: Lineage) -> float:
    """Mean share of planted records among the neighbours."""
    return float(np.mean([np.mean([lineage.is_poisoned(n.record) for n in trace.neighbours]) for trace in traces]))


def trace_contributor_accuracy(traces: list[TraceStatement], culprit: str) -> float:
    """Share of traces whose neighbours are mostly the culprit's."""
    mostly = [sum(n.record.party == culprit for n in trace.neighbours) * 2 > len(trace.neighbours) for trace in traces]
    return float(np.mean(mostly))


def mislabel_auroc(scores: Mapping[RecordRef, float], lineage: Lineage) -> float:
    """Area under the ROC curve of the suspicion scores: mislabelled records against all others.

    The planted backdoor records count as others: they are another party's doing, and another finding.
    """
    references = sorted(scores)
    truth = [bool(lineage.rows[r][0].mislabelled[lineage.rows[r][1]]) for r in references]
    return float(roc_auc_score(truth, [scores[r] for r in references]))


def culprit_of(scenario: Scenario) -> str:
    """The party that planted the backdoor."""
    return next(holding.name for holding in scenario.holdings if holding.poisoned.any())
