"""A segment's bytes say what was put in, and nothing that is otherwise is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caltrain.accountability import segments
from caltrain.accountability.segments import (
    Batch,
    SegmentHeader,
    begin,
    checksum,
    decode_header,
    encode_header,
    pack,
    unpack,
)
from caltrain.errors import DataError, IntegrityError
from caltrain.records.commitment import RecordRef
from support.links import MODEL, drawn

ABOUT: dict[str, Any] = {"number": 3, "previous": MODEL, "salt": bytes(32), "model": MODEL, "time": 7}


def made(batch: Batch) -> tuple[SegmentHeader, list[bytes]]:
    header = begin(batch, **ABOUT)
    blocks = list(pack(batch, header))
    return msgspec.structs.replace(header, sums=b"".join(map(checksum, blocks))), blocks


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), dims=st.integers(1, 40), classes=st.integers(1, 5), seed=st.integers(0, 1000))
def test_what_is_packed_comes_back(n: int, dims: int, classes: int, seed: int) -> None:
    batch, known = drawn(n, seed=seed, dims=dims, classes=classes)
    header, blocks = made(batch)
    again = decode_header(encode_header(header), number=3)
    assert again == header
    columns = segments.joined([unpack(again, i, block) for i, block in enumerate(blocks)])
    assert len(columns.leaf) == again.records == n
    for label in range(classes):
        start, stop = again.rows_of(label)
        mine = columns.select(slice(start, stop))
        found = {
            RecordRef(*again.sources[int(s)], int(leaf)): (label, h.tobytes(), f)
            for s, leaf, h, f in zip(mine.source, mine.leaf, mine.commitments, mine.fingerprints, strict=True)
        }
        expected = {reference: entry for reference, entry in known.items() if entry[0] == label}
        assert found.keys() == expected.keys()
        for reference, (_, commitment, fingerprint) in expected.items():
            assert found[reference][1] == commitment
            assert torch.equal(found[reference][2], fingerprint)


def test_rows_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_BLOCK_BYTES", 1000)
    header, blocks = made(drawn(40, seed=1)[0])
    assert (header.block, len(blocks)) == (13, 4)
    assert [len(block) for block in blocks] == [13 * 72, 13 * 72, 13 * 72, 72]


def test_a_block_with_any_bit_changed_is_refused() -> None:
    header, (block,) = made(drawn(5, seed=1)[0])
    for i in range(len(block)):
        wrong = bytearray(block)
        wrong[i] ^= 1 << (i % 8)
        with pytest.raises(IntegrityError) as raised:
            unpack(header, 0, bytes(wrong))
        assert raised.value.code == "segment.damaged"


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + raw, lambda _raw: b""])
def test_a_block_of_another_size_is_refused_though_its_checksum_is_right(change: Callable[[bytes], bytes]) -> None:
    header, (block,) = made(drawn(5, seed=1)[0])
    wrong = change(block)
    with pytest.raises(IntegrityError) as raised:
        unpack(msgspec.structs.replace(header, sums=checksum(wrong)), 0, wrong)
    assert raised.value.code == "segment.damaged"


@pytest.mark.parametrize("index", [-1, 1])
def test_a_block_that_is_not_there_is_refused(index: int) -> None:
    header, (block,) = made(drawn(5, seed=1)[0])
    with pytest.raises(IntegrityError, match=f"block {index}"):
        unpack(header, index, block)


def test_a_source_that_is_not_listed_is_refused() -> None:
    header, (block,) = made(drawn(5, seed=1)[0])
    wrong = bytearray(block)
    wrong[32] = 200
    with pytest.raises(IntegrityError, match="a source that is not listed"):
        unpack(msgspec.structs.replace(header, sums=checksum(bytes(wrong))), 0, bytes(wrong))


WRONG: dict[str, dict[str, Any]] = {
    "another number": {"number": 4},
    "another version": {"version": 2},
    "no model": {"model": "one"},
    "a short salt": {"salt": b"x"},
    "an unknown field": {"more": 1},
    "time before there was any": {"time": -1},
    "classes out of order": {"classes": [[2, 3], [1, 2]]},
    "a class twice": {"classes": [[1, 3], [1, 2]]},
    "an empty class": {"classes": [[1, 5], [2, 0]]},
    "too many records": {
        "classes": [[1, segments.MAX_RECORDS], [2, 1]],
        "block": segments.MAX_RECORDS,
        "sums": bytes(8),
    },
    "no dimensions": {"dims": 0},
    "too many dimensions": {"dims": 1 << 20},
    "checksums of other blocks": {"sums": bytes(8)},
    "records and a removal": {"removed": [{"party": "alpha", "shard": "0" * 32, "leaf": 1}]},
    "neither": {"classes": [], "dims": 0, "sums": b""},
    "a removal with dimensions": {
        "classes": [],
        "sums": b"",
        "removed": [{"party": "alpha", "shard": "0" * 32, "leaf": 1}],
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_header_is_refused(name: str) -> None:
    header, _ = made(drawn(5, seed=1)[0])
    wrong = msgspec.to_builtins(header, builtin_types=(bytes,)) | WRONG[name]
    with pytest.raises(IntegrityError) as raised:
        decode_header(msgspec.msgpack.encode(wrong), number=3)
    assert raised.value.code == "segment.damaged"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_at_random_are_no_header(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_header(raw, number=3)


def test_a_header_without_end_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_HEADER", 10)
    with pytest.raises(IntegrityError, match="a header of 11 bytes"):
        decode_header(bytes(11), number=0)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.zeros(4, np.int64)},
        {"leaf": np.zeros(6, np.uint32)},
        {"commitments": np.zeros((4, 32), np.uint8)},
        {"source": np.full(5, 9, np.uint32)},
        {"labels": np.full(5, -1)},
        {"fingerprints": torch.zeros((0, 16), dtype=torch.float16)},
    ],
)
def test_columns_that_do_not_fit_together_make_no_segment(change: dict[str, Any]) -> None:
    batch = drawn(5, seed=1)[0]
    wrong = Batch(**({name: getattr(batch, name) for name in Batch.__dataclass_fields__} | change))
    with pytest.raises(DataError) as raised:
        begin(wrong, **ABOUT)
    assert raised.value.code == "segment.uneven"


def test_no_records_make_no_segment() -> None:
    with pytest.raises(DataError) as raised:
        begin(Batch.of(torch.zeros((0, 4), dtype=torch.float16), [], [], []), **ABOUT)
    assert raised.value.code == "segment.uneven"


@pytest.mark.parametrize("bound", ["MAX_RECORDS", "MAX_CLASSES", "MAX_SOURCES"])
def test_more_than_a_header_may_list_makes_no_segment(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, bound, 1)
    with pytest.raises(DataError) as raised:
        begin(drawn(5, seed=1)[0], **ABOUT)
    assert raised.value.code == "segment.uneven"


@pytest.mark.parametrize("time", [-1, segments.MAX_TIME + 1])
def test_a_time_that_no_header_can_say_makes_no_segment(time: int) -> None:
    with pytest.raises(DataError, match="at the time"):
        begin(drawn(5, seed=1)[0], **(ABOUT | {"time": time}))
