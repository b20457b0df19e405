"""The pool: the permutation is exact, the host sees the same accesses whatever it is, and nothing altered opens."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from caltrain.boundary.messages import Answer, Data, Read, Write
from caltrain.crypto.aead import FrameCipher
from caltrain.enclave import pool as pool_module
from caltrain.enclave.door import Door
from caltrain.enclave.pool import Pool, PoolShape, Rows
from caltrain.errors import CaltrainError, IntegrityError, ProtocolError
from support.memory_host import MemoryHost

Order = NDArray[np.int64]
Access = tuple[str, str, int, int]
ONE_PART = PoolShape(records=50, row_bytes=24, block=8, part=64)
FOUR_PARTS = PoolShape(records=250, row_bytes=24, block=8, part=64)
SHAPES = {
    "one part": ONE_PART,
    "one part, exactly full": PoolShape(64, 24, 8, 64),
    "one record": PoolShape(1, 24, 8, 64),
    "four parts": FOUR_PARTS,
    "four parts, exactly full": PoolShape(256, 24, 8, 64),
    "last part of one record": PoolShape(193, 24, 8, 64),
    "blocks of one record": PoolShape(100, 5, 1, 20),
    "a part is a block": PoolShape(100, 24, 25, 25),
    "more parts than records of a part": PoolShape(100, 8, 4, 8),
}


def rows_of(shape: PoolShape, *, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(0, 256, (shape.records, shape.row_bytes)).astype(np.uint8)


def order_of(shape: PoolShape, seed: int) -> Order:
    return np.random.default_rng(seed).permutation(shape.records).astype(np.int64)


def filled(shape: PoolShape, rows: Rows | None = None) -> tuple[MemoryHost, Pool]:
    host = MemoryHost()
    pool = Pool(Door(host.enclave_channel), shape=shape)
    for row in rows_of(shape) if rows is None else rows:
        pool.append(row.tobytes())
    pool.finish()
    return host, pool


def content(pool: Pool) -> Rows:
    return pool.rows(0, pool.shape.records)


def accesses(host: MemoryHost) -> list[Access]:
    """Everything that the host sees of the pool's use: operation, object, offset, length."""
    seen: list[Access] = []
    for crossing in host.log:
        match crossing.message:
            case Read(name, offset, length):
                seen.append(("read", name, offset, length))
            case Write(name, offset, data):
                seen.append(("write", name, offset, len(data)))
    return seen


# --- the permutation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_generation_is_the_one_before_in_the_order_that_was_given(shape: PoolShape) -> None:
    expected = rows_of(shape)
    _, pool = filled(shape, expected)
    assert np.array_equal(content(pool), expected)
    for generation in range(5):
        order = order_of(shape, generation)
        pool.shuffle(order)
        expected = expected[order]
        assert np.array_equal(content(pool), expected)
    assert pool.generation == 5


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 120), st.integers(1, 40), st.integers(100, 1200), st.integers(0, 99))
def test_no_combination_of_sizes_loses_or_moves_a_record(
    records: int, row_bytes: int, part_bytes: int, seed: int
) -> None:
    shape = PoolShape.fit(records, row_bytes, part_bytes=part_bytes)
    rows, order = rows_of(shape, seed=seed), order_of(shape, seed)
    _, pool = filled(shape, rows)
    pool.shuffle(order)
    assert np.array_equal(content(pool), rows[order])


