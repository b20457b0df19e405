"""From a finished demo to the report's content: pictures, and what each party did and is blamed for."""

from __future__ import annotations

import numpy as np

from caltrain.demo.compare import Finished
from caltrain.demo.disputes import Dispute
from caltrain.demo.result import DemoResult, Party, Quality, Story, TracedInput, TracedPicture
from caltrain.demo.scenario import Holding
from caltrain.demo.space import flatten
from caltrain.models.network import Network
from caltrain.records.schema import decode_record
from caltrain.reports.pictures import png


def assemble(finished: Finished, result: DemoResult, plain: Network) -> Story:
    """Everything that the report shows; `plain` is the run repeated plainly."""
    losses = [float(event.body["loss"]) for event in finished.events if event.kind == "epoch"]
    return Story(
        result=result,
        parties=tuple(_party(finished, holding) for holding in finished.scenario.holdings),
        losses=tuple(losses),
        verdict=finished.verdict,
        space=flatten(finished, plain),
        quality=tuple(_quality(finished, holding) for holding in finished.scenario.holdings),
        traced=tuple(_traced(finished, dispute, index) for index, dispute in enumerate(finished.disputes)),
        events=tuple((e.sequence, e.kind, _brief(e.body)) for e in finished.events),
        sandbox=finished.sandbox,
    )


def _party(finished: Finished, holding: Holding) -> Party:
    neighbours = [n.record.party for trace in finished.traces for n in trace.neighbours]
    own = [
        score for reference, score in finished.suspicion_of("disagreement").items() if reference.party == holding.name
    ]
    role = "hides a backdoor" if holding.poisoned.any() else "careless" if holding.mislabelled.any() else "honest"
    return Party(
        name=holding.name,
        role=role,
        records=len(holding.labels),
        poisoned=int(holding.poisoned.sum()),
        mislabelled=int(holding.mislabelled.sum()),
        blame=neighbours.count(holding.name) / max(len(neighbours), 1),
        suspicion=float(np.mean(own)),
    )


def _quality(finished: Finished, holding: Holding) -> Quality:
    return Quality(
        party=holding.name,
        wrong_labels=finished.hunts[holding.name].wrong_labels[holding.name],
        mislabelled=float(holding.mislabelled.mean()),
        planted=float(holding.poisoned.mean()),
    )


def _traced(finished: Finished, dispute: Dispute, index: int) -> TracedInput:
    scenario, schema = finished.scenario, finished.project.plan.data
    row = int(finished.traced_inputs[index])
    stamped = scenario.attack.stamp(scenario.test.images[row : row + 1])[0]
    pictures = []
    for neighbour in dispute.trace.neighbours:
        pixels, label = decode_record(schema, dispute.records[neighbour.record])
        pictures.append(
            TracedPicture(
                rank=neighbour.rank,
                party=neighbour.record.party,
                distance=neighbour.distance,
                label=schema.classes[label],
                planted=finished.lineage.is_poisoned(neighbour.record),
                png=png(pixels),
            )
        )
    return TracedInput(
        truth=schema.classes[int(scenario.test.labels[row])],
        predicted=schema.classes[dispute.trace.predicted],
        png=png(stamped),
        neighbours=tuple(pictures),
    )


def _brief(body: dict[str, object]) -> str:
    return ", ".join(f"{key}={str(value)[:26]}" for key, value in body.items())
