"""Whether a quarantine list fits the records of a run: everything that can be said without opening one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from caltrain.errors import DataError, LineageError
from caltrain.plan import RunManifest
from caltrain.records.commitment import RecordRef

_STEP = "check quarantine"


def check_places(records: Collection[RecordRef], manifest: RunManifest) -> None:
    """Every record lies in a shard of the manifest and is trained on, and no party loses its last one.

    Raises LineageError `repair.unknown-record` or `repair.held-out`, DataError `repair.empty-party`.
    """
    shards = {(party.name, entry.shard): entry for party in manifest.parties for entry in party.shards}
    for record in records:
        entry = shards.get((record.party, record.shard))
        where = f"leaf {record.leaf} of shard {record.shard} of {record.party}"
        if entry is None or record.leaf >= entry.records:
            raise _misplaced("repair.unknown-record", f"{where} is in quarantine and not in the run")
        if entry.held_out:
            raise _misplaced("repair.held-out", f"{where} is in quarantine and held out: it is not trained on")
    lost = Counter(record.party for record in records)
    for party in manifest.parties:
        if lost[party.name] and lost[party.name] == sum(s.records for s in party.shards if not s.held_out):
            raise DataError(
                "repair.empty-party",
                f"all records of {party.name} are in quarantine",
                step=_STEP,
                fix=f"Leave out the party: `caltrain remedy plan --without {party.name}`.",
            )


def _misplaced(code: str, what: str) -> LineageError:
    return LineageError(
        code, what, step=_STEP, fix="All parties join with the shards that they had; else make the list again."
    )
