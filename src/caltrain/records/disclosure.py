"""One record laid open by its contributor, and how it is checked against what was committed to."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec

from caltrain.crypto.digests import same, to_text
from caltrain.crypto.merkle import root_from_proof
from caltrain.errors import LineageError
from caltrain.records.commitment import SALT_BYTES, RecordRef, commit
from caltrain.records.schema import MAX_RECORD_BYTES
from caltrain.records.shard import MAX_SHARD_RECORDS

Hash = Annotated[str, msgspec.Meta(max_length=44)]


class Disclosure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Record, salt and Merkle proof (base64) of leaf `record_ref.leaf` in a shard of `records` records."""

    record_ref: RecordRef
    records: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARD_RECORDS)]
    salt: Hash
    record: Annotated[str, msgspec.Meta(max_length=MAX_RECORD_BYTES * 2)]
    proof: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=64)]


def check_disclosure(disclosure: Disclosure, *, root: str, records: int, commitment: str) -> bytes:
    """The canonical bytes of a disclosed record, once they are shown to be those that were trained on.

    `root` and `records` come from the countersigned manifest, `commitment` from the enclave's trace. Raises
    LineageError `disclosure.substituted` when record or salt differ, `disclosure.not-in-shard` when the proof does.
    """
    try:
        salt, record = (base64.b64decode(text, validate=True) for text in (disclosure.salt, disclosure.record))
        proof = [base64.b64decode(text, validate=True) for text in disclosure.proof]
    except (binascii.Error, ValueError):
        raise _refuse("disclosure.malformed", "it is not base64") from None
    if len(salt) != SALT_BYTES:
        raise _refuse("disclosure.malformed", f"a salt of {len(salt)} bytes")
    recomputed = commit(disclosure.record_ref, salt=salt, record=record)
    if not same(to_text(recomputed), commitment):
        raise _refuse("disclosure.substituted", "it is not the record that was trained on")
    if disclosure.records != records:
        raise _refuse("disclosure.not-in-shard", f"its shard has {disclosure.records} records, not {records}")
    reached = root_from_proof(recomputed, index=disclosure.record_ref.leaf, size=records, proof=proof)
    if not same(to_text(reached), root):
        raise _refuse("disclosure.not-in-shard", "its proof does not lead to the root in the manifest")
    return record


def _refuse(code: str, what: str) -> LineageError:
    return LineageError(
        code,
        f"a disclosure was refused: {what}",
        step="check disclosure",
        fix="Ask the contributor for the record that the trace names; a refusal or a substitute is itself evidence.",
    )
