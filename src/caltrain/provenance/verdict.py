"""What the enclave signs about a batch of mispredicted inputs: who is responsible, if that can be told."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Annotated

import msgspec

from caltrain.accountability.outcomes import Kind, Outcome
from caltrain.attestation.evidence import Nonce
from caltrain.boundary.sealed import MAX_QUESTIONS
from caltrain.crypto.digests import Digest, to_raw, to_text
from caltrain.crypto.merkle import merkle_root
from caltrain.errors import IntegrityError
from caltrain.exposure.figures import Estimate
from caltrain.plan import MAX_PARTIES
from caltrain.records.commitment import PartyName, RecordRef, ShardId

MAX_SUSPECTS = 1 << 16
MAX_SUSPECT_SHARDS = 1 << 12
"""With more, the signed envelope would be too large."""
MAX_REASON = 1000
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Blamed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A contributor before the verdict: its share of the blame and of the records, and how likely that is by chance.

    Shares to 0.001; the p-value, and the one corrected for having looked at all of them, upwards to 0.0001.
    """

    party: PartyName
    responsible: bool
    share_of_blame: Share
    share_of_data: Share
    p_value: Share
    adjusted: Share


class SuspectRecords(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Records of one shard, by leaf, and their commitments (32 bytes each, base64)."""

    party: PartyName
    shard: ShardId
    leaves: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=MAX_SUSPECTS)]
    commitments: Annotated[str, msgspec.Meta(max_length=44 * MAX_SUSPECTS)]

    def by_record(self) -> dict[RecordRef, str]:
        """The commitment of each record. Raises IntegrityError `verdict.malformed`."""
        try:
            raw = base64.b64decode(self.commitments, validate=True)
        except ValueError:
            raw = b""
        found = {
            RecordRef(self.party, self.shard, leaf): to_text(raw[start : start + 32])
            for leaf, start in zip(self.leaves, range(0, len(raw), 32), strict=False)
        }
        if len(found) != len(self.leaves) or len(raw) != 32 * len(self.leaves):
            raise IntegrityError(
                "verdict.malformed",
                f"shard {self.shard}: {len(raw)} bytes of commitments for {len(self.leaves)} leaves, not one for each",
                step="read verdict",
                fix="Ask again; report it.",
            )
        return found


class VerdictStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the enclave signs about a batch of mispredicted inputs (DSSE kind `verdict`).

    `input_commitment` is the Merkle root over the inputs' own commitments, in order: one of them can be shown later
    without the others. `responsible` contributors are none where the outcome is `cannot-tell`. `found` counts the
    records held responsible, `suspects` lists them, most likely first, as far as there is room; of `found`, the share
    `precision` is estimated to be so.
    """

    run: ShardId
    model: Digest
    method: Annotated[str, msgspec.Meta(max_length=40)]
    user: PartyName
    nonce: Nonce
    inputs: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUESTIONS)]
    input_commitment: Digest
    head: Digest
    predicted: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_QUESTIONS)]
    outcome: Outcome
    blamed: Annotated[tuple[Blamed, ...], msgspec.Meta(max_length=MAX_PARTIES)]
    kinds: Annotated[tuple[Kind, ...], msgspec.Meta(max_length=MAX_QUESTIONS)]
    found: Annotated[int, msgspec.Meta(ge=0)]
    suspects: Annotated[tuple[SuspectRecords, ...], msgspec.Meta(max_length=MAX_SUSPECT_SHARDS)]
    precision: Estimate
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
    audit_rate: float
    """Share of the center's steps that the enclave repeated in training; 0: center not audited."""
    resumes: int
    simulated: bool

    @property
    def responsible(self) -> tuple[str, ...]:
        """Contributors that the verdict names."""
        return tuple(b.party for b in self.blamed if b.responsible)

    def records(self) -> dict[RecordRef, str]:
        """The records that it lists, with their commitments. Raises IntegrityError `verdict.malformed`."""
        return {record: text for some in self.suspects for record, text in some.by_record().items()}


def inputs_root(commitments: Iterable[str]) -> str:
    """What a verdict says of its inputs, given the commitment of each in order."""
    return to_text(merkle_root(to_raw(text) for text in commitments))
