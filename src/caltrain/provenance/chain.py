"""A hash chain of events, each signed by the enclave; the parties keep its head.

Without the clock of a trusted party an event has no time, only its place. An event's body holds what the host may
see: digests, names and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from caltrain.crypto import dsse
from caltrain.crypto.digests import Digest, canonical_json, digest, hash_parts, same
from caltrain.errors import LineageError
from caltrain.records.commitment import ShardId

MAX_EVENTS = 1 << 20

EventKind = Literal[
    "plan",
    "approval",
    "provision",
    "manifest",
    "countersignature",
    "repair",
    "ingest",
    "epoch",
    "assess",
    "vote",
    "cut",
    "audit",
    "checkpoint",
    "resume",
    "stopped",
    "hunt",
    "release",
    "link",
    "query",
    "disclosure",
]


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One event: `previous` is the digest of the event before it, or of the empty chain of this run."""

    version: Literal[1] = 1
    run: ShardId
    sequence: Annotated[int, msgspec.Meta(ge=0, lt=MAX_EVENTS)]
    previous: Digest
    kind: EventKind
    body: dict[str, Any]

    def digest(self) -> str:
        """The head of the chain once this event is its last."""
        return digest("event/v1", canonical_json(self))


def empty_head(run: str) -> str:
    """Head of the chain of a run before its first event."""
    return digest("event-chain/v1", run.encode())


class Chain:
    """The writing end, inside the enclave."""

    def __init__(self, signer: dsse.SigningKey, *, run: str, events: Sequence[Event] = ()) -> None:
        """Go on after `events` (verified, from the first on)."""
        self._signer = signer
        self.run = run
        self.head = events[-1].digest() if events else empty_head(run)
        self._length = len(events)
        self._bodies = {_body_key(event.kind, event.body) for event in events}
        self._last = {event.kind: event.body for event in events}
        self._kinds = [event.kind for event in events]

    def __len__(self) -> int:
        """Events so far."""
        return self._length

    def count(self, kind: EventKind, *, before: EventKind) -> int:
        """How many events of a kind there are before the first of another kind."""
        end = self._kinds.index(before) if before in self._kinds else None
        return self._kinds[:end].count(kind)

    def last(self, kind: EventKind, key: str, default: int) -> int:
        """A number out of the last event of a kind, or `default` where there is none."""
        return int(self._last.get(kind, {}).get(key, default))

    def holds(self, kind: EventKind, body: dict[str, Any]) -> bool:
        """Whether an event of this kind and body is in the chain already."""
        return _body_key(kind, body) in self._bodies

    def append(self, kind: EventKind, body: dict[str, Any]) -> dsse.Envelope:
        """Sign the next event. Raises LineageError `chain.full` after 2**20 events."""
        if self._length >= MAX_EVENTS:
            raise _broken("chain.full", "the chain of this run is full", "Start a new run.")
        event = Event(run=self.run, sequence=self._length, previous=self.head, kind=kind, body=body)
        self.head = event.digest()
        self._length += 1
        self._bodies.add(_body_key(kind, body))
        self._last[kind] = body
        self._kinds.append(kind)
        return self._signer.sign("event", event)


def _body_key(kind: EventKind, body: dict[str, Any]) -> bytes:
    return hash_parts("event-body/v1", kind.encode(), canonical_json(body))


def verify_chain(
    envelopes: Sequence[dsse.Envelope], *, run: str, signing_key: str, head: str | None = None
) -> tuple[Event, ...]:
    """Verify signatures, order and links of a whole chain; with `head`, that it passes through that head.

    A head that a party kept may be older than the chain's end: the chain must then contain it. Raises LineageError
    or IntegrityError.
    """
    if len(envelopes) > MAX_EVENTS:
        raise _broken("chain.too-long", f"{len(envelopes)} events", "Refuse it.")
    events: list[Event] = []
    current = empty_head(run)
    seen = head is None or head == current
    for index, envelope in enumerate(envelopes):
        event = dsse.open_envelope(envelope, "event", signing_key, Event, step=f"verify event {index}")
        if event.run != run or event.sequence != index or not same(event.previous, current):
            raise _broken(
                "chain.broken",
                f"event {index} does not follow from the one before it",
                "An event was left out, moved or added: get the chain from another party and compare.",
            )
        current = event.digest()
        seen = seen or current == head
        events.append(event)
    if not seen:
        raise _broken(
            "chain.other-head",
            "the chain does not contain the head that was kept",
            "The chain was cut or forked after that head: ask the host for all of it, compare with other parties.",
        )
    return tuple(events)


def _broken(code: str, what: str, fix: str) -> LineageError:
    return LineageError(code, what, step="verify chain", fix=fix)
