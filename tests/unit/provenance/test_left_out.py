"""A quarantine list fits a run only where every record of it is trained on, and no party loses all of its own."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from caltrain.errors import CaltrainError, DataError, LineageError
from caltrain.plan import RunManifest
from caltrain.provenance.left_out import check_places
from caltrain.records.commitment import RecordRef
from support.samples import refused
from support.worlds import finished_world


@pytest.fixture
def manifest() -> RunManifest:
    """Three parties with shards of five and four records; the second one of alpha is held out."""
    found = finished_world().manifest
    first = found.parties[0]
    held = msgspec.structs.replace(first.shards[1], held_out=True)
    return msgspec.structs.replace(
        found, parties=(msgspec.structs.replace(first, shards=(first.shards[0], held)), *found.parties[1:])
    )


def refs(manifest: RunManifest, party: int, shard: int, leaves: Sequence[int]) -> list[RecordRef]:
    """Records of a shard of a party, by numbers."""
    name, entry = manifest.parties[party].name, manifest.parties[party].shards[shard]
    return [RecordRef(name, entry.shard, leaf) for leaf in leaves]


def test_records_that_are_trained_on_fit(manifest: RunManifest) -> None:
    check_places([], manifest)
    check_places(refs(manifest, 0, 0, range(4)) + refs(manifest, 1, 0, range(5)) + refs(manifest, 1, 1, [3]), manifest)


def wrong(manifest: RunManifest) -> dict[str, tuple[type[CaltrainError], str, list[RecordRef]]]:
    """What does not fit, and how it is called."""
    (known,) = refs(manifest, 1, 0, [0])
    others = {"party": "delta", "shard": "0" * 32, "leaf": 5}
    found: dict[str, tuple[type[CaltrainError], str, list[RecordRef]]] = {
        f"another {field}": (LineageError, "repair.unknown-record", [msgspec.structs.replace(known, **{field: value})])
        for field, value in others.items()
    }
    elsewhere = msgspec.structs.replace(known, party="gamma")
    found["a shard of another party"] = (LineageError, "repair.unknown-record", [elsewhere])
    found["held out"] = (LineageError, "repair.held-out", refs(manifest, 0, 1, [0]))
    everything = refs(manifest, 2, 0, range(5)) + refs(manifest, 2, 1, range(4))
    found["all of a party"] = (DataError, "repair.empty-party", everything)
    found["all that is not held out"] = (DataError, "repair.empty-party", refs(manifest, 0, 0, range(5)))
    return found


CASES = ["another party", "another shard", "another leaf", "a shard of another party", "held out", "all of a party"]


@pytest.mark.parametrize("what", [*CASES, "all that is not held out"])
def test_what_does_not_fit_is_named(what: str, manifest: RunManifest) -> None:
    family, code, records = wrong(manifest)[what]
    with refused(family, code):
        check_places(records, manifest)


def test_a_party_that_had_nothing_to_train_on_has_lost_nothing(manifest: RunManifest) -> None:
    first = manifest.parties[0]
    bare = msgspec.structs.replace(first, shards=first.shards[1:])
    check_places(refs(manifest, 1, 0, [0]), msgspec.structs.replace(manifest, parties=(bare, *manifest.parties[1:])))