@pytest.mark.parametrize("shape", [ONE_PART, FOUR_PARTS])
def test_rows_are_read_from_the_block_on_where_they_start(shape: PoolShape) -> None:
    rows = rows_of(shape)
    _, pool = filled(shape, rows)
    for start in range(0, shape.records, shape.block):
        for stop in range(start + 1, min(start + 20, shape.records) + 1):
            assert np.array_equal(pool.rows(start, stop), rows[start:stop])


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 20, 49, 50])
def test_batches_are_full_in_order_and_across_the_borders_of_blocks(size: int) -> None:
    rows = rows_of(ONE_PART)
    _, pool = filled(ONE_PART, rows)
    batches = list(pool.batches(size))
    assert [len(batch) for batch in batches] == [size] * (50 // size)
    assert np.array_equal(np.concatenate(batches), rows[: 50 // size * size])


def test_a_batch_larger_than_the_pool_is_none() -> None:
    _, pool = filled(ONE_PART)
    assert list(pool.batches(51)) == []


# --- what the host sees ----------------------------------------------------------------------------------------


def watched_epochs(shape: PoolShape, seeds: list[int], *, rows_seed: int = 0) -> list[Access]:
    host, pool = filled(shape, rows_of(shape, seed=rows_seed))
    host.log.clear()
    for seed in seeds:
        pool.shuffle(order_of(shape, seed))
        assert sum(len(batch) for batch in pool.batches(16)) == shape.records // 16 * 16
    return accesses(host)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_host_sees_the_same_accesses_whatever_the_order_and_the_records(shape: PoolShape) -> None:
    seen = watched_epochs(shape, [1, 2, 3])
    assert seen
    for seeds, rows_seed in (([4, 5, 6], 0), ([7, 8, 9], 1), ([1, 1, 1], 2)):
        assert watched_epochs(shape, seeds, rows_seed=rows_seed) == seen


def test_a_shuffle_goes_through_each_object_in_order_and_touches_every_byte_once() -> None:
    host, pool = filled(FOUR_PARTS)
    host.log.clear()
    pool.shuffle(order_of(FOUR_PARTS, 1))
    seen = accesses(host)
    for op, name in (("read", "pool-0"), ("write", "pool-cells"), ("write", "pool-1")):
        place = 0
        for _, _, offset, length in (access for access in seen if access[:2] == (op, name)):
            assert offset == place
            place += length
        assert place == len(host.storage[name])
    cells = [access[2:] for access in seen if access[:2] == ("read", "pool-cells")]
    assert sorted(cells) == [access[2:] for access in seen if access[:2] == ("write", "pool-cells")]


def test_no_record_lies_in_the_hosts_storage_in_clear_and_no_two_generations_look_alike() -> None:
    shape = PoolShape(250, 24, 8, 64)
    rows = np.tile(rows_of(shape)[:1], (shape.records, 1))  # all the same, so only the encryption can tell them apart
    host, pool = filled(shape, rows)
    ciphertexts = []
    for generation in range(4):
        for stored in host.storage.values():
            assert rows[0].tobytes()[:8] not in stored
        ciphertexts.append(bytes(host.storage[f"pool-{generation % 2}"]))
        pool.shuffle(order_of(shape, generation))
    blocks = [text[i : i + 208] for text in ciphertexts for i in range(0, len(text) - 208, 208)]
    assert len(set(blocks)) == len(blocks)


def test_no_key_seals_two_frames_under_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame's number is its AES-GCM nonce: a second frame under it would give both away."""
    used: set[tuple[bytes, int]] = set()

    class Watched(FrameCipher):
        def __init__(self, key: bytes, *, context: bytes) -> None:
            super().__init__(key, context=context)
            self.key = key

        def seal(self, index: int, plaintext: bytes | memoryview) -> bytes:
            assert (self.key, index) not in used
            used.add((self.key, index))
            return super().seal(index, plaintext)

    monkeypatch.setattr(pool_module, "FrameCipher", Watched)
    _, pool = filled(FOUR_PARTS)
    for seed in range(3):
        pool.shuffle(order_of(FOUR_PARTS, seed))
    assert len(used) == 4 * 32 + 3 * 20, "four generations of blocks, three of cells"


# --- what the host may do --------------------------------------------------------------------------------------

BLOCK = 8 * 24 + 16
CELL = FOUR_PARTS.cell * (8 + 24) + 16
Attack = Callable[[bytearray], None]


def flip(at: int) -> Attack:
    def attack(stored: bytearray) -> None:
        stored[at] ^= 1

    return attack


def swap(size: int) -> Attack:
    def attack(stored: bytearray) -> None:
        stored[:size], stored[size : 2 * size] = stored[size : 2 * size], stored[:size]

    return attack


def repeat(size: int) -> Attack:
    def attack(stored: bytearray) -> None:
        stored[size : 2 * size] = stored[:size]

    return attack


def zero(size: int) -> Attack:
    def attack(stored: bytearray) -> None:
        stored[:size] = bytes(size)

    return attack


def cut(stored: bytearray) -> None:
    del stored[-1:]


def test_the_sizes_that_the_attacks_are_aimed_with_are_those_of_the_pool() -> None:
    host, pool = filled(FOUR_PARTS)
    pool.shuffle(order_of(FOUR_PARTS, 0))
    assert len(host.storage["pool-0"]) == 31 * BLOCK + 2 * 24 + 16
    assert len(host.storage["pool-cells"]) == 4 * 5 * CELL
    assert len(filled(PoolShape(256, 24, 8, 64))[0].storage["pool-0"]) == 32 * BLOCK, "no empty block at the end"


@pytest.mark.parametrize("generation", [0, 1, 2])
@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (flip(0), "sealed.not-authentic"),
        (flip(BLOCK - 1), "sealed.not-authentic"),
        (flip(-1), "sealed.not-authentic"),
        (swap(BLOCK), "sealed.not-authentic"),
        (repeat(BLOCK), "sealed.not-authentic"),
        (zero(BLOCK), "sealed.not-authentic"),
        (cut, "storage.short"),
        (bytearray.clear, "storage.short"),
    ],
    ids=["first bit", "a tag", "last tag", "swapped", "repeated", "zeroed", "truncated", "emptied"],
)
def test_an_altered_block_is_refused_and_no_generation_follows(generation: int, attack: Attack, code: str) -> None:
    host, pool = filled(FOUR_PARTS)
    for seed in range(generation):
        pool.shuffle(order_of(FOUR_PARTS, seed))
    attack(host.storage[f"pool-{generation % 2}"])
    with pytest.raises(CaltrainError, match=rf"^{code}: .*\(step: read"):
        content(pool)
    with pytest.raises(CaltrainError, match=rf"^{code}: "):
        list(pool.batches(16))
    with pytest.raises(CaltrainError, match=rf"^{code}: "):
        pool.shuffle(order_of(FOUR_PARTS, 9))
    assert pool.generation == generation


@pytest.mark.parametrize("shape", [ONE_PART, FOUR_PARTS])
def test_a_block_of_an_older_generation_is_refused_in_a_newer(shape: PoolShape) -> None:
    host, pool = filled(shape)
    old = bytes(host.storage["pool-0"])
    for seed in range(2):
        pool.shuffle(order_of(shape, seed))
    fresh = bytes(host.storage["pool-0"])
    assert len(fresh) == len(old)
    host.storage["pool-0"][:BLOCK] = old[:BLOCK]
    with pytest.raises(IntegrityError, match=r"^sealed\.not-authentic: "):
        content(pool)
    host.storage["pool-0"][:] = fresh
    content(pool)


def test_a_block_that_was_not_overwritten_is_refused() -> None:
    host, pool = filled(FOUR_PARTS)
    pool.shuffle(order_of(FOUR_PARTS, 0))
    honest, writes = host.write, 0

    def lazy(call: Write) -> Answer:
        nonlocal writes
        writes += call.name == "pool-0"
        return Data() if call.name == "pool-0" and writes == 5 else honest(call)

    host.on_write = lazy
    pool.shuffle(order_of(FOUR_PARTS, 1))
    with pytest.raises(IntegrityError, match=r"^sealed\.not-authentic: .*\(step: read pool\)"):
        content(pool)


def test_another_pools_blocks_are_refused() -> None:
    host, pool = filled(FOUR_PARTS)
    other, _ = filled(FOUR_PARTS)
    host.storage["pool-0"][:] = other.storage["pool-0"]
    with pytest.raises(IntegrityError, match=r"^sealed\.not-authentic: "):
        content(pool)


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (flip(0), "sealed.not-authentic"),
        (flip(-1), "sealed.not-authentic"),
        (swap(CELL), "sealed.not-authentic"),
        (repeat(CELL), "sealed.not-authentic"),
        (zero(CELL), "sealed.not-authentic"),
        (cut, "storage.short"),
    ],
    ids=["first bit", "last tag", "swapped", "repeated", "zeroed", "truncated"],
)
def test_a_cell_altered_between_the_passes_is_refused_and_no_generation_follows(attack: Attack, code: str) -> None:
    host, pool = filled(FOUR_PARTS)
    between_the_passes(host, attack)
    with pytest.raises((IntegrityError, ProtocolError), match=rf"^{code}: "):
        pool.shuffle(order_of(FOUR_PARTS, 0))
    assert pool.generation == 0


