"""Disclose one record: its bytes, salt and inclusion proof, signed by its contributor; or refuse to, signed as well."""

from __future__ import annotations

import base64
from typing import Any

from caltrain.boundary.sealed import DisclosureNote
from caltrain.crypto.digests import to_text
from caltrain.crypto.dsse import Envelope
from caltrain.crypto.merkle import inclusion_proof
from caltrain.errors import LineageError
from caltrain.host_client import HostClient
from caltrain.participant.identity import Identity
from caltrain.participant.seal import read_own_header, shard_path
from caltrain.plan import Plan
from caltrain.records import shard as shards
from caltrain.records.commitment import RecordRef, commit
from caltrain.records.disclosure import Disclosure, Refusal
from caltrain.records.shown import seal_disclosure


def disclose(identity: Identity, plan: Plan, reference: RecordRef, *, model: str) -> tuple[Envelope, str]:
    """The signed disclosure of one of our records, for a trace of `model`, and the record's commitment.

    Sealed (DSSE kind `sealed-disclosure`) where the plan names who may read it, else plain (`disclosure`).

    Raises LineageError `disclose.no-such-record`, IntegrityError when our own shard is damaged.
    """
    path = shard_path(identity, reference.shard)
    if reference.party != identity.name or not path.is_file():
        raise _no_such(reference, identity.name)
    step = f"read {path.name}"
    commitments: list[bytes] = []
    found: tuple[bytes, bytes] | None = None
    header = read_own_header(identity, path)
    with path.open("rb") as file:
        shards.read_header(file, step=step)
        chunks = shards.read_chunks(file)
        for leaf, salt, record in shards.open_frames(header, identity.data_key, chunks, schema=plan.data, step=step):
            commitments.append(commit(RecordRef(identity.name, header.shard, leaf), salt=salt, record=record))
            if leaf == reference.leaf:
                found = salt, record
    if found is None:
        raise _no_such(reference, identity.name)
    salt, record = found
    disclosure = Disclosure(
        record_ref=reference,
        model=model,
        records=header.records,
        salt=base64.b64encode(salt).decode(),
        record=base64.b64encode(record).decode(),
        proof=tuple(base64.b64encode(p).decode() for p in inclusion_proof(commitments, reference.leaf)),
    )
    signed, commitment = identity.signer.sign("disclosure", disclosure), to_text(commitments[reference.leaf])
    readers = {reader.name: reader.encryption_key for reader in plan.trace.disclose_to}
    if readers:
        sealed = seal_disclosure(signed, reference, model=model, readers=readers)
        signed = identity.signer.sign("sealed-disclosure", sealed)
    return signed, commitment


def refuse(identity: Identity, reference: RecordRef, *, model: str) -> Envelope:
    """Our signed word (DSSE kind `refusal`) that we will not disclose a record that a trace of `model` names.

    Raises LineageError `disclose.no-such-record` for another party's.
    """
    if reference.party != identity.name:
        raise _no_such(reference, identity.name)
    return identity.signer.sign("refusal", Refusal(record_ref=reference, model=model))


def note_disclosure(host: HostClient, identity: Identity, *, run: str, commitment: str) -> None:
    """Have the enclave put into the chain that we disclosed the record of this commitment."""
    note = DisclosureNote(run=run, party=identity.name, commitment=commitment)
    envelope = identity.signer.sign("disclosure-note", note)
    host.post(f"/v1/parties/{identity.name}/disclosure", envelope, dict[str, Any])


def _no_such(reference: RecordRef, name: str) -> LineageError:
    return LineageError(
        "disclose.no-such-record",
        f"{name} has no record {reference.party}/{reference.shard}/{reference.leaf}",
        step="disclose",
        fix="Name a record of a shard that this party sealed and still keeps.",
    )
