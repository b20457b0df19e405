"""Which of the sealed records a repaired model is trained on: all but those in the list that the plan names.

A record in quarantine is read, authenticated and counted among its contributor's copies like any other, so shards and
their roots stay as they were sealed; it goes into no pool, so it is in no batch, no measurement and no link.
"""

from __future__ import annotations

from collections.abc import Mapping

from caltrain.crypto.digests import same, to_text
from caltrain.enclave.run import Run, present
from caltrain.errors import DataError, LineageError
from caltrain.provenance.left_out import check_places
from caltrain.records.commitment import RecordRef
from caltrain.records.quarantine import MAX_QUARANTINE_BYTES, open_quarantine

_STEP = "open quarantine"


class Sieve:
    """Lets all records through but those that are named, by record and commitment."""

    def __init__(self, named: Mapping[RecordRef, str]) -> None:
        self._named = named
        self._kept: set[int] = set()
        self._left_out: set[int] = set()

    def keeps(self, record: RecordRef, commitment: bytes, label: int, *, step: str) -> bool:
        """Whether a record is trained on. Raises LineageError `repair.other-commitment`."""
        named = self._named.get(record)
        if named is not None and not same(named, to_text(commitment)):
            raise LineageError(
                "repair.other-commitment",
                f"leaf {record.leaf} is in quarantine by another commitment than its own",
                step=step,
                fix="Make the list from the commitments that the enclave signed; the record there is another one.",
            )
        (self._kept if named is None else self._left_out).add(label)
        return named is None

    def check_classes(self) -> None:
        """Raise DataError `repair.empty-class` where a class has lost its last record; not which: labels stay in."""
        if self._left_out - self._kept:
            raise DataError(
                "repair.empty-class",
                "all records of a class are in quarantine",
                step=_STEP,
                fix="Have the parties contribute other records of that class, or agree on a plan without it.",
            )


def sieve_of(run: Run) -> Sieve:
    """The sieve of this run, its list checked against plan and manifest before any record is read.

    Raises what `open_quarantine` and `check_places` do.
    """
    repair, manifest = present(run.plan).repair, present(run.manifest)
    if not repair:
        return Sieve({})
    raw = run.door.read_all("quarantine", limit=MAX_QUARANTINE_BYTES)
    named = open_quarantine(raw, repair).commitments()
    check_places(named, manifest)
    return Sieve(named)