def test_cells_of_an_older_shuffle_are_refused() -> None:
    host, pool = filled(FOUR_PARTS)
    pool.shuffle(order_of(FOUR_PARTS, 0))
    old = bytes(host.storage["pool-cells"])

    def replay(stored: bytearray) -> None:
        stored[:CELL] = old[:CELL]

    between_the_passes(host, replay)
    with pytest.raises(IntegrityError, match=r"^sealed\.not-authentic: .*\(step: shuffle pool\)"):
        pool.shuffle(order_of(FOUR_PARTS, 1))
    assert pool.generation == 1


def between_the_passes(host: MemoryHost, attack: Attack) -> None:
    honest, done = host.read, False

    def read(call: Read) -> Answer:
        nonlocal done
        if call.name == "pool-cells" and not done:
            done = True
            attack(host.storage["pool-cells"])
        return honest(call)

    host.on_read = read


# --- sizes -----------------------------------------------------------------------------------------------------


def test_an_order_that_does_not_fit_the_cells_is_an_error_and_writes_no_generation() -> None:
    shape = PoolShape(1920, 8, 64, 192)
    host, pool = filled(shape)
    assert 2 * shape.cell < shape.part, "if all stay in place, the last bucket gets a part in two cells"
    with pytest.raises(IntegrityError, match=r"^pool\.overflow: "):
        pool.shuffle(np.arange(shape.records))
    assert pool.generation == 0
    assert "pool-1" not in host.storage
    assert np.array_equal(content(pool), rows_of(shape))


