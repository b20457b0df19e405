"""Sealed shards: a signed header, then one AES-GCM frame a record.

    "CALTRAIN-SHARD-1\\n" | header length (4, little endian) | header (DSSE, JSON) | frame 0 | frame 1 | ...

Every frame has the same size: `salt (32) | canonical record | tag (16)`, so a record is found by its leaf index
without an index. The frame key is derived from the contributor's data key and the shard's random id; the frame's
nonce is its leaf index; the header's digest is authenticated with each frame. Why not Parquet: see
`docs/decisions/0002-sealed-shards.md`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, BinaryIO, Literal

import msgspec

from caltrain.crypto import dsse
from caltrain.crypto.aead import TAG_BYTES, FrameCipher
from caltrain.crypto.digests import Digest, canonical_json, digest, hash_parts, to_text
from caltrain.crypto.kdf import derive
from caltrain.crypto.merkle import MerkleBuilder
from caltrain.errors import DataError, IntegrityError
from caltrain.records.commitment import SALT_BYTES, PartyName, RecordRef, ShardId, commit
from caltrain.records.schema import DataSchema

MAGIC = b"CALTRAIN-SHARD-1\n"
MAX_HEADER_BYTES = 16_384
MAX_SHARD_RECORDS = 1 << 20


class ShardHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the contributor signs about a shard."""

    version: Literal[1] = 1
    contributor: PartyName
    shard: ShardId
    schema: Digest
    records: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARD_RECORDS)]
    frame_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]
    root: Digest
    key_id: Digest

    def digest(self) -> str:
        """Digest of the header: authenticated with every frame."""
        return digest("shard-header/v1", canonical_json(self))


def key_id(data_key: bytes) -> str:
    """Public name of a data key: tells nothing of the key, and two parties' keys apart."""
    return digest("data-key-id/v1", derive(data_key, "data-key-id/v1"))


def frame_bytes(schema: DataSchema) -> int:
    """Size of one sealed record of a schema."""
    return SALT_BYTES + schema.record_bytes + TAG_BYTES


def frame_cipher(header: ShardHeader, data_key: bytes) -> FrameCipher:
    """Cipher of a shard's frames, bound to its header."""
    key = derive(data_key, "shard-frames/v1", header.contributor.encode(), bytes.fromhex(header.shard))
    return FrameCipher(key, context=header.digest().encode())


def write_shard(
    out: BinaryIO,
    *,
    signer: dsse.SigningKey,
    data_key: bytes,
    contributor: str,
    shard_id: str,
    schema: DataSchema,
    records: Iterable[bytes],
    salts: Iterable[bytes],
) -> ShardHeader:
    """Seal canonical records into `out`. `shard_id` must be fresh: it makes the frame key.

    Raises DataError `shard.empty`, `shard.duplicate-record`, `shard.too-many-records`.
    """
    rows = list(zip(salts, records, strict=True))
    _check_rows([record for _, record in rows])
    tree = MerkleBuilder()
    for leaf, (salt, record) in enumerate(rows):
        tree.append(commit(RecordRef(contributor, shard_id, leaf), salt=salt, record=record))
    header = ShardHeader(
        contributor=contributor,
        shard=shard_id,
        schema=schema.digest(),
        records=len(rows),
        frame_bytes=frame_bytes(schema),
        root=to_text(tree.root()),
        key_id=key_id(data_key),
    )
    envelope = msgspec.json.encode(signer.sign("shard-header", header))
    out.write(MAGIC + struct.pack("<I", len(envelope)) + envelope)
    out.writelines(seal_frames(header, data_key, rows))
    return header


