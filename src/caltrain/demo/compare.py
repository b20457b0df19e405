"""What the processes of a demo left behind, beside plain PyTorch on the same records and seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.boundary.sealed import Scan, SuspicionReport, TraceStatement
from caltrain.demo import evaluate
from caltrain.demo.disputes import Dispute
from caltrain.demo.evaluate import Lineage
from caltrain.demo.result import DemoResult
from caltrain.demo.scenario import Scenario
from caltrain.models.network import Network
from caltrain.participant.model import load_model, predict
from caltrain.plan import RunManifest
from caltrain.project import Project
from caltrain.provenance.chain import Event
from caltrain.provenance.verdict import VerdictStatement
from caltrain.records.commitment import RecordRef
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds


@dataclass(frozen=True)
class Finished:
    """Model, answers and chain, with the scenario that they are measured against."""

    project: Project
    scenario: Scenario
    manifest: RunManifest
    lineage: Lineage
    run_folder: Path
    run_seed: bytes
    predicted: NDArray[np.int64]
    predicted_triggered: NDArray[np.int64]
    traced_inputs: NDArray[np.int64]
    traces: list[TraceStatement]
    verdict: VerdictStatement
    hunts: dict[str, SuspicionReport]
    disputes: list[Dispute]
    events: tuple[Event, ...]
    sandbox: dict[str, str]

    def suspicion_of(self, *scans: Scan) -> dict[RecordRef, float]:
        """Of every record the highest score by these scans of the hunt, 0 to 1: all parties' reports put together."""
        return evaluate.suspicion(self.hunts, scans)


def train_plainly(finished: Finished) -> Network:
    """The plain loop on the same records in the manifest's order, with the seed that the enclave revealed."""
    rows = finished.lineage.rows
    refs = [*finished.manifest.references()]
    plan = finished.project.plan
    return train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=torch.from_numpy(np.stack([rows[r][0].images[rows[r][1]] for r in refs])),
        labels=torch.from_numpy(np.array([rows[r][0].labels[rows[r][1]] for r in refs])),
        seeds=RunSeeds.from_run_seed(finished.run_seed),
    )


def figures(finished: Finished, plain: Network, *, data: str, seconds: float, report: Path) -> DemoResult:
    """All figures of the demo."""
    scenario, plan = finished.scenario, finished.project.plan
    plain_predicted = predict(plain, plan, scenario.test.images).argmax(1)
    plain_triggered = predict(plain, plan, scenario.attack.stamp(scenario.test.images)).argmax(1)
    ours = load_model(finished.run_folder).module.state_dict()
    traced = [[n.record for n in trace.neighbours] for trace in finished.traces]
    disputes, named = finished.disputes, finished.verdict.records()
    return DemoResult(
        data=data,
        records=scenario.records,
        form=plan.partition.form,
        simulated=finished.manifest.simulated,
        accuracy=evaluate.accuracy(scenario, finished.predicted),
        plain_accuracy=evaluate.accuracy(scenario, plain_predicted),
        weights_identical=evaluate.same_weights(ours, plain.state_dict()),
        attack_success=evaluate.attack_success(scenario, finished.predicted_triggered),
        plain_attack_success=evaluate.attack_success(scenario, plain_triggered),
        poison_share=scenario.poison_share,
        triggered_inputs=len(traced),
        trace_precision_at_9=evaluate.trace_precision(traced, finished.lineage),
        trace_contributor_accuracy=evaluate.trace_contributor_accuracy(traced, scenario.culprit),
        culprit=scenario.culprit,
        mislabel_auroc=evaluate.mislabel_auroc(finished.suspicion_of("disagreement"), finished.lineage),
        verdict_contributors=finished.verdict.responsible,
        verdict_records=finished.verdict.found,
        verdict_precision=evaluate.poison_precision(named, finished.lineage),
        verdict_recall=evaluate.poison_recall(named, finished.lineage),
        disclosures=sum(len(d.trace.neighbours) for d in disputes),
        disclosures_verified=sum(len(d.records) for d in disputes),
        substitutions=sum(d.substitutes for d in disputes),
        substitutions_refused=sum(d.refused for d in disputes),
        center_audited=plan.center.audit_rate > 0,
        audit_rate=plan.center.audit_rate,
        events=len(finished.events),
        chain_head=finished.events[-1].digest(),
        model=finished.traces[0].model,
        seconds=round(seconds, 1),
        report=str(report),
    )