def test_what_does_not_fit_a_cell_waits_for_the_next() -> None:
    shape = PoolShape(400, 4, 4, 100)
    stay = shape.cell + 10
    assert stay < shape.part, "the first part sends its first bucket more than a cell holds"
    rest = np.random.default_rng(0).permutation(np.arange(stay, shape.records))
    order = np.concatenate((np.arange(stay), rest)).astype(np.int64)
    _, pool = filled(shape)
    pool.shuffle(order)
    assert np.array_equal(content(pool), rows_of(shape)[order])


@settings(deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 1 << 22), st.integers(1, 64 << 20))
def test_the_sizes_that_are_chosen_hold_together(records: int, row_bytes: int, part_bytes: int) -> None:
    shape = PoolShape.fit(records, row_bytes, part_bytes=part_bytes)
    assert shape.part % shape.block == 0
    assert 1 <= shape.block <= shape.part
    assert (shape.parts - 1) * shape.part < records <= shape.parts * shape.part
    assert 1 <= shape.cell <= shape.part
    assert shape.cell * (shape.parts + 1) >= shape.part, "even a bucket's cells together cannot hold it"
    assert shape.block * row_bytes <= max(1 << 20, row_bytes)
    assert shape.part * row_bytes <= max(part_bytes, row_bytes, 4 * math.isqrt(records) * row_bytes)
    assert shape.parts <= max(1, shape.part), "the padding of the cells would outgrow the pool"


PART = 1 << 17


def peak_of_a_shuffle(records: int) -> int:
    """Most bytes held inside while a generation is written and read; the host's storage is not counted."""
    shape = PoolShape.fit(records, 1024, part_bytes=PART)
    host, pool = filled(shape, np.zeros((records, 1024), np.uint8))
    order = order_of(shape, 0)
    pool.shuffle(order)
    pool.shuffle(order)  # the host now has all its objects, so it allocates no more

    def forget() -> None:
        host.log.clear()
        host.end.sent.clear()
        host.enclave_end.sent.clear()

    def read(call: Read) -> Answer:
        forget()
        return host.read(call)

    def write(call: Write) -> Answer:
        forget()
        return host.write(call)

    host.on_read, host.on_write = read, write
    forget()
    tracemalloc.start()
    try:
        pool.shuffle(order)
        for _ in pool.batches(64):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_memory_of_a_shuffle_does_not_grow_with_the_records() -> None:
    small, large = peak_of_a_shuffle(512), peak_of_a_shuffle(4096)
    # 3584 records of 1 KiB more; what may grow is a few integers for each of them.
    assert large - small < 3584 * 64
    assert large < 12 * PART
