"""One append-only segment of the linkage store in bytes: (F, Y, S, H) of many records of one model, or a removal.

A segment is a header and rows of one size, ordered by label and cut into blocks. The header says what there is and
has a checksum of every block; a row is `fingerprint (2 D) | source (4) | leaf (4) | commitment (32)`, numbers little
endian, the fingerprint in float16 as `planes.stored` makes it, the source a place in the header's list of shards.
Keys and places of storage are for whoever keeps it (`enclave.linkage`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.accountability.planes import MAX_DIMS
from caltrain.crypto.decoders import msgpack_decoder
from caltrain.crypto.digests import Digest
from caltrain.errors import UNDECODABLE, DataError, IntegrityError
from caltrain.records.commitment import PartyName, RecordRef, ShardId

MAX_RECORDS = 1 << 27
MAX_CLASSES = 1 << 20
MAX_SOURCES = 1 << 20
MAX_REMOVED = 1 << 20
MAX_HEADER = 256 << 20
MAX_TIME = (1 << 53) - 1
_BLOCK_BYTES = 1 << 20
_BESIDE = 4 + 4 + 32
Rows = NDArray[np.uint8]
Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_RECORDS)]
Label = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Source = tuple[PartyName, ShardId]


class SegmentHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a segment holds. `time` is the caller's: of records that were added together, or of their removal."""

    version: Literal[1] = 1
    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    previous: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    model: Digest
    time: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME)]
    dims: Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMS)] = 0
    block: Annotated[int, msgspec.Meta(ge=1, le=MAX_RECORDS)] = 1
    """Rows of a block, but for the last one."""
    classes: Annotated[tuple[tuple[Label, Count], ...], msgspec.Meta(max_length=MAX_CLASSES)] = ()
    sources: Annotated[tuple[Source, ...], msgspec.Meta(max_length=MAX_SOURCES)] = ()
    sums: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORDS * 4)] = b""
    removed: Annotated[tuple[RecordRef, ...], msgspec.Meta(max_length=MAX_REMOVED)] = ()

    @property
    def records(self) -> int:
        """Rows of the segment."""
        return sum(count for _, count in self.classes)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return 2 * self.dims + _BESIDE

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.records // self.block)

    def rows_of(self, label: int) -> tuple[int, int]:
        """From which row to which the class lies; (0, 0) where it has none."""
        start = 0
        for own, count in self.classes:
            if own == label:
                return start, start + count
            start += count
        return 0, 0


@dataclass(frozen=True)
class Columns:
    """Rows taken apart: fingerprints (N, D) float16, and by row its source, leaf and commitment (N, 32)."""

    fingerprints: Tensor
    source: NDArray[np.uint32]
    leaf: NDArray[np.uint32]
    commitments: Rows

    def select(self, rows: slice | NDArray[np.bool_]) -> Columns:
        """Some of the rows."""
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        return Columns(self.fingerprints[index], self.source[rows], self.leaf[rows], self.commitments[rows])


@dataclass(frozen=True)
class Batch:
    """Records to be added together: row i has label, source and leaf i; fingerprints (N, D) as `stored` makes them."""

    fingerprints: Tensor
    labels: NDArray[np.int64]
    sources: Sequence[Source]
    source: NDArray[np.uint32]
    leaf: NDArray[np.uint32]
    commitments: Rows

    @classmethod
    def of(
        cls, fingerprints: Tensor, labels: Sequence[int], records: Sequence[RecordRef], commitments: Sequence[bytes]
    ) -> Batch:
        """From one reference and commitment a record."""
        sources = sorted({(r.party, r.shard) for r in records})
        place = {source: i for i, source in enumerate(sources)}
        return cls(
            fingerprints,
            np.array(labels, np.int64),
            sources,
            np.array([place[r.party, r.shard] for r in records], np.uint32),
            np.array([r.leaf for r in records], np.uint32),
            np.frombuffer(b"".join(commitments), np.uint8).reshape(-1, 32),
        )

    def of_label(self, label: int) -> Columns:
        """The records of a class."""
        return Columns(self.fingerprints, self.source, self.leaf, self.commitments).select(self.labels == label)


def joined(parts: Sequence[Columns]) -> Columns:
    """Rows of at least one part, one after the other."""
    return Columns(
        torch.cat([part.fingerprints for part in parts]),
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.leaf for part in parts]),
        np.concatenate([part.commitments for part in parts]),
    )


