"""Sealed shards: what is read back is what was sealed, in its order and its place, or nothing."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES
from caltrain.crypto.merkle import merkle_root
from caltrain.errors import CaltrainError, DataError, IntegrityError
from caltrain.records import shard as shards
from caltrain.records.commitment import RecordRef, commit
from caltrain.records.schema import DataSchema
from caltrain.records.shard import (
    MAGIC,
    MAX_HEADER_BYTES,
    ShardHeader,
    frame_bytes,
    key_id,
    open_frames,
    open_header,
    read_chunks,
    read_header,
    record_key,
    write_shard,
)
from support.samples import BYTES, DATA_KEY, FLOATS, SHARD, flips, quick, records, refused, salts, sealed_shard, signer

STEP = "read shard"
ROWS = records(3)
HEADER, RAW = sealed_shard(ROWS)
SIZE = HEADER.frame_bytes
FRAMES_AT = len(RAW) - 3 * SIZE
HONEST = [(leaf, salt, row) for leaf, (salt, row) in enumerate(zip(salts(3), ROWS, strict=True))]
Row = tuple[int, bytes, bytes]


def unseal(
    raw: bytes,
    *,
    contributor: str = "alpha",
    key: str = "alpha",
    data_key: bytes = DATA_KEY,
    schema: DataSchema = BYTES,
    chunk: int = 1 << 20,
) -> Iterator[Row]:
    """The rows of a shard, as its reader takes them."""
    stream = io.BytesIO(raw)
    envelope, offset = read_header(stream, step=STEP)
    assert stream.tell() == offset
    header = open_header(envelope, contributor=contributor, public_key=signer(key).public, step=STEP)
    yield from open_frames(header, data_key, read_chunks(stream, chunk), schema=schema, step=STEP)


def until_refused(rows: Iterator[Row], code: str | None = None) -> list[Row]:
    """The rows that come before the refusal, which must come."""
    taken: list[Row] = []
    with pytest.raises(IntegrityError) as caught:
        taken.extend(rows)  # extend keeps what came before an error
    assert code in {None, caught.value.code}
    return taken


def frame(leaf: int, raw: bytes = RAW) -> bytes:
    start = len(raw) - 3 * SIZE + leaf * SIZE
    return raw[start : start + SIZE]


def with_frames(*frames: bytes) -> bytes:
    return RAW[:FRAMES_AT] + b"".join(frames)


def resigned(key: str = "alpha", frames: bytes = RAW[FRAMES_AT:], **changes: Any) -> bytes:
    """A shard whose header was changed and signed again."""
    header = msgspec.structs.replace(HEADER, **changes)
    envelope = msgspec.json.encode(signer(key).sign("shard-header", header))
    return MAGIC + struct.pack("<I", len(envelope)) + envelope + frames


# -- what is written ---------------------------------------------------------------------------------------------------


def test_known_shard() -> None:
    assert hashlib.sha256(RAW).hexdigest() == "a80833a0ca22d1e63ce1f7daa43d82890ae90fbcec8110e1e7cf5f60eb0c7146"
    assert HEADER.digest() == "sha256:b66eb98d2acbc5189c60fce87ee63d7550397197b2247c3653d59b5b1f3c9032"
    assert key_id(DATA_KEY) == "sha256:1ad919714818804d387e05cf8a39b66735b71366d1be54857a438812c1bc8f77"


def test_the_header_says_who_what_and_how_much() -> None:
    leaves = [commit(RecordRef("alpha", SHARD, leaf), salt=salt, record=row) for leaf, salt, row in HONEST]
    assert (
        ShardHeader(
            contributor="alpha",
            shard=SHARD,
            schema=BYTES.digest(),
            records=3,
            frame_bytes=32 + BYTES.record_bytes + 16,
            root="sha256:" + merkle_root(leaves).hex(),
            key_id=key_id(DATA_KEY),
        )
        == HEADER
    )
    assert frame_bytes(BYTES) == HEADER.frame_bytes


def test_no_record_and_no_salt_is_in_a_shard_in_clear() -> None:
    for _, salt, row in HONEST:
        assert salt not in RAW
        assert row not in RAW


def test_a_key_id_tells_keys_apart_and_not_the_key() -> None:
    assert key_id(DATA_KEY) != key_id(bytes(32))
    assert DATA_KEY.hex() not in key_id(DATA_KEY)


@quick
@given(st.integers(1, 20), st.integers(1, 300), st.sampled_from([BYTES, FLOATS]))
def test_round_trip_in_chunks_of_any_size(count: int, chunk: int, schema: DataSchema) -> None:
    rows = records(count, schema)
    _, raw = sealed_shard(rows, schema=schema)
    expected = [(leaf, salt, row) for leaf, (salt, row) in enumerate(zip(salts(count), rows, strict=True))]
    assert list(unseal(raw, schema=schema, chunk=chunk)) == expected


def test_empty_chunks_change_nothing() -> None:
    chunks = [b"", RAW[FRAMES_AT : FRAMES_AT + 5], b"", RAW[FRAMES_AT + 5 :], b""]
    assert list(open_frames(HEADER, DATA_KEY, chunks, schema=BYTES, step=STEP)) == HONEST


REFUSED_ROWS: dict[str, tuple[list[bytes], str]] = {
    "empty": ([], "shard.empty"),
    "a record twice": ([ROWS[0], ROWS[1], ROWS[0]], "shard.duplicate-record"),
    "too many": (records(5), "shard.too-many-records"),
}


@pytest.mark.parametrize(("rows", "code"), REFUSED_ROWS.values(), ids=REFUSED_ROWS)
def test_nothing_is_written_of_records_that_are_refused(
    rows: list[bytes], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_RECORDS", 4)
    out = io.BytesIO()
    with refused(DataError, code):
        write_shard(
            out,
            signer=signer("alpha"),
            data_key=DATA_KEY,
            contributor="alpha",
            shard_id=SHARD,
            schema=BYTES,
            records=rows,
            salts=salts(len(rows)),
        )
    assert out.getvalue() == b""


def test_a_shard_of_as_many_records_as_allowed_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_RECORDS", 4)
    assert sealed_shard(records(4))[0].records == 4


def test_equal_records_have_one_key_of_16_bytes_and_others_have_others() -> None:
    assert len({record_key(row) for row in (*ROWS, *ROWS)}) == 3
    assert {len(record_key(row)) for row in ROWS} == {16}
    assert record_key(b"record").hex() == "7cb86a755354372ba1a3ae07176a72ee"


# -- bits, lengths, order ----------------------------------------------------------------------------------------------


def test_every_flipped_bit_before_the_frames_is_refused_and_nothing_is_yielded() -> None:
    for changed in flips(RAW, 0, FRAMES_AT):
        assert until_refused(unseal(changed)) == []


def test_every_flipped_bit_of_a_frame_is_refused_and_nothing_past_it_is_yielded() -> None:
    for position, changed in enumerate(flips(RAW, FRAMES_AT)):
        leaf = position // 8 // SIZE
        assert until_refused(unseal(changed), "sealed.not-authentic") == HONEST[:leaf]


@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_every_truncation_is_refused(chunk: int) -> None:
    for length in range(len(RAW)):
        code = "shard.damaged"
        whole = max(0, length - FRAMES_AT) // SIZE
        assert until_refused(unseal(RAW[:length], chunk=chunk), code) == HONEST[:whole]


@pytest.mark.parametrize("more", [b"\0", RAW[:SIZE], frame(0), frame(2), bytes(2 * SIZE + 1)])
def test_a_longer_shard_is_refused(more: bytes) -> None:
    until_refused(unseal(RAW + more), "shard.damaged")
    assert len(until_refused(unseal(RAW + more, chunk=5), "shard.damaged")) == 3


def test_nothing_is_yielded_of_a_chunk_that_goes_past_the_end() -> None:
    assert until_refused(unseal(RAW + frame(0))) == []


OTHER_SHARD = sealed_shard(ROWS, shard="ff" * 16)[1]
OTHER_RECORDS = sealed_shard(records(4)[1:])[1]
OTHER_PARTY = sealed_shard(ROWS, contributor="beta")[1]

MOVED: dict[str, tuple[bytes, int]] = {
    "first two swapped": (with_frames(frame(1), frame(0), frame(2)), 0),
    "last two swapped": (with_frames(frame(0), frame(2), frame(1)), 1),
    "one frame twice": (with_frames(frame(0), frame(1), frame(1)), 2),
    "frame of another shard": (with_frames(frame(0), frame(1, OTHER_SHARD), frame(2)), 1),
    "frame of the same shard sealed with other records": (with_frames(frame(0), frame(1), frame(2, OTHER_RECORDS)), 2),
    "frame of another party under the same key": (with_frames(frame(0, OTHER_PARTY), frame(1), frame(2)), 0),
    "all frames of another shard": (with_frames(OTHER_SHARD[-3 * SIZE :]), 0),
}


@pytest.mark.parametrize(("raw", "good"), MOVED.values(), ids=MOVED)
def test_a_frame_at_another_place_is_refused(raw: bytes, good: int) -> None:
    assert until_refused(unseal(raw), "sealed.not-authentic") == HONEST[:good]


# -- names, keys, schemas ----------------------------------------------------------------------------------------------

ANOTHER: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "replayed under another name": (RAW, {"contributor": "beta", "key": "beta"}, "signature.invalid"),
    "replayed under another name with the same key": (RAW, {"contributor": "beta"}, "shard.damaged"),
    "signed by another": (resigned(key="beta"), {}, "signature.invalid"),
    "signed by another in our name": (resigned(key="beta"), {"contributor": "beta", "key": "beta"}, "shard.damaged"),
    "renamed and signed by another": (
        resigned(key="beta", contributor="beta"),
        {"contributor": "beta", "key": "beta"},
        "sealed.not-authentic",
    ),
    "renamed to a shard that is not there": (resigned(shard="ff" * 16), {}, "sealed.not-authentic"),
    "other root": (resigned(root=BYTES.digest()), {}, "sealed.not-authentic"),
    "other data key": (RAW, {"data_key": bytes(32)}, "shard.damaged"),
    "key id of another key": (resigned(key_id=key_id(bytes(32))), {}, "shard.damaged"),
    "data key other than its id": (resigned(key_id=key_id(bytes(32))), {"data_key": bytes(32)}, "sealed.not-authentic"),
    "other schema": (RAW, {"schema": FLOATS}, "shard.damaged"),
    "other schema of the same size": (
        RAW,
        {"schema": DataSchema(shape=(1, 3, 2), classes=BYTES.classes)},
        "shard.damaged",
    ),
    "header of another schema": (resigned(schema=FLOATS.digest()), {}, "shard.damaged"),
    "other frame size": (resigned(frame_bytes=SIZE - 1), {}, "shard.damaged"),
    "one record more": (resigned(records=4), {}, "sealed.not-authentic"),
    "other header, no frames": (resigned(frames=b""), {}, "shard.damaged"),
}


@pytest.mark.parametrize(("raw", "reader", "code"), ANOTHER.values(), ids=ANOTHER)
def test_a_shard_of_another_name_key_or_schema_is_refused(raw: bytes, reader: dict[str, Any], code: str) -> None:
    assert until_refused(unseal(raw, **reader), code) == []


def test_an_envelope_of_another_kind_is_no_header() -> None:
    envelope = signer("alpha").sign("plan-approval", HEADER)
    with refused(IntegrityError, "signature.invalid"):
        open_header(envelope, contributor="alpha", public_key=signer("alpha").public, step=STEP)


BAD_HEADERS: dict[str, dict[str, Any]] = {
    "no records": {"records": 0},
    "too many records": {"records": (1 << 20) + 1},
    "no frame": {"frame_bytes": 0},
    "endless frame": {"frame_bytes": (1 << 26) + 1},
    "another version": {"version": 2},
    "another digest": {"root": "sha512:" + "0" * 64},
    "unknown field": {"note": "x"},
}


@pytest.mark.parametrize("changes", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_signed_header_outside_the_bounds_is_refused(changes: dict[str, Any]) -> None:
    envelope = signer("alpha").sign("shard-header", msgspec.to_builtins(HEADER) | changes)
    with refused(IntegrityError, "payload.malformed"):
        open_header(envelope, contributor="alpha", public_key=signer("alpha").public, step=STEP)


# -- the start ---------------------------------------------------------------------------------------------------------

STARTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "shard.damaged"),
    "other magic": (b"CALTRAIN-SHARD-2\n" + RAW[len(MAGIC) :], "shard.damaged"),
    "Parquet": (b"PAR1" + RAW, "shard.damaged"),
    "header of no length": (MAGIC + bytes(4) + RAW, "shard.damaged"),
    "header beyond the limit": (MAGIC + struct.pack("<I", MAX_HEADER_BYTES + 1) + bytes(1 << 15), "shard.damaged"),
    "header of 4 GiB": (MAGIC + b"\xff" * 4 + RAW, "shard.damaged"),
    "header longer than the file": (MAGIC + struct.pack("<I", 16_000) + RAW, "shard.damaged"),
    "header that is no JSON": (MAGIC + struct.pack("<I", 5) + b"hello", "envelope.malformed"),
    "header as long as allowed": (
        MAGIC + struct.pack("<I", MAX_HEADER_BYTES) + bytes(MAX_HEADER_BYTES),
        "envelope.malformed",
    ),
}


@pytest.mark.parametrize(("raw", "code"), STARTS.values(), ids=STARTS)
def test_what_does_not_start_as_a_shard_is_refused(raw: bytes, code: str) -> None:
    with refused(IntegrityError, code):
        read_header(io.BytesIO(raw), step=STEP)


@quick
@given(st.binary(max_size=100))
def test_random_bytes_are_refused_as_a_start(tail: bytes) -> None:
    for raw in (tail, MAGIC + tail):
        with pytest.raises(IntegrityError):
            read_header(io.BytesIO(raw), step=STEP)


class Endless(io.RawIOBase):
    """A stream without an end that counts what is taken of it."""

    def __init__(self, start: bytes) -> None:
        self.start, self.taken = start, 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "read to the end of an endless stream"
        self.taken += size
        part, self.start = self.start[:size], self.start[size:]
        return part + bytes(size - len(part))


def test_no_more_is_read_of_an_endless_stream_than_a_header_may_take() -> None:
    stream = Endless(MAGIC + struct.pack("<I", MAX_HEADER_BYTES))
    with pytest.raises(CaltrainError):
        read_header(stream, step=STEP)  # type: ignore[arg-type]
    assert stream.taken <= len(MAGIC) + 4 + MAX_HEADER_BYTES < MAX_ENVELOPE_BYTES


def test_chunks_are_the_rest_of_the_stream() -> None:
    assert list(read_chunks(io.BytesIO(b"abcdefg"), 3)) == [b"abc", b"def", b"g"]
    assert list(read_chunks(io.BytesIO(b""))) == []