def seal_frames(header: ShardHeader, data_key: bytes, rows: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """Yield the frames of (salt, canonical record) rows in leaf order: the inverse of `open_frames`.

    For other rows, make another header with a fresh shard id: it and the leaf index decide key and nonce.
    """
    cipher = frame_cipher(header, data_key)
    for leaf, (salt, record) in enumerate(rows):
        yield cipher.seal(leaf, salt + record)


def _check_rows(records: list[bytes]) -> None:
    if not records:
        raise DataError("shard.empty", "a shard has no records", step="seal", fix="Seal at least one record.")
    if len(records) > MAX_SHARD_RECORDS:
        raise DataError(
            "shard.too-many-records",
            f"{len(records)} records in one shard, at most {MAX_SHARD_RECORDS}",
            step="seal",
            fix="Seal into several shards.",
        )
    seen: dict[bytes, int] = {}
    for leaf, record in enumerate(records):
        first = seen.setdefault(record, leaf)  # the bytes themselves: in memory anyway, and cheaper than a digest
        if first != leaf:
            raise DataError(
                "shard.duplicate-record",
                f"records {first} and {leaf} are the same",
                step="seal",
                fix="Remove the copy, or seal with --drop-duplicates.",
            )


def record_key(record: bytes) -> bytes:
    """16 bytes that are equal for equal records: what duplicates are found by."""
    return hash_parts("record-key/v1", record)[:16]


def read_header(stream: BinaryIO, *, step: str) -> tuple[dsse.Envelope, int]:
    """The unverified header envelope at the start of a shard, and the offset of its first frame."""
    head = stream.read(len(MAGIC) + 4)
    if len(head) != len(MAGIC) + 4 or not head.startswith(MAGIC):
        raise _damaged("it does not start as a sealed shard does", step)
    (length,) = struct.unpack("<I", head[len(MAGIC) :])
    if not 0 < length <= MAX_HEADER_BYTES:
        raise _damaged(f"its header claims {length} bytes", step)
    raw = stream.read(length)
    if len(raw) != length:
        raise _damaged("it ends inside its header", step)
    return dsse.envelope_from_json(raw, step=step), len(head) + length


def open_header(envelope: dsse.Envelope, *, contributor: str, public_key: str, step: str) -> ShardHeader:
    """Verify a header under its contributor's key. Raises IntegrityError."""
    header = dsse.open_envelope(envelope, "shard-header", public_key, ShardHeader, step=step)
    if header.contributor != contributor:
        raise _damaged(f"its header names {header.contributor!r}, not {contributor!r}", step)
    return header


def open_frames(
    header: ShardHeader, data_key: bytes, chunks: Iterable[bytes], *, schema: DataSchema, step: str
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (leaf, salt, canonical record) from the shard's frames, given in chunks of any size.

    Raises IntegrityError when a frame does not authenticate or the shard is longer or shorter than its header
    says. The caller still compares the recomputed root (`MerkleBuilder`) with the header's.
    """
    if header.schema != schema.digest() or header.frame_bytes != frame_bytes(schema):
        raise _damaged("it was sealed for another schema", step)
    if header.key_id != key_id(data_key):
        raise _damaged("it was sealed under another data key than the one handed over", step)
    unseal, size, leaf = frame_cipher(header, data_key).unseal, header.frame_bytes, 0
    cut = struct.Struct(f"{size}s").iter_unpack
    split = struct.Struct(f"{SALT_BYTES}s{schema.record_bytes}s").unpack
    for run in _whole_frames(chunks, size):
        if leaf + -(-len(run) // size) > header.records:
            raise _damaged("it is longer than its header says", step)
        if len(run) % size:
            raise _damaged(f"it ends inside the frame of record {leaf}", step)
        for (frame,) in cut(run):
            salt, record = split(unseal(leaf, frame, step=step))
            yield leaf, salt, record
            leaf += 1
    if leaf != header.records:
        raise _damaged(f"it has {leaf} records, its header says {header.records}", step)


def _whole_frames(chunks: Iterable[bytes], size: int) -> Iterator[memoryview]:
    """The chunks as runs of whole frames; what is left at the end, less than a frame, comes last.

    Only a frame that lies across chunks is copied.
    """
    part = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        if part:
            missing = size - len(part)
            part += view[:missing]
            view = view[missing:]
            if len(part) < size:
                continue
            yield memoryview(part)
        whole = len(view) - len(view) % size
        if whole:
            yield view[:whole]
        part = bytearray(view[whole:])
    if part:
        yield memoryview(part)


def read_chunks(stream: BinaryIO, size: int = 1 << 20) -> Iterator[bytes]:
    """The rest of a stream in chunks of at most `size` bytes."""
    while chunk := stream.read(size):
        yield chunk


def _damaged(what: str, step: str) -> IntegrityError:
    return IntegrityError(
        "shard.damaged",
        f"a shard was refused: {what}",
        step=step,
        fix="Seal it again from the records, with the plan's schema, and send it again.",
    )
