"""What grows with the number of records: 16 bytes for each at ingest, 8 in a shuffle, and nothing that crosses."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.boundary.messages import MAX_CHUNK, Read, Write
from caltrain.enclave.door import Door
from caltrain.enclave.ingest import Seen
from caltrain.enclave.pool import Pool, PoolShape, smallest
from support.memory_host import MemoryHost

RECORDS = 20_000
PART = 1 << 16


def held_by(work: Callable[[], object]) -> int:
    """Bytes that are still allocated after `work`, whose result is kept."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = work()
        after = tracemalloc.get_traced_memory()[0]
        return after - before if kept is not None else 0
    finally:
        tracemalloc.stop()


def seen_of(records: int) -> Seen:
    seen = Seen()
    for number in range(records):
        seen.add(number.to_bytes(8))
    return seen


def test_ingest_holds_sixteen_bytes_of_a_record() -> None:
    grown = held_by(lambda: seen_of(2 * RECORDS)) - held_by(lambda: seen_of(RECORDS))
    assert 12 * RECORDS < grown < 20 * RECORDS


@given(st.lists(st.binary(max_size=1), min_size=1, max_size=40))
def test_the_first_repeated_record_is_found(records: list[bytes]) -> None:
    seen = Seen()
    for record in records:
        seen.add(record)
    repeated = [i for i, record in enumerate(records) if record in records[:i]]
    assert seen.repeated() == (repeated[0] if repeated else None)


@pytest.mark.parametrize(("records", "size"), [(200, 1), (60_000, 2), (100_000, 4)])
def test_an_order_takes_as_few_bytes_as_it_can(records: int, size: int) -> None:
    order = np.random.default_rng(0).permutation(records)
    assert smallest(order).itemsize == size
    assert np.array_equal(smallest(order), order)


def test_an_order_in_few_bytes_shuffles_as_any() -> None:
    shape = PoolShape.fit(200, 40, part_bytes=1000)
    assert shape.parts > 2
    order = np.random.default_rng(0).permutation(200)
    results = []
    for given_order in (order, smallest(order)):
        pool = Pool(Door(MemoryHost().enclave_channel), shape=shape)
        for number in range(200):
            pool.append(bytes([number]) * 40)
        pool.finish()
        pool.shuffle(given_order)
        results.append(pool.rows(0, 200))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0][:, 0], order)


def largest_calls(records: int) -> tuple[int, int]:
    """Bytes of the largest read and of the largest write of ingest, a shuffle and an epoch."""
    host = MemoryHost()
    shape = PoolShape.fit(records, 64, part_bytes=PART)
    pool = Pool(Door(host.enclave_channel), shape=shape)
    for number in range(records):
        pool.append(number.to_bytes(64))
    pool.finish()
    pool.shuffle(np.random.default_rng(0).permutation(records))
    for _ in pool.batches(32):
        pass
    calls = [crossing.message for crossing in host.log]
    reads = [call.length for call in calls if isinstance(call, Read)]
    writes = [len(call.data) for call in calls if isinstance(call, Write)]
    return max(reads), max(writes)


def test_no_read_or_write_grows_with_the_records() -> None:
    few, many = largest_calls(2 * PART // 64), largest_calls(20 * PART // 64)
    assert max(*few, *many) <= PART + 16 < MAX_CHUNK
    assert many[0] <= few[0]
    assert many[1] <= few[1]
