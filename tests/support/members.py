"""Parties and model users in memory: honest by default, and able to send what an honest client would not."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.evidence import Binding, EvidenceBundle
from caltrain.boundary.sealed import (
    Answers,
    DisclosureNote,
    PartySecret,
    Question,
    ResumeSecret,
    open_for,
    seal_message,
    transcript_digest,
)
from caltrain.crypto.digests import hash_parts, to_text
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.crypto.merkle import merkle_root
from caltrain.plan import ManifestApproval, ManifestShard, Plan, PlanApproval, Right, RunManifest
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES, RecordRef, commit
from caltrain.records.schema import DataSchema, encode_record

Pixels = NDArray[np.generic]


@dataclass
class Shard:
    """A sealed shard with what its contributor knows of it."""

    header: shards.ShardHeader
    records: list[bytes]
    salts: list[bytes]
    raw: bytes
    listed: dict[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> ManifestShard:
        """How the party lists it: as the header says, but for `listed`."""
        honest = ManifestShard(shard=self.header.shard, root=self.header.root, records=self.header.records)
        return msgspec.structs.replace(honest, **self.listed)

    @property
    def frames_at(self) -> int:
        """Offset of the first frame."""
        return len(self.raw) - len(self.records) * self.header.frame_bytes

    def commitment(self, leaf: int) -> bytes:
        """Commitment to one record."""
        reference = RecordRef(self.header.contributor, self.header.shard, leaf)
        return commit(reference, salt=self.salts[leaf], record=self.records[leaf])


@dataclass
class Member:
    """A party or a model user."""

    name: str
    signer: SigningKey = field(default_factory=SigningKey)
    data_key: bytes = field(default_factory=lambda: os.urandom(32))
    shards: list[Shard] = field(default_factory=list)

    @property
    def entropy(self) -> bytes:
        """Always the same for a name, so that a world trains the same model each time."""
        return hash_parts("test-entropy", self.name.encode())

    def seal(self, schema: DataSchema, images: Pixels, labels: Sequence[int], *, shard_records: int) -> None:
        """Seal records into shards."""
        records = [encode_record(schema, image, label) for image, label in zip(images, labels, strict=True)]
        for start in range(0, len(records), shard_records):
            part = records[start : start + shard_records]
            salts, out = [os.urandom(SALT_BYTES) for _ in part], io.BytesIO()
            header = shards.write_shard(
                out,
                signer=self.signer,
                data_key=self.data_key,
                contributor=self.name,
                shard_id=os.urandom(16).hex(),
                schema=schema,
                records=part,
                salts=salts,
            )
            self.shards.append(Shard(header, part, salts, out.getvalue()))

    def forge(self, schema: DataSchema, records: list[bytes], /, *, place: str | None = None, **header: Any) -> Shard:
        """A shard by a modified client: any records, any header, yet signed and sealed as it should be.

        `place` is the shard id in the commitments.
        """
        shard_id, salts = place or os.urandom(16).hex(), [os.urandom(SALT_BYTES) for _ in records]
        leaves = [
            commit(RecordRef(self.name, shard_id, leaf), salt=salt, record=record)
            for leaf, (salt, record) in enumerate(zip(salts, records, strict=True))
        ]
        honest = shards.ShardHeader(
            contributor=self.name,
            shard=shard_id,
            schema=schema.digest(),
            records=len(records),
            frame_bytes=shards.frame_bytes(schema),
            root=to_text(merkle_root(leaves)),
            key_id=shards.key_id(self.data_key),
        )
        forged = msgspec.structs.replace(honest, **header)
        envelope = msgspec.json.encode(self.signer.sign("shard-header", forged))
        cipher = shards.frame_cipher(forged, self.data_key)
        frames = [cipher.seal(i, salt + record) for i, (salt, record) in enumerate(zip(salts, records, strict=True))]
        raw = shards.MAGIC + struct.pack("<I", len(envelope)) + envelope + b"".join(frames)
        return Shard(forged, records, salts, raw)

    def approve(self, plan: Plan, *, party: str | None = None) -> Envelope:
        """The first approval."""
        return self.signer.sign("plan-approval", PlanApproval(plan=plan.digest(), party=party or self.name))

    def secret(self, **changes: Any) -> PartySecret:
        """What this party provisions."""
        entries = tuple(shard.entry for shard in self.shards)
        honest = PartySecret(data_key=self.data_key, entropy=self.entropy, shards=entries)
        return msgspec.structs.replace(honest, **changes)

    def provision(self, binding: Binding, *, sender: str | None = None, **changes: Any) -> Envelope:
        """Key, entropy and shard list, sealed to the enclave of `binding`."""
        secret = self.secret(**changes)
        return seal_message("provision", secret, binding=binding, sender=sender or self.name, signer=self.signer)

    def rejoin(self, binding: Binding, *, run: str, head: str, sender: str | None = None, **changes: Any) -> Envelope:
        """The word that a restarted enclave needs."""
        secret = msgspec.structs.replace(ResumeSecret(data_key=self.data_key, run=run, head=head), **changes)
        return seal_message("rejoin", secret, binding=binding, sender=sender or self.name, signer=self.signer)

    def countersign(self, manifest: RunManifest, *, party: str | None = None) -> Envelope:
        """The second approval."""
        approval = ManifestApproval(manifest=manifest.digest(), party=party or self.name)
        return self.signer.sign("manifest-approval", approval)

    def note(self, *, run: str, commitment: str, party: str | None = None) -> Envelope:
        """The signed note that a record was disclosed."""
        note = DisclosureNote(run=run, party=party or self.name, commitment=commitment)
        return self.signer.sign("disclosure-note", note)


@dataclass(frozen=True)
class Asked:
    """A sealed question, and what its user needs to open the answer."""

    user: str
    question: Question
    bundle: EvidenceBundle
    envelope: Envelope

    def open(self, sealed: bytes) -> Answers:
        """The answer; fails unless it was sealed for this very question."""
        context = transcript_digest(self.bundle.binding, self.user)
        return open_for(self.question.answer_key, "answer/v1", sealed, Answers, context=context, step="open the answer")


def question(
    member: Member, bundle: EvidenceBundle, *, kind: Right, inputs: Pixels, sender: str | None = None, **changes: Any
) -> Asked:
    """A model user's question about `inputs` (N, C, H, W)."""
    honest = Question(kind=kind, count=len(inputs), inputs=inputs.tobytes(), answer_key=os.urandom(32))
    asked = msgspec.structs.replace(honest, **changes)
    envelope = seal_message("query", asked, binding=bundle.binding, sender=sender or member.name, signer=member.signer)
    return Asked(member.name, asked, bundle, envelope)
