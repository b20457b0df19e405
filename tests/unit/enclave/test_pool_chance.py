"""The permutation as the host stores it is uniform, and the pools do not get into each other's way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from caltrain.boundary.messages import Read, Write
from caltrain.enclave.door import Door
from caltrain.enclave.pool import Pool, PoolPlace, PoolShape
from caltrain.training.seeds import RunSeeds, epoch_order
from support.memory_host import MemoryHost

DRAWS = 480
TWENTY_FOUR = PoolShape(records=4, row_bytes=8, block=1, part=2)  # two parts: both passes of the shuffle


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def fresh(shape: PoolShape, name: str = "pool") -> tuple[MemoryHost, Pool]:
    host = MemoryHost()
    pool = Pool(Door(host.enclave_channel), shape=shape, name=name)
    for number in range(shape.records):
        pool.append(number.to_bytes(shape.row_bytes, "little"))
    pool.finish()
    return host, pool


def stored(pool: Pool) -> tuple[int, ...]:
    return tuple(int(row[0]) for row in pool.rows(0, pool.shape.records))


def test_every_permutation_is_stored_as_often_as_any_other() -> None:
    """Chi-square with 23 degrees of freedom: beyond 49.7 once in a thousand; the seeds are fixed, so it never is."""
    seen = dict.fromkeys(itertools.permutations(range(4)), 0)
    for draw in range(DRAWS):
        _, pool = fresh(TWENTY_FOUR)
        seeds = RunSeeds.from_run_seed(draw.to_bytes(32, "big"))
        pool.shuffle(epoch_order(4, seed=seeds.order, epoch=0).numpy().astype(np.int64))
        seen[stored(pool)] += 1
    assert chi_square(list(seen.values())) < 49.7


def test_where_a_record_lies_in_one_epoch_says_nothing_of_the_next() -> None:
    """Pairs (place before, place after) of one record over many epochs of one run: 16 cells, 15 degrees."""
    _, pool = fresh(TWENTY_FOUR)
    seeds, seen, before = RunSeeds.from_run_seed(bytes(32)), dict.fromkeys(itertools.product(range(4), repeat=2), 0), 0
    for epoch in range(DRAWS):
        pool.shuffle(epoch_order(4, seed=seeds.order, epoch=epoch).numpy().astype(np.int64))
        after = stored(pool).index(0)
        seen[before, after] += 1
        before = after
    assert chi_square(list(seen.values())) < 37.7


def test_a_larger_pool_spreads_every_record_over_all_places() -> None:
    shape = PoolShape(records=20, row_bytes=8, block=2, part=10)
    counts = np.zeros((20, 20), int)
    for draw in range(120):
        _, pool = fresh(shape)
        seeds = RunSeeds.from_run_seed(draw.to_bytes(32, "big"))
        pool.shuffle(epoch_order(20, seed=seeds.order, epoch=3).numpy().astype(np.int64))
        counts[np.arange(20), stored(pool)] += 1
    # (20 - 1) ** 2 = 361 degrees of freedom: mean 361, standard deviation 27
    assert chi_square(list(counts.ravel())) < 361 + 4 * 27


def test_the_pools_names_do_not_collide() -> None:
    host = MemoryHost()
    door = Door(host.enclave_channel)
    pools = [Pool(door, shape=TWENTY_FOUR, name=name) for name in ("pool", "held-out")]
    for pool in pools:
        for number in range(4):
            pool.append(number.to_bytes(8, "little"))
        pool.finish()
        pool.shuffle(np.array([3, 2, 1, 0], np.int64))
    assert [stored(pool) for pool in pools] == [(3, 2, 1, 0)] * 2
    touched = {c.message.name for c in host.log if isinstance(c.message, Read | Write)}
    assert touched == {f"{name}-{what}" for name in ("pool", "held-out") for what in ("0", "1", "cells")}


@pytest.mark.parametrize("generation", [0, 1, 7])
def test_a_pool_is_opened_again_by_its_place_and_by_no_other(generation: int) -> None:
    host, pool = fresh(TWENTY_FOUR)
    for _ in range(generation):
        pool.shuffle(np.array([1, 2, 3, 0], np.int64))
    again = Pool(Door(host.enclave_channel), shape=TWENTY_FOUR, place=pool.place)
    assert stored(again) == stored(pool)
    for place in (
        PoolPlace(generation, bytes(32)),
        PoolPlace(generation + 2, pool.place.key),
        PoolPlace(generation, pool.place.key[::-1]),
    ):
        with pytest.raises(Exception, match=r"^sealed\.not-authentic: "):
            stored(Pool(Door(host.enclave_channel), shape=TWENTY_FOUR, place=place))


def test_every_generation_has_a_key_of_its_own_that_no_seed_gives() -> None:
    keys = set()
    for _ in range(5):
        _, pool = fresh(TWENTY_FOUR)
        keys.add(pool.place.key)
        for _ in range(3):
            pool.shuffle(np.array([1, 2, 3, 0], np.int64))
            keys.add(pool.place.key)
    assert len(keys) == 20
