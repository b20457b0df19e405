"""One record laid open by its contributor, or refused, and how it is checked against what was committed to."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated

import msgspec

from caltrain.crypto.digests import Digest, same, to_text
from caltrain.crypto.merkle import root_from_proof
from caltrain.errors import LineageError
from caltrain.records.commitment import SALT_BYTES, RecordRef, commit
from caltrain.records.schema import MAX_RECORD_BYTES
from caltrain.records.shard import MAX_SHARD_RECORDS

Hash = Annotated[str, msgspec.Meta(max_length=44)]


class Disclosure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Record, salt and Merkle proof (base64) of leaf `record_ref.leaf` in a shard of `records` records.

    It answers a trace of `model` (DSSE kind `disclosure`).
    """

    record_ref: RecordRef
    model: Digest
    records: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARD_RECORDS)]
    salt: Hash
    record: Annotated[str, msgspec.Meta(max_length=MAX_RECORD_BYTES * 2)]
    proof: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=64)]


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A contributor's word that it will not lay open a record that a trace of `model` names (DSSE kind `refusal`)."""

    record_ref: RecordRef
    model: Digest


def check_disclosure(disclosure: Disclosure, *, root: str, records: int, commitment: str) -> bytes:
    """The canonical bytes of a disclosed record, once they are shown to be those that were trained on.

    `root` and `records` come from the countersigned manifest, `commitment` from the enclave's trace. Raises
    LineageError `disclosure.substituted` when record or salt differ, `disclosure.not-in-shard` when the proof does, and
    `disclosure.disproves` when they are what the manifest has there, so that it is the trace that is wrong.
    """
    try:
        salt, record = (base64.b64decode(text, validate=True) for text in (disclosure.salt, disclosure.record))
        proof = [base64.b64decode(text, validate=True) for text in disclosure.proof]
    except (binascii.Error, ValueError):
        raise _refuse(disclosure, "disclosure.malformed", "it is not base64") from None
    if len(salt) != SALT_BYTES:
        raise _refuse(disclosure, "disclosure.malformed", f"a salt of {len(salt)} bytes")
    recomputed, leaf = commit(disclosure.record_ref, salt=salt, record=record), disclosure.record_ref.leaf
    if not same(to_text(recomputed), commitment):
        if _is_sealed(recomputed, root, index=leaf, size=records, proof=proof):
            raise _refuse(disclosure, "disclosure.disproves", "it is what was sealed, the trace names something else")
        raise _refuse(disclosure, "disclosure.substituted", "it is not the record that was trained on")
    if disclosure.records != records:
        raise _refuse(
            disclosure, "disclosure.not-in-shard", f"its shard has {disclosure.records} records, not {records}"
        )
    reached = root_from_proof(recomputed, index=leaf, size=records, proof=proof)
    if not same(to_text(reached), root):
        raise _refuse(disclosure, "disclosure.not-in-shard", "its proof does not lead to the root in the manifest")
    return record


def _is_sealed(commitment: bytes, root: str, *, index: int, size: int, proof: Sequence[bytes]) -> bool:
    try:
        return same(to_text(root_from_proof(commitment, index=index, size=size, proof=proof)), root)
    except LineageError:  # a proof without form proves nothing
        return False


def _refuse(disclosure: Disclosure, code: str, what: str) -> LineageError:
    reference = disclosure.record_ref
    return LineageError(
        code,
        f"the disclosure of {reference.party}/{reference.shard}/{reference.leaf} was refused: {what}",
        step="check disclosure",
        fix="Ask for what the trace names. A substitute that its contributor signed is evidence against it; what was "
        "sealed and is not what the trace names is evidence against the enclave.",
    )
