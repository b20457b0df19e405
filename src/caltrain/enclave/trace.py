"""Traces: the records behind a prediction, ranked and signed, with no more precision than the plan allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F

from caltrain.accountability.attribution import Seen
from caltrain.accountability.reference import NOTHING, Reference, in_steps
from caltrain.boundary.sealed import Neighbour, Question, TraceStatement
from caltrain.crypto.digests import to_text
from caltrain.crypto.dsse import Envelope
from caltrain.enclave.linkage import Hit, Where
from caltrain.enclave.opinion import opinions
from caltrain.enclave.run import Run, present
from caltrain.plan import TraceSpec

_LONGEST = 2.0  # between vectors of length one


def traces(
    run: Run, question: Question, asked: Seen, *, where: Where, user: str, nonce: str, inputs: Sequence[str]
) -> tuple[Envelope, ...]:
    """One signed trace for each input, given what the model makes of it, and its commitment."""
    labels = asked.labels.tolist()
    # Clean queries were asked about their own class and all contributors: they say nothing of other questions.
    own = question.method == "fingerprint" and not (question.any_label or question.contributors)
    compared = [run.references.get(label, NOTHING) if own else NOTHING for label in labels]
    named = (
        _nearest(run, question, asked, where, compared)
        if question.method == "fingerprint"
        else opinions(run, question, asked, where)
    )
    return tuple(
        run.vault.signing.sign(
            "trace",
            TraceStatement(
                run=run.vault.run,
                model=run.model_digest,
                user=user,
                nonce=nonce,
                index=index,
                input_commitment=inputs[index],
                head=run.chain.head,
                predicted=label,
                any_label=question.any_label,
                contributors=question.contributors,
                neighbours=named[index],
                basis=compared[index].basis,
                references=compared[index].count,
                audit_rate=run.audit_rate,
                resumes=run.resumes,
                simulated=run.vault.attester.simulated,
                method=question.method,
            ),
        )
        for index, label in enumerate(labels)
    )


def _nearest(
    run: Run, question: Question, asked: Seen, where: Where, compared: Sequence[Reference]
) -> list[tuple[Neighbour, ...]]:
    """For each input the nearest records, inside its predicted class unless any counts: fewer where fewer count."""
    store, model, k = present(run.linkage), run.model_digest, present(run.plan).trace.neighbours
    embeddings, predicted = F.normalize(asked.features, dim=1), asked.labels.tolist()
    found: list[Sequence[Hit]] = [()] * len(predicted)
    wanted = [None if question.any_label else own for own in predicted]
    for label in set(wanted):
        labels = store.labels(model) if label is None else (label,)
        of_label = [i for i, own in enumerate(wanted) if own == label]
        there = min(k, sum(store.count(model, each, where=where) for each in labels))
        if there:
            hits = store.nearest(embeddings[of_label], model=model, labels=labels, k=there, where=where)
            for i, own_hits in zip(of_label, hits, strict=True):
                found[i] = own_hits
    references = [run.references.get(label, NOTHING) for label in predicted]
    spec = present(run.plan).trace
    return [
        _named(hits, reference, other, spec) for hits, reference, other in zip(found, references, compared, strict=True)
    ]


def _named(hits: Sequence[Hit], reference: Reference, compared: Reference, spec: TraceSpec) -> tuple[Neighbour, ...]:
    """Distances hide behind those of clean queries of the class, whatever they are compared with."""
    distances = [_told(rank, hit, reference, spec) for rank, hit in enumerate(hits, 1)]
    return tuple(
        Neighbour(
            rank=rank,
            record=hit.record,
            label=hit.label,
            distance=round(told * spec.distance_step, 6),
            commitment=to_text(hit.commitment),
            unusual=compared.unusual(rank, told),
        )
        for rank, (hit, told) in enumerate(zip(hits, distances, strict=True), 1)
    )


def _told(rank: int, hit: Hit, reference: Reference, spec: TraceSpec) -> int:
    """A distance in steps of the plan; whether it is that of a copy or of what is merely alike does not show."""
    steps, most = in_steps(hit.distance, spec.distance_step), in_steps(_LONGEST, spec.distance_step)
    return reference.told(rank, steps, floor=spec.distance_floor, most=most)
