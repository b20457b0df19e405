"""Sealed segments that the host keeps, in a chain: what the linkage store writes and reads.

A segment is two objects of the host's: its sealed rows, then, once those are durable, its sealed header. A segment
without a header was never acknowledged. Each header is bound to run, generation and number, and names the one before
it; the digest of the last is the head of this little chain, which the caller keeps.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator

import msgspec

from caltrain.accountability import segments
from caltrain.accountability.segments import Batch, Columns, SegmentHeader
from caltrain.crypto.aead import KEY_BYTES, OVERHEAD, TAG_BYTES, FrameCipher, seal, unseal
from caltrain.crypto.digests import digest, same
from caltrain.crypto.kdf import derive
from caltrain.enclave.door import Door
from caltrain.errors import CaltrainError, IntegrityError, LineageError
from caltrain.records.commitment import RecordRef

_MAGIC = b"ctlink\x00\x01"
_PREFIX = struct.Struct("<8s16sIII")  # magic, run, generation, number, length of the sealed header
_PAD = 4096
STEP = "linkage store"


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it takes to open the store again, beside the head of its chain."""

    run: str
    key: bytes
    generation: int = 0

    @classmethod
    def fresh(cls, run: str) -> Place:
        """A place for the links of a run, under a key drawn now."""
        return cls(run, os.urandom(KEY_BYTES))

    @property
    def empty_head(self) -> str:
        """The head of the chain before its first segment."""
        return digest("linkage-empty/v1", bytes.fromhex(self.run), self.generation.to_bytes(4, "big"))