def begin(batch: Batch, *, number: int, previous: str, salt: bytes, model: str, time: int) -> SegmentHeader:
    """The header of a segment of these records, yet without checksums. Raises DataError `segment.uneven`."""
    n, dims = batch.fingerprints.shape
    columns = (batch.labels, batch.source, batch.leaf, batch.commitments)
    if not 0 < n <= MAX_RECORDS or any(len(column) != n for column in columns):
        raise _uneven(f"{[len(column) for column in columns]} entries for {n} fingerprints")
    if batch.source.max() >= len(batch.sources) or batch.labels.min() < 0:
        raise _uneven("a source or a label is not in its list")
    labels, counts = np.unique(batch.labels, return_counts=True)
    if len(batch.sources) > MAX_SOURCES or len(labels) > MAX_CLASSES or not 0 <= time <= MAX_TIME:
        raise _uneven(f"{len(batch.sources)} sources, {len(labels)} classes, at the time {time}")
    return SegmentHeader(
        number=number,
        previous=previous,
        salt=salt,
        model=model,
        time=time,
        dims=dims,
        block=max(1, _BLOCK_BYTES // (2 * dims + _BESIDE)),
        classes=tuple((int(label), int(count)) for label, count in zip(labels, counts, strict=True)),
        sources=tuple(batch.sources),
    )


def pack(batch: Batch, header: SegmentHeader) -> Iterator[bytes]:
    """The blocks of a segment of these records, in order."""
    order = np.argsort(batch.labels, kind="stable")
    for start in range(0, len(order), header.block):
        here = order[start : start + header.block]
        fingerprints = batch.fingerprints[torch.from_numpy(here)].numpy().astype("<f2")
        beside = np.stack((batch.source[here], batch.leaf[here]), axis=1).astype("<u4")
        parts = (_as_bytes(fingerprints), _as_bytes(beside), batch.commitments[here])
        yield np.concatenate(parts, axis=1).tobytes()


def checksum(block: bytes) -> bytes:
    """What the header has of each block, one after the other in `sums`."""
    return zlib.crc32(block).to_bytes(4, "little")


def unpack(header: SegmentHeader, index: int, block: bytes) -> Columns:
    """Block `index` taken apart. Raises IntegrityError `segment.damaged`."""
    rows = min(header.block, header.records - index * header.block)
    due = header.sums[4 * index : 4 * index + 4]  # none of a block that is not there
    if checksum(block) != due or len(block) != rows * header.row_bytes:
        raise damaged(header.number, f"block {index} is not the one that was written")
    table, edge = np.frombuffer(block, np.uint8).reshape(rows, -1), 2 * header.dims
    fingerprints = torch.from_numpy(_as_numbers(table[:, :edge], "<f2").astype(np.float16))
    beside = _as_numbers(table[:, edge : edge + 8], "<u4").astype(np.uint32)
    if int(beside[:, 0].max()) >= len(header.sources):
        raise damaged(header.number, f"block {index} names a source that is not listed")
    return Columns(fingerprints, beside[:, 0].copy(), beside[:, 1].copy(), table[:, edge + 8 :].copy())


def encode_header(header: SegmentHeader) -> bytes:
    """The header in bytes."""
    return msgspec.msgpack.encode(header)


def decode_header(raw: bytes, *, number: int) -> SegmentHeader:
    """Strictly: what is not a header that `pack` or a removal makes raises IntegrityError `segment.damaged`."""
    if len(raw) > MAX_HEADER:
        raise damaged(number, f"a header of {len(raw)} bytes")
    try:
        header = msgpack_decoder(SegmentHeader).decode(raw)
    except UNDECODABLE as error:
        raise damaged(number, str(error)) from None
    labels = [label for label, _ in header.classes]
    if header.number != number or sorted(set(labels)) != labels or header.records > MAX_RECORDS:
        raise damaged(number, "its number or its classes are wrong")
    if bool(header.classes) == bool(header.removed) or (header.dims == 0) != (not header.classes):
        raise damaged(number, "it neither adds nor removes records, or both")
    if len(header.sums) != 4 * header.blocks:
        raise damaged(number, f"{len(header.sums)} bytes of checksums for {header.blocks} blocks")
    return header


def _as_bytes(array: NDArray[np.generic]) -> Rows:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


def _as_numbers(rows: Rows, dtype: str) -> NDArray[np.generic]:
    return np.ascontiguousarray(rows).view(dtype)


def _uneven(what: str) -> DataError:
    return DataError(
        "segment.uneven",
        f"records do not make a segment: {what}",
        step="link records",
        fix="Give one label, source, leaf and commitment for each of at least one fingerprint.",
    )


def damaged(number: int, what: str) -> IntegrityError:
    """What a segment that is not as it was written is refused with."""
    return IntegrityError(
        "segment.damaged",
        f"segment {number} of the linkage store is damaged: {what}",
        step="read linkage",
        fix="Restore the host's copy of it from a backup, or link the model again; the other segments can be used.",
    )
