"""What is counted as noticed was noticed: a reader that checks nothing shows every attack as harmful or harmless."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from caltrain.bench.tampering import Attack, Specimen, Tampering, parquet_specimen, shard_specimen, tamper
from caltrain.bench.ways import random_rows, schema_of
from caltrain.errors import CaltrainError, ConfigError
from support.samples import refused

SIZE = 16
ROWS, OTHERS = (random_rows(SIZE, 8, seed=seed) for seed in (2, 3))
PADDING = bytes(40)
UNITS = ((40, 4), (44, 4), (48, 4))


def unchecked(raw: bytes) -> list[bytes]:
    return [raw[start : start + length] for start, length in UNITS]


def blind(read: Callable[[bytes], list[bytes]] = unchecked, units: tuple[tuple[int, int], ...] = UNITS) -> Specimen:
    """Forty bytes that mean nothing and three units of four bytes."""
    raw, sibling = PADDING + b"one.two.six.", PADDING + b"uno.duo.sex."
    return Specimen(
        format="blind",
        raw=raw,
        units=units,
        sibling=sibling,
        sibling_units=UNITS,
        records=unchecked(raw),
        read=read,
        refusals=CaltrainError,
    )


def by_attack(outcomes: tuple[Tampering, ...]) -> dict[Attack, Tampering]:
    return {outcome.attack: outcome for outcome in outcomes}


def test_a_reader_that_checks_nothing_notices_nothing() -> None:
    found = by_attack(tamper(blind(), positions=2))
    assert set(found) == {"flip", "truncate", "swap", "splice", "replay"}
    assert [outcome.noticed for outcome in found.values()] == [0] * 5
    assert (found["flip"].harmless, found["flip"].wrong) == (40, 12)  # 52 bytes, the ends of 32 bytes overlap
    assert (found["swap"].wrong, found["splice"].wrong, found["replay"].wrong) == (3, 3, 1)
    assert found["truncate"].wrong == found["truncate"].tried > 0
    assert all(o.tried == o.noticed + o.harmless + o.wrong for o in found.values())


def test_every_attack_changes_the_file() -> None:
    honest = blind()
    seen: list[bytes] = []

    def watch(raw: bytes) -> list[bytes]:
        seen.append(raw)
        return []

    tamper(blind(watch), positions=30)
    assert honest.raw not in seen
    assert len(seen) == len(set(seen))


def test_flips_reach_every_byte_where_that_many_positions_are_asked_for() -> None:
    shard = shard_specimen(schema_of(SIZE), ROWS, OTHERS)
    few, all_ = (by_attack(tamper(shard, positions=count))["flip"].tried for count in (2, len(shard.raw)))
    assert few == 64
    assert all_ == len(shard.raw)


def test_a_sealed_shard_notices_everything() -> None:
    for outcome in tamper(shard_specimen(schema_of(SIZE), ROWS, OTHERS), positions=400):
        assert outcome.tried == outcome.noticed > 0, outcome


def test_parquet_lets_its_magic_be_changed_and_with_key_management_the_whole_file() -> None:
    direct, kms = (
        by_attack(tamper(parquet_specimen(keys, ROWS, OTHERS, group=2), positions=2)) for keys in ("direct", "kms")
    )
    assert direct["flip"].harmless >= 4
    assert direct["flip"].wrong == kms["flip"].wrong == 0
    assert (direct["replay"].noticed, direct["replay"].wrong) == (1, 0)
    assert (kms["replay"].noticed, kms["replay"].wrong) == (0, 1)
    for attack in ("truncate", "swap", "splice"):
        assert direct[attack].noticed == direct[attack].tried > 0
        assert kms[attack].noticed == kms[attack].tried > 0


def test_an_error_without_a_name_is_not_taken_for_a_refusal() -> None:
    def crash(_: bytes) -> list[bytes]:
        raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        tamper(blind(crash), positions=2)


def test_units_that_cannot_change_places_are_refused() -> None:
    with refused(ConfigError, "bench.units"):
        tamper(blind(units=((40, 4), (44, 5), (49, 3))), positions=2)
