"""What a reader of sealed files notices: damage a file in every way that a host can, and count.

"Noticed" is an error. What is not noticed is `harmless` where the records came out as they were (the file is
malleable, which matters to whoever names files by their bytes), and `wrong` where other records came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import msgspec

from caltrain.bench.formats import EncryptedParquet, KeyUse, Row, SealedShards
from caltrain.errors import CaltrainError, ConfigError
from caltrain.records.schema import DataSchema

Attack = Literal["flip", "truncate", "swap", "splice", "replay"]
_ENDS = 32  # formats keep magic and lengths at their ends: every byte there is flipped


class Tampering(msgspec.Struct, frozen=True, kw_only=True):
    """How one format fared under one attack: `tried` = `noticed` + `harmless` + `wrong`."""

    format: str
    attack: Attack
    tried: int
    noticed: int
    harmless: int
    wrong: int


Units = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Specimen:
    """A sealed file, a sibling of the same owner and key, and how the file is read: `read` raises what it notices.

    Units are what a file is made of, as (offset, length): frames, or row groups.
    """

    format: str
    raw: bytes
    units: Units
    sibling: bytes
    sibling_units: Units
    records: list[bytes]
    read: Callable[[bytes], list[bytes]]
    refusals: type[Exception]


def shard_specimen(schema: DataSchema, rows: Sequence[Row], others: Sequence[Row]) -> Specimen:
    """A sealed shard. Only named errors count as refusals: another one is a defect, and comes through."""
    shards = SealedShards(schema)
    (raw, header), (sibling, other) = shards.write(rows), shards.write(others)
    return Specimen(
        format="shard",
        raw=raw,
        units=shards.units(raw, header),
        sibling=sibling,
        sibling_units=shards.units(sibling, other),
        records=[record for _, record in rows],
        read=lambda damaged: list(shards.read(damaged, header)),
        refusals=CaltrainError,
    )


def parquet_specimen(keys: KeyUse, rows: Sequence[Row], others: Sequence[Row], *, group: int) -> Specimen:
    """An encrypted Parquet file. pyarrow refuses with errors of many kinds: any counts."""
    parquet = EncryptedParquet(group=group, keys=keys)
    raw, sibling = parquet.write(rows, name="first"), parquet.write(others, name="second")
    return Specimen(
        format=f"parquet-{keys}",
        raw=raw,
        units=parquet.units(raw, name="first"),
        sibling=sibling,
        sibling_units=parquet.units(sibling, name="second"),
        records=[record for _, record in rows],
        read=lambda damaged: list(parquet.read(damaged, name="first")),
        refusals=Exception,
    )


def tamper(specimen: Specimen, *, positions: int) -> tuple[Tampering, ...]:
    """Try every attack; bits are flipped at `positions` places spread over the file, and all over its ends."""
    attacks: dict[Attack, Iterator[bytes]] = {
        "flip": _flipped(specimen.raw, positions),
        "truncate": _truncated(specimen),
        "swap": _swapped(specimen),
        "splice": _spliced(specimen),
        "replay": iter((specimen.sibling,)),
    }
    return tuple(_outcome(specimen, attack, files) for attack, files in attacks.items())


def _outcome(specimen: Specimen, attack: Attack, files: Iterator[bytes]) -> Tampering:
    noticed, harmless, wrong = 0, 0, 0
    for damaged in files:
        try:
            found = specimen.read(damaged)
        except specimen.refusals:
            noticed += 1
            continue
        if found == specimen.records:
            harmless += 1
        else:
            wrong += 1
    tried = noticed + harmless + wrong
    return Tampering(
        format=specimen.format, attack=attack, tried=tried, noticed=noticed, harmless=harmless, wrong=wrong
    )


def _flipped(raw: bytes, positions: int) -> Iterator[bytes]:
    last = len(raw) - 1
    spread = {last * i // max(1, positions - 1) for i in range(positions)}
    for turn, place in enumerate(sorted(spread | set(range(_ENDS)) | set(range(last - _ENDS + 1, last + 1)))):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << turn % 8
        yield bytes(damaged)


def _truncated(specimen: Specimen) -> Iterator[bytes]:
    size = len(specimen.raw)
    ends = {offset + length for offset, length in specimen.units} | {offset for offset, _ in specimen.units}
    for cut in sorted({0, 1, size // 2, size - 16, size - 1} | ends - {size}):
        yield specimen.raw[:cut]


def _swapped(specimen: Specimen) -> Iterator[bytes]:
    """Neighbouring units change places, and the first with the last."""
    raw, units = specimen.raw, specimen.units
    for one, other in (*pairwise(units), (units[0], units[-1])):
        yield _overwritten(_overwritten(raw, one, raw, other), other, raw, one)


def _spliced(specimen: Specimen) -> Iterator[bytes]:
    """A unit of the sibling in the same place."""
    for own, foreign in zip(specimen.units, specimen.sibling_units, strict=True):
        yield _overwritten(specimen.raw, own, specimen.sibling, foreign)


def _overwritten(raw: bytes, place: tuple[int, int], source: bytes, taken: tuple[int, int]) -> bytes:
    (to, length), (start, size) = place, taken
    if length != size:
        raise ConfigError(
            "bench.units", f"units of {length} and {size} bytes", step="tamper", fix="Give rows that fill whole units."
        )
    return raw[:to] + source[start : start + size] + raw[to + length :]
