"""Records that a repaired model is trained without: the list that the parties agree on, and the plan's word of it.

The list is a file beside the plan, which holds the SHA-256 of its bytes (as `sha256sum` prints it). A record is in it
by where it lies and by its commitment, so the list speaks of one record and of no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Literal

import msgspec

from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import Digest, same, to_text
from caltrain.crypto.dsse import PublicKey
from caltrain.errors import UNDECODABLE, ConfigError, IntegrityError
from caltrain.records.commitment import PartyName, RecordRef, ShardId

MAX_QUARANTINED = 1 << 20
MAX_QUARANTINE_BYTES = 256 << 20
_STEP = "read quarantine"


class FormerParty(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A contributor that was left out with all that it had: it may not come back under another name."""

    name: PartyName
    public_key: PublicKey


class Repair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a plan and the enclave's statements say of a repair: the run and model that are replaced, what is left out.

    `quarantine` is the SHA-256 of the list of `records` records; `without` are parties that are no longer there.
    """

    run: ShardId
    model: Digest
    quarantine: Digest
    records: Annotated[int, msgspec.Meta(ge=0, le=MAX_QUARANTINED)]
    without: Annotated[tuple[FormerParty, ...], msgspec.Meta(max_length=256)] = ()

    def in_words(self) -> str:
        """What every screen says of it."""
        former = "".join(f", without {party.name}" for party in self.without)
        what = f"without the {self.records} records of the list {self.quarantine}{former}"
        return f"replaces model {self.model} of run {self.run}: {what}"


class Quarantined(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One record: where it lies, and its commitment."""

    record: RecordRef
    commitment: Digest


class Quarantine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Records of a run that the model that replaces `model` is trained without, in ascending order, each once."""

    version: Literal[1] = 1
    run: ShardId
    model: Digest
    entries: Annotated[tuple[Quarantined, ...], msgspec.Meta(max_length=MAX_QUARANTINED)]

    @classmethod
    def of(cls, entries: Iterable[Quarantined], *, run: str, model: str) -> Quarantine:
        """The list of these records, named in any order and as often as may be.

        Raises ConfigError `quarantine.too-many`, or `quarantine.two-commitments` where one record is said to have two.
        """
        ordered = tuple(sorted(set(entries)))
        if len(ordered) > MAX_QUARANTINED:
            raise _unfit("quarantine.too-many", f"{len(ordered)} records, at most {MAX_QUARANTINED} fit")
        for one, other in pairwise(ordered):
            if one.record == other.record:
                raise _unfit("quarantine.two-commitments", f"{one.record} is named with two commitments")
        return cls(run=run, model=model, entries=ordered)

    def encode(self) -> bytes:
        """The list as a file: always the same bytes for the same records."""
        return msgspec.json.encode(self)

    def commitments(self) -> dict[RecordRef, str]:
        """By record, its commitment."""
        return {entry.record: entry.commitment for entry in self.entries}


def file_digest(raw: bytes) -> str:
    """What a plan says of a list: the plain SHA-256 of its file."""
    return to_text(hashlib.sha256(raw).digest())


def decode_quarantine(raw: bytes) -> Quarantine:
    """A list of any run. Raises IntegrityError `quarantine.malformed`."""
    try:
        if len(raw) > MAX_QUARANTINE_BYTES:
            raise msgspec.ValidationError("larger than the limit")
        found: Quarantine = json_decoder(Quarantine).decode(raw)
    except UNDECODABLE as error:
        raise _not_it("quarantine.malformed", f"not a quarantine list: {str(error)[:300]}") from None
    if any(not one.record < other.record for one, other in pairwise(found.entries)):
        raise _not_it("quarantine.malformed", "its records are not in ascending order, each once")
    return found


def open_quarantine(raw: bytes, repair: Repair) -> Quarantine:
    """The very list that a plan names. Raises IntegrityError `quarantine.other-list`, `.other-run` or `.malformed`."""
    if not same(file_digest(raw), repair.quarantine):
        raise _not_it("quarantine.other-list", f"the list is {file_digest(raw)}, the plan names {repair.quarantine}")
    found = decode_quarantine(raw)
    if (found.run, found.model, len(found.entries)) != (repair.run, repair.model, repair.records):
        raise _not_it(
            "quarantine.other-run",
            f"the list has {len(found.entries)} records of run {found.run}, model {found.model}; the plan says "
            f"{repair.records} of run {repair.run}, model {repair.model}",
        )
    return found


def _not_it(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code, what, step=_STEP, fix="Get the list that belongs to the plan: `caltrain remedy plan` wrote both."
    )


def _unfit(code: str, what: str) -> ConfigError:
    return ConfigError(
        code, what, step="make quarantine", fix="Look at what names the records; leave out a whole party if need be."
    )
