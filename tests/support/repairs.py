"""A world whose run is a repair: its plan names a list of records, which its host keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from caltrain.crypto.digests import digest, to_text
from caltrain.plan import check_plan
from caltrain.records.commitment import RecordRef
from caltrain.records.quarantine import Quarantine, Quarantined, Repair, file_digest
from support.world import World

RUN, REPLACED = "1f" * 16, digest("test/v1", b"the model that is replaced")
FEW = (("alpha", 0, 1), ("beta", 0, 0), ("beta", 1, 3), ("gamma", 1, 0))
"""Party, number of its shard, leaf: four of the records of a world."""
Place = tuple[str, int, int]


def entry(world: World, place: Place) -> Quarantined:
    """That record of the world, with its commitment."""
    party, number, leaf = place
    shard = world.parties[party].shards[number]
    return Quarantined(RecordRef(party, shard.header.shard, leaf), to_text(shard.commitment(leaf)))


def quarantine_of(world: World, places: Sequence[Place] = FEW) -> Quarantine:
    """A list of these records."""
    return Quarantine.of([entry(world, place) for place in places], run=RUN, model=REPLACED)


def leave_out(world: World, quarantine: Quarantine, *, stored: bytes | None = None, **changes: Any) -> None:
    """Before the plan is approved: have it name the list, and the host keep it, or other bytes in its place."""
    raw = quarantine.encode()
    repair = Repair(
        run=quarantine.run, model=quarantine.model, quarantine=file_digest(raw), records=len(quarantine.entries)
    )
    world.plan = check_plan(msgspec.structs.replace(world.plan, repair=msgspec.structs.replace(repair, **changes)))
    world.host.storage["quarantine"] = bytearray(raw if stored is None else stored)
    world.left_out = {found.record for found in quarantine.entries}


def repaired(places: Sequence[Place] = FEW, **options: Any) -> World:
    """A new world that leaves out these records."""
    world = World(**options)
    leave_out(world, quarantine_of(world, places))
    return world
