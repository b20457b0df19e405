"""Find needles in haystacks of hundreds of megabytes: every stretch of a needle that is long enough to be no accident.

A haystack is looked at eight bytes at a time, at every eighth byte; of a needle every window of eight bytes is known.
So whatever stretch of at least 15 bytes a haystack holds, one of its words is a window of the needle. From there the
stretch is followed in both directions, and counts if it is as long as the needle asks for and not monotonous.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

_TABLE_BITS = 27
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 16  # words looked at together: what fits into a processor's cache
_ENOUGH = 200  # findings in one haystack: who leaks this much need not be counted further
_ONE = 0x3F800000  # 1.0 as float32
_PACKED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")
_NUMBER = re.compile(rb"\d+")
_INFLATED = 1 << 20


@dataclass(frozen=True)
class Needle:
    """Bytes that must not be found: `kind` says what they are, `name` which, `least` what stretch counts."""

    kind: str
    name: str
    data: bytes
    least: int = 16
    distinct: int = 8


@dataclass(frozen=True)
class Hit:
    """`length` bytes from `start` of a needle lie at `offset` of a haystack."""

    needle: Needle
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class LabelVector:
    """Labels in an order that the run used; found wherever `least` of them follow each other."""

    name: str
    labels: NDArray[np.int64]
    classes: int
    least: int = 16


def _distinct(data: Bytes, count: int) -> NDArray[np.uint8]:
    """How many different bytes each of the first `count` windows of eight bytes has."""
    total = np.ones(count, np.uint8)
    for late in range(1, 8):
        new = np.ones(count, bool)
        for early in range(late):
            new &= data[late : late + count] != data[early : early + count]
        total += new
    return total


def _hash(words: Words, bits: int) -> Words:
    mixed: Words = (words * _MULTIPLIER) >> np.uint64(64 - bits)
    return mixed


class Index:
    """All windows of all needles, but for those with fewer than `variety` different bytes."""

    def __init__(self, needles: Iterable[Needle], *, variety: int = 4, table_bits: int = _TABLE_BITS) -> None:
        self.needles = [needle for needle in needles if len(needle.data) >= max(needle.least, 8)]
        self._ends = np.cumsum([0, *(len(needle.data) for needle in self.needles)], dtype=np.int64)[1:]
        self._buffer = np.frombuffer(b"".join(needle.data for needle in self.needles), np.uint8)
        count = max(len(self._buffer) - 7, 0)
        starts = np.flatnonzero(_distinct(self._buffer, count) >= variety)
        keys: Words = np.ndarray(count, "<u8", self._buffer.data, strides=(1,))[starts]
        order = np.argsort(keys)
        self._keys, self._starts = keys[order], starts[order]
        self._never = ~np.bitwise_or.reduce(keys, initial=np.uint64(0))  # bits that no window has
        self._bits = table_bits
        table = np.zeros(1 << table_bits, bool)
        table[_hash(keys, table_bits)] = True
        self._table = np.packbits(table, bitorder="little")

    def search(self, data: bytes | memoryview) -> list[Hit]:
        """Where the needles are in `data`, each needle once."""
        hay = np.frombuffer(data, np.uint8)
        found: dict[int, Hit] = {}
        for offset, word in self._candidates(hay):
            lo, hi = (int(np.searchsorted(self._keys, word, side)) for side in ("left", "right"))
            for start in self._starts[lo:hi]:
                number = int(np.searchsorted(self._ends, start, "right"))
                if number not in found and (hit := self._follow(hay, offset, int(start), number)):
                    found[number] = hit
            if len(found) >= _ENOUGH:
                break
        return list(found.values())

    def _candidates(self, hay: Bytes) -> Iterator[tuple[int, np.uint64]]:
        """(offset, word) of every word of the haystack that is a window of a needle."""
        words: Words = hay[: len(hay) - len(hay) % 8].view("<u8")
        for first in range(0, len(words) if len(self._keys) else 0, _BLOCK):
            block = words[first : first + _BLOCK]
            at = np.flatnonzero((block & self._never == 0) & (block != 0))
            slots = _hash(block[at], self._bits)
            at = at[(self._table[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8)) & 1 != 0]
            near = np.searchsorted(self._keys, block[at]).clip(max=len(self._keys) - 1)
            for i in at[self._keys[near] == block[at]]:
                yield 8 * (first + int(i)), block[i]

    def _follow(self, hay: Bytes, offset: int, start: int, number: int) -> Hit | None:
        """The stretch round a window that both have, if it counts."""
        needle = self.needles[number]
        begin = int(self._ends[number]) - len(needle.data)
        back = min(start - begin, offset)
        ahead = min(int(self._ends[number]) - start, len(hay) - offset)
        same = self._buffer[start - back : start + ahead] == hay[offset - back : offset + ahead]
        (other,) = np.nonzero(~same)
        before = other[other < back]
        left = int(before[-1]) + 1 if len(before) else 0
        after = other[other >= back]
        right = int(after[0]) if len(after) else len(same)
        stretch = hay[offset - back + left : offset - back + right]
        if len(stretch) < needle.least or len(np.unique(stretch)) < needle.distinct:
            return None
        return Hit(needle, start - back + left - begin, offset - back + left, len(stretch))


class LabelIndex:
    """Finds label vectors as u8, i16, i32, i64 and f32 arrays and as one-hot f32 matrices, at any offset."""

    def __init__(self, vectors: Sequence[LabelVector]) -> None:
        self._vectors = {vector.name: vector for vector in vectors}
        options = {"variety": 3, "table_bits": 20}
        plain = [self._needle(v, v.labels) for v in vectors]
        self._plain = Index(plain, **options)
        # In a one-hot matrix the ones of successive rows lie `classes + next - this` elements apart.
        gaps = [self._needle(v, v.classes + np.diff(v.labels), least=v.least - 1) for v in vectors]
        self._gaps = Index(gaps, **options)
        # The upper half of a float32 tells a label; everything that is none becomes 255.
        self._of_float = np.full(1 << 16, 255, np.uint8)
        for label in range(max((v.classes for v in vectors), default=0)):
            self._of_float[np.float32(label).view(np.uint32) >> 16] = label

    @staticmethod
    def _needle(vector: LabelVector, values: NDArray[np.int64], *, least: int | None = None) -> Needle:
        return Needle("labels", vector.name, values.astype(np.uint8).tobytes(), least or vector.least, distinct=3)

    def search(self, data: bytes | memoryview) -> list[Hit]:
        """Where the label vectors are in `data`, one hit for each vector and form."""
        hay = np.frombuffer(data, np.uint8)
        hits: list[Hit] = []
        for width, dtype in ((1, "u1"), (2, "<i2"), (4, "<i4"), (8, "<i8"), (4, "<f4")):
            for shift in range(width):
                whole = hay[shift : len(hay) - (len(hay) - shift) % width]
                hits += self._arrays(hay, whole, shift, np.dtype(dtype))
        for shift in range(4):
            hits += self._one_hot(hay, shift)
        return hits

    def _arrays(self, hay: Bytes, whole: Bytes, shift: int, dtype: np.dtype[np.generic]) -> Iterator[Hit]:
        width = dtype.itemsize
        floats = dtype.kind == "f"
        column = self._of_float[whole.view("<u2")[1::2]] if floats else np.ascontiguousarray(whole[::width])
        for hit in self._plain.search(column.data):
            labels = np.frombuffer(hit.needle.data, np.uint8)[hit.start : hit.start + hit.length]
            yield from self._verified(hay, hit, shift + hit.offset * width, labels.astype(dtype).tobytes(), dtype.str)

    def _one_hot(self, hay: Bytes, shift: int) -> Iterator[Hit]:
        floats = hay[shift : len(hay) - (len(hay) - shift) % 4].view("<u4")
        (ones,) = np.nonzero(floats == _ONE)
        for hit in self._gaps.search(np.diff(ones).clip(max=255).astype(np.uint8).data):
            vector = self._vectors[hit.needle.name]
            labels = vector.labels[hit.start : hit.start + hit.length + 1]
            matrix = np.eye(vector.classes, dtype="<f4")[labels]
            first = shift + 4 * (int(ones[hit.offset]) - int(labels[0]))
            yield from self._verified(hay, hit, first, matrix.tobytes(), "one-hot f4")

    @staticmethod
    def _verified(hay: Bytes, hit: Hit, offset: int, raw: bytes, form: str) -> Iterator[Hit]:
        if offset >= 0 and hay[offset : offset + len(raw)].tobytes() == raw:
            yield Hit(Needle("labels", f"{hit.needle.name} as {form}", raw), hit.start, offset, len(raw))


def inflated(data: bytes | memoryview, *, raw: bool = False) -> bytes:
    """All that can be inflated out of `data`, one after the other: zlib and gzip streams wherever they begin.

    With `raw`, `data` itself is taken for a deflate stream without a head.
    """
    view = memoryview(data)
    found = [_inflate(view[match.start() :], 47) for match in _PACKED.finditer(view)]
    if raw:
        found.append(_inflate(view, -15))
    return (b"\0" * 16).join(piece for piece in found if len(piece) >= 16)


def _inflate(view: memoryview, window: int) -> bytes:
    """What a stream gives until it ends, breaks, or reaches a mebibyte."""
    stream, out = zlib.decompressobj(window), bytearray()
    for start in range(0, min(len(view), _INFLATED), 512):
        try:
            out += stream.decompress(view[start : start + 512])
        except zlib.error:
            break
        if stream.eof or len(out) > _INFLATED:
            break
    return bytes(out)


def decimals(data: bytes | memoryview) -> bytes:
    """The decimal numbers in a text as bytes, however it separates them: what `print(pixels)` leaves."""
    return bytes(min(int(match.group()[:4]), 255) for match in _NUMBER.finditer(memoryview(data)))