class SealedSegments:
    """The chain of one place. What the host has under its names beyond the chain's end is written over."""

    def __init__(self, door: Door, place: Place) -> None:
        self._door, self.place = door, place
        self.head = place.empty_head
        self.headers: list[SegmentHeader] = []

    @classmethod
    def open(cls, door: Door, place: Place, *, head: str) -> SealedSegments:
        """The chain that leads through `head`. Reads the headers only.

        What comes after `head` and is whole was on its way when the caller last looked: it counts. What is not was
        acknowledged to nobody, and is dropped. Raises LineageError `linkage.older`, `linkage.foreign`,
        `linkage.forked`, or IntegrityError `segment.damaged`, for anything else before `head`.
        """
        chain = cls(door, place)
        reached = same(chain.head, head)
        while True:
            try:
                header, after = chain._read_header(len(chain.headers))
            except (LineageError, IntegrityError) as error:
                if reached:
                    return chain
                if error.code == "linkage.missing":
                    raise _older(len(chain.headers)) from None
                raise
            chain._accept(header, after)
            reached = reached or same(after, head)

    def append(self, batch: Batch, *, model: str, time: int) -> None:
        """Add records; returns once the host says that they are durable. Raises DataError `segment.uneven`."""
        number = len(self.headers)
        header = segments.begin(batch, number=number, previous=self.head, salt=os.urandom(32), model=model, time=time)
        cipher, sums, offset = self._cipher(header), [], 0
        for index, block in enumerate(segments.pack(batch, header)):
            sealed = cipher.seal(index, block)
            last = index + 1 == header.blocks
            self._door.write(self._name(number, "-rows"), sealed, offset=offset, durable=last)
            sums.append(segments.checksum(block))
            offset += len(sealed)
        self._write_header(msgspec.structs.replace(header, sums=b"".join(sums)))

    def append_removal(self, removed: tuple[RecordRef, ...], *, model: str, time: int) -> None:
        """Note that records of the segments so far count no longer."""
        self._write_header(
            SegmentHeader(
                number=len(self.headers),
                previous=self.head,
                salt=os.urandom(32),
                model=model,
                time=time,
                removed=removed,
            )
        )

    def columns(self, number: int, labels: Collection[int]) -> Iterator[tuple[int, Columns]]:
        """The rows of these classes in a segment, block by block, none read twice: (label, rows).

        Raises LineageError `linkage.missing`, IntegrityError `segment.damaged`.
        """
        header = self.headers[number]
        places = [(label, *header.rows_of(label)) for label, _ in header.classes if label in labels]
        cipher, size = self._cipher(header), header.block * header.row_bytes + TAG_BYTES
        for index in range(header.blocks):
            first = index * header.block
            last = min(first + header.block, header.records)
            here = [
                (y, max(start, first), min(stop, last)) for y, start, stop in places if start < last and stop > first
            ]
            if here:
                length = (last - first) * header.row_bytes + TAG_BYTES
                sealed = self._fetch(number, "-rows", offset=index * size, length=length)
                rows = segments.unpack(header, index, self._unsealed(cipher, number, index, sealed))
                yield from ((label, rows.select(slice(start - first, stop - first))) for label, start, stop in here)

    def _unsealed(self, cipher: FrameCipher, number: int, index: int, sealed: bytes) -> bytes:
        try:
            return cipher.unseal(index, sealed, step=STEP)
        except IntegrityError:
            raise segments.damaged(number, f"block {index} does not authenticate") from None

    def _write_header(self, header: SegmentHeader) -> None:
        """The segment counts from here on."""
        raw = _padded(segments.encode_header(header))
        prefix = self._prefix(header.number, len(raw) + OVERHEAD)
        blob = prefix + seal(self._header_key(), raw, aad=prefix)
        self._door.write(self._name(header.number), blob, offset=0, durable=True)
        self._accept(header, digest("linkage/v1", blob))

    def _accept(self, header: SegmentHeader, head: str) -> None:
        self.headers.append(header)
        self.head = head

    def _read_header(self, number: int) -> tuple[SegmentHeader, str]:
        """The next header and the head that it makes. No byte is read twice."""
        prefix = self._fetch(number, "", offset=0, length=_PREFIX.size)
        length = int(_PREFIX.unpack(prefix)[-1])
        if prefix != self._prefix(number, length):
            raise _lineage("linkage.foreign", f"segment {number} is of another run, generation or place")
        if length > segments.MAX_HEADER + OVERHEAD + _PAD:
            raise segments.damaged(number, f"a header of {length} bytes")
        sealed = self._fetch(number, "", offset=_PREFIX.size, length=length)
        try:
            raw = _unpadded(unseal(self._header_key(), sealed, aad=prefix, step=STEP))
        except IntegrityError:
            raise segments.damaged(number, "its header does not authenticate") from None
        header = segments.decode_header(raw, number=number)
        if not same(header.previous, self.head):
            raise _lineage("linkage.forked", f"segment {number} does not follow the one before it")
        return header, digest("linkage/v1", prefix + sealed)

    def _fetch(self, number: int, what: str, *, offset: int, length: int) -> bytes:
        try:
            return self._door.read(self._name(number, what), offset=offset, length=length)
        except CaltrainError as error:
            if error.code not in {"storage.missing", "storage.short"}:
                raise
            raise _lineage("linkage.missing", f"the host has not all of segment {number}") from None

    def _prefix(self, number: int, length: int) -> bytes:
        return _PREFIX.pack(_MAGIC, bytes.fromhex(self.place.run), self.place.generation, number, length)

    def _header_key(self) -> bytes:
        return derive(self.place.key, "linkage-header/v1")

    def _cipher(self, header: SegmentHeader) -> FrameCipher:
        """A key of its own for the rows of each segment: block numbers are its nonces."""
        return FrameCipher(derive(self.place.key, "linkage-rows/v1", header.salt), context=header.previous.encode())

    def _name(self, number: int, what: str = "") -> str:
        return f"linkage-{self.place.generation}-{number}{what}"


def _padded(raw: bytes) -> bytes:
    """So that the size tells little: how many classes there are, and how large, is in a header."""
    return raw + b"\x80" + bytes(-(len(raw) + 1) % _PAD)


def _unpadded(padded: bytes) -> bytes:
    return padded[: padded.rfind(b"\x80")]


def _older(segments_there: int) -> LineageError:
    return _lineage("linkage.older", f"it ends after {segments_there} segments, before the head that was kept")


def _lineage(code: str, what: str) -> LineageError:
    return LineageError(
        code,
        f"the linkage store was refused: {what}",
        step=STEP,
        fix="Restore the host's folder from a copy that is as new as the head that was kept, or link the model again.",
    )
