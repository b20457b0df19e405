"""The chain of events: whole, in order, of one run and one enclave, and through the head that was kept."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.errors import ConfigError, IntegrityError, LineageError
from caltrain.provenance import chain as chains
from caltrain.provenance.chain import Chain, Event, empty_head, verify_chain
from support.samples import quick, refused, signer

RUN, OTHER_RUN = "ab" * 16, "cd" * 16
ENCLAVE, OTHER = signer("enclave"), signer("other enclave")
BODIES: list[tuple[Any, dict[str, Any]]] = [
    ("plan", {"plan": "sha256:" + "1" * 64}),
    ("approval", {"party": "alpha"}),
    ("approval", {"party": "beta"}),
    ("epoch", {"epoch": 0, "loss": "0.500000"}),
    ("release", {}),
]


def build(*, run: str = RUN, signer: SigningKey = ENCLAVE, count: int = 5) -> tuple[list[Envelope], list[str]]:
    """Events of a run, and the head after each of them."""
    chain = Chain(signer, run=run)
    events, heads = [], []
    for kind, body in BODIES[:count]:
        events.append(chain.append(kind, body))
        heads.append(chain.head)
    return events, heads


EVENTS, HEADS = build()


def verify(events: list[Envelope], *, head: str | None = None, run: str = RUN) -> tuple[Event, ...]:
    return verify_chain(events, run=run, signing_key=ENCLAVE.public, head=head)


def event(sequence: int = 5, *, key: SigningKey = ENCLAVE, **changes: Any) -> Envelope:
    """An event that would be the next one, changed and signed."""
    honest = Event(run=RUN, sequence=sequence, previous=HEADS[-1], kind="query", body={"n": 1})
    return key.sign("event", msgspec.structs.replace(honest, **changes))


def test_known_heads() -> None:
    assert empty_head(RUN) == "sha256:104e277c8b97cb7995b448c9c9643cc40c43e432b9ca032dc21bf5f51fc291e6"
    assert HEADS[0] == "sha256:a7d8a23590a83dcc9c504078c575c3e477d745dcd29823f075fcf28c12067f5a"
    assert HEADS[-1] == "sha256:689702eee72e3084c56266bd9d418d9eecda75328d4f36c99f5226f78a1d32d6"


def test_an_honest_chain_is_returned_event_by_event() -> None:
    events = verify(EVENTS)
    assert [(e.kind, e.body) for e in events] == BODIES
    assert [e.sequence for e in events] == [0, 1, 2, 3, 4]
    assert [e.digest() for e in events] == HEADS
    assert [e.previous for e in events] == [empty_head(RUN), *HEADS[:-1]]


def test_a_chain_may_be_empty() -> None:
    assert verify([]) == ()
    assert verify([], head=empty_head(RUN)) == ()


@pytest.mark.parametrize("head", [empty_head(RUN), *HEADS])
def test_every_head_that_a_party_can_have_kept_is_in_the_chain(head: str) -> None:
    assert len(verify(EVENTS, head=head)) == 5


@pytest.mark.parametrize("length", range(5))
def test_a_chain_cut_before_the_kept_head_is_refused(length: int) -> None:
    with refused(LineageError, "chain.other-head"):
        verify(EVENTS[:length], head=HEADS[length])


def test_without_a_kept_head_a_cut_chain_passes() -> None:
    assert len(verify(EVENTS[:3])) == 3


def test_a_fork_after_the_kept_head_is_seen_and_one_before_it_is_not_hidden() -> None:
    chain = Chain(ENCLAVE, run=RUN)
    forked = [chain.append(kind, body) for kind, body in BODIES[:2]]
    forked.append(chain.append("approval", {"party": "gamma"}))
    forked.append(chain.append("epoch", {"epoch": 0, "loss": "0.500000"}))
    assert len(verify(forked, head=HEADS[1])) == 4
    with refused(LineageError, "chain.other-head"):
        verify(forked, head=HEADS[2])
    with refused(LineageError, "chain.broken"):
        verify([*forked[:3], *EVENTS[3:]])


@pytest.mark.parametrize("head", [empty_head(OTHER_RUN), "sha256:" + "0" * 64, build(run=OTHER_RUN)[1][2]])
def test_a_head_of_something_else_is_not_in_the_chain(head: str) -> None:
    with refused(LineageError, "chain.other-head"):
        verify(EVENTS, head=head)


BROKEN: dict[str, list[Envelope]] = {
    "first event dropped": EVENTS[1:],
    "middle event dropped": [*EVENTS[:2], *EVENTS[3:]],
    "two events swapped": [*EVENTS[:2], EVENTS[3], EVENTS[2], EVENTS[4]],
    "an event twice": [*EVENTS[:2], EVENTS[1], *EVENTS[2:]],
    "the chain twice": EVENTS * 2,
    "an event of another run at its place": [*EVENTS[:4], build(run=OTHER_RUN)[0][4]],
    "a chain of another run": build(run=OTHER_RUN)[0],
    "a link to another event": [*EVENTS, event(previous=HEADS[2])],
    "a link to nothing": [*EVENTS, event(previous=empty_head(RUN))],
    "a number left out": [*EVENTS, event(sequence=6)],
    "a number again": [*EVENTS, event(sequence=4)],
    "a right link in another run's name": [*EVENTS, event(run=OTHER_RUN)],
}


@pytest.mark.parametrize("events", BROKEN.values(), ids=BROKEN)
def test_a_chain_that_is_not_whole_and_in_order_is_refused(events: list[Envelope]) -> None:
    assert len(verify([*EVENTS, event()])) == 6
    with refused(LineageError, "chain.broken"):
        verify(events)


@quick
@given(st.lists(st.integers(0, 4), max_size=6))
def test_only_a_beginning_of_the_chain_verifies(order: list[int]) -> None:
    chosen = [EVENTS[i] for i in order]
    if order == list(range(len(order))):
        assert len(verify(chosen)) == len(order)
    else:
        with refused(LineageError, "chain.broken"):
            verify(chosen)


UNSIGNED: dict[str, list[Envelope]] = {
    "signed by another enclave": build(signer=OTHER)[0],
    "one event signed by another enclave": [*EVENTS, event(key=OTHER)],
    "signed as something else": [
        *EVENTS,
        ENCLAVE.sign("model", Event(run=RUN, sequence=5, previous=HEADS[-1], kind="query", body={})),
    ],
    "body changed": [msgspec.structs.replace(EVENTS[0], payload=EVENTS[1].payload), *EVENTS[1:]],
}


@pytest.mark.parametrize("events", UNSIGNED.values(), ids=UNSIGNED)
def test_an_event_that_the_enclave_did_not_sign_is_refused(events: list[Envelope]) -> None:
    with refused(IntegrityError, "signature.invalid"):
        verify(events)


MALFORMED: dict[str, dict[str, Any]] = {
    "unknown kind": {"kind": "payment"},
    "negative number": {"sequence": -1},
    "number beyond the limit": {"sequence": 1 << 20},
    "another version": {"version": 2},
    "unknown field": {"time": "now"},
    "run that is no id": {"run": "x"},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_a_signed_event_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    honest = msgspec.to_builtins(verify(EVENTS)[0])
    with refused(IntegrityError, "payload.malformed"):
        verify([ENCLAVE.sign("event", honest | changes)])


def test_a_full_chain_takes_no_more_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "MAX_EVENTS", 2)
    chain = Chain(ENCLAVE, run=RUN)
    events = [chain.append("release", {}) for _ in range(2)]
    head = chain.head
    with refused(LineageError, "chain.full"):
        chain.append("release", {})
    assert chain.head == head
    assert len(verify(events)) == 2
    with refused(LineageError, "chain.too-long"):
        verify([*events, events[0]])


def test_an_event_without_canonical_form_leaves_the_chain_as_it_was() -> None:
    chain = Chain(ENCLAVE, run=RUN)
    with refused(ConfigError, "json.not-canonical"):
        chain.append("epoch", {"loss": float("nan")})
    assert chain.head == empty_head(RUN)
    assert len(verify([chain.append("release", {})])) == 1
