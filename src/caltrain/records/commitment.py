"""The salted commitment to one record (H of the linkage structure, arXiv:1812.03230 section 2.4 of our notes).

H = SHA-256(domain, salt, contributor, shard, leaf, canonical record). The salt (32 bytes, secret until
disclosure) keeps a small record space from being searched; the place binds the record to where it was sealed,
so the same record elsewhere has another commitment.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from caltrain.crypto.digests import hash_parts

SALT_BYTES = 32

ShardId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
PartyName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,39}\Z")]
Leaf = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class RecordRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """What a record is called outside its contributor: (party, shard, leaf), never its own identifier."""

    party: PartyName
    shard: ShardId
    leaf: Leaf


def commit(ref: RecordRef, *, salt: bytes, record: bytes) -> bytes:
    """Commitment (32 raw bytes) to the canonical bytes of the record at `ref`."""
    place = (ref.party.encode(), bytes.fromhex(ref.shard), ref.leaf.to_bytes(8, "big"))
    return hash_parts("record/v1", salt, *place, record)
