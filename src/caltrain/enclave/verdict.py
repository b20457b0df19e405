"""A verdict: who is responsible for a batch of mispredictions, from all links and the witnesses, signed.

The model's own features say which records are near; the witnesses, who never saw it, what is in them. So a contributor
is not named for a model that somebody else changed.
"""

from __future__ import annotations

import base64
import math

import msgspec
import torch
from torch import Tensor

from caltrain.accountability.cases import Mispredictions, Verdict
from caltrain.accountability.verdict import judge
from caltrain.boundary.sealed import Answers
from caltrain.crypto.dsse import Envelope
from caltrain.enclave.evidence import evidence
from caltrain.enclave.linkage import Table
from caltrain.enclave.run import Run, present
from caltrain.errors import UNCOMPUTABLE, DataError
from caltrain.exposure.figures import Estimate
from caltrain.provenance.verdict import (
    MAX_REASON,
    MAX_SUSPECT_SHARDS,
    MAX_SUSPECTS,
    Blamed,
    SuspectRecords,
    VerdictStatement,
    inputs_root,
)

METHOD = "nearest-and-witnesses/v2"
# How much of a signed verdict is what, in bytes of JSON, rounded up.
_FIXED, _A_PARTY, _AN_INPUT, _A_SHARD, _A_RECORD = 4096, 256, 48, 192, 64


def verdict(
    run: Run, embeddings: Tensor, *, predicted: tuple[int, ...], user: str, nonce: str, inputs: list[str]
) -> Envelope:
    """Judge mispredicted inputs, given their embeddings (Q, D) and commitments; signed.

    Raises DataError `linkage.too-large`, `verdict.not-computable`.
    """
    all_ = evidence(run)
    table, dossier = all_.table, all_.dossier
    try:
        found = judge(dossier, Mispredictions(embeddings, torch.tensor(predicted)))
    except UNCOMPUTABLE:
        raise DataError(
            "verdict.not-computable",
            "the figures of a verdict on these inputs cannot be worked out",
            step="verdict",
            fix="Ask about fewer or other inputs; traces of them can be had.",
        ) from None
    statement = VerdictStatement(
        run=run.vault.run,
        model=run.model_digest,
        method=METHOD,
        user=user,
        nonce=nonce,
        inputs=len(inputs),
        input_commitment=inputs_root(inputs),
        head=run.chain.head,
        predicted=predicted,
        outcome=found.outcome,
        blamed=_blamed(found, dossier.links.contributors),
        kinds=found.kinds,
        found=len(found.suspects.rows),
        suspects=_suspects(table, found.suspects.rows),
        precision=_precision(found),
        reason=found.reason[:MAX_REASON],
        audit_rate=run.audit_rate,
        resumes=run.resumes,
        simulated=run.vault.attester.simulated,
    )
    return run.vault.signing.sign("verdict", statement)


def padded(run: Run, answers: Answers) -> Answers:
    """The answer, as long as any to so many inputs of this run: neither names nor numbers of suspects show in it."""
    manifest = present(run.manifest)
    shards = sum(len(party.shards) for party in manifest.parties)
    room = room_for(len(answers.predicted), parties=len(manifest.parties), shards=shards, records=run.records)
    return msgspec.structs.replace(answers, padding=bytes(room - len(msgspec.msgpack.encode(answers))))


def room_for(inputs: int, *, parties: int, shards: int, records: int) -> int:
    """Bytes that are enough for any answer with a verdict, and for padding that takes a head of one size."""
    statement = (
        _FIXED
        + _A_PARTY * parties
        + _AN_INPUT * inputs
        + _A_SHARD * min(shards, MAX_SUSPECT_SHARDS)
        + _A_RECORD * min(records, MAX_SUSPECTS)
    )
    return statement * 4 // 3 + (1 << 17)  # in base64


def _blamed(found: Verdict, contributors: tuple[str, ...]) -> tuple[Blamed, ...]:
    return tuple(
        Blamed(
            party=contributors[blame.contributor],
            responsible=blame.contributor in found.contributors,
            share_of_blame=round(blame.share_of_blame, 3),
            share_of_data=round(blame.share_of_data, 3),
            p_value=_upwards(blame.p_value),
            adjusted=_upwards(blame.adjusted),
        )
        for blame in found.blames
    )


def _upwards(p_value: float) -> float:
    """To four digits, never below 0.0001: nobody is accused by rounding, and small differences tell nothing."""
    return min(1.0, max(1, math.ceil(p_value * 10_000)) / 10_000)


def _precision(found: Verdict) -> Estimate:
    suspects = found.suspects
    value, low, high = (round(float(x), 3) for x in (suspects.precision, suspects.low, suspects.high))
    return Estimate(value, low, high, len(suspects.rows))


def _suspects(table: Table, rows: Tensor) -> tuple[SuspectRecords, ...]:
    """By shard, in the order of their first record: the first of the rows, as many as a statement holds."""
    by_shard: dict[int, list[int]] = {}
    for row in rows[:MAX_SUSPECTS].tolist():
        source = int(table.source[row])
        if source in by_shard or len(by_shard) < MAX_SUSPECT_SHARDS:
            by_shard.setdefault(source, []).append(row)
    return tuple(
        SuspectRecords(
            party=table.shards[source][0],
            shard=table.shards[source][1],
            leaves=tuple(int(table.leaf[row]) for row in own),
            commitments=base64.b64encode(table.commitments[own].tobytes()).decode(),
        )
        for source, own in by_shard.items()
    )
