"""The state table: what is accepted when, what a failure leaves behind, and that the chain tells the whole run."""

from __future__ import annotations

import socket
from typing import Any, cast, get_args

import msgspec
import pytest

from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.frames import FrameKind, send_frame
from caltrain.crypto.digests import to_text
from caltrain.crypto.dsse import SigningKey, open_envelope
from caltrain.enclave import session
from caltrain.enclave.run import Run, State, present
from caltrain.enclave.session import TABLE, enclave_main, handle
from caltrain.errors import EnvironmentFault, ProtocolError
from caltrain.exposure.policy import Bound, Policy
from caltrain.plan import ExposureSpec, Plan
from caltrain.provenance import chain
from support.wire import memory_socketpair
from support.world import MEASUREMENT, PARTIES, World, pictures

ENVELOPE = SigningKey().sign("anything", {})
SAMPLES: dict[type, m.Request] = {
    m.Boot: m.Boot("simulated", bytes(32)),
    m.Configure: m.Configure(b"{}", {}),
    m.Attest: m.Attest("training", "00" * 32),
    m.Provision: m.Provision("alpha", ENVELOPE),
    m.MakeManifest: m.MakeManifest(),
    m.Countersign: m.Countersign("alpha", ENVELOPE),
    m.Ingest: m.Ingest(()),
    m.Train: m.Train(0),
    m.Assess: m.Assess(),
    m.Vote: m.Vote("alpha", ENVELOPE),
    m.MoveCut: m.MoveCut(3),
    m.Resume: m.Resume(b"{}", "checkpoint-0"),
    m.Rejoin: m.Rejoin("alpha", ENVELOPE),
    m.Hunt: m.Hunt(),
    m.Release: m.Release(),
    m.Link: m.Link(),
    m.Query: m.Query("una", ENVELOPE),
    m.RecordDisclosure: m.RecordDisclosure("alpha", ENVELOPE),
}
# Written down a second time on purpose: a pair that slips into the table must fail here.
ACCEPTED: dict[tuple[State, type], set[State]] = {
    (State.NEW, m.Configure): {State.ENROLLING},
    (State.NEW, m.Resume): {State.RESUMING},
    (State.RESUMING, m.Attest): {State.RESUMING},
    (State.RESUMING, m.Rejoin): {State.RESUMING, State.AGREED, State.READY, State.TRAINED},
    (State.ENROLLING, m.Attest): {State.ENROLLING},
    (State.ENROLLING, m.Provision): {State.ENROLLING},
    (State.ENROLLING, m.MakeManifest): {State.AGREEING},
    (State.AGREEING, m.Countersign): {State.AGREEING, State.AGREED},
    (State.AGREED, m.Ingest): {State.READY},
    (State.READY, m.Train): {State.READY, State.TRAINED},
    (State.READY, m.Assess): {State.READY, State.ASSESSING},
    (State.ASSESSING, m.Vote): {State.ASSESSING, State.READY},
    (State.READY, m.MoveCut): {State.READY},
    (State.TRAINED, m.Hunt): {State.HUNTED},
    (State.HUNTED, m.Release): {State.RELEASED},
    (State.RELEASED, m.Link): {State.LINKED},
    (State.LINKED, m.Attest): {State.LINKED},
    (State.LINKED, m.Query): {State.LINKED},
    (State.LINKED, m.RecordDisclosure): {State.LINKED},
}


def judged(plan: Plan) -> Plan:
    """A plan whose parties vote on the cut."""
    spec = ExposureSpec(policy=Policy(bounds=(Bound(measure="ssim", at_most=0.3),)), sample=8)
    return msgspec.structs.replace(plan, exposure=spec)


def world_in(state: State) -> World:
    if state is State.STOPPED:
        world = World()
        world.done(m.Stop())
        return world
    if state is State.RESUMING:
        world = World(epochs=1).run_to(State.READY)
        world.restart()
        world.done(world.resume())
        return world
    if state is State.ASSESSING:
        world = World(epochs=1, change=judged).run_to(State.READY)
        world.done(m.Assess())
        return world
    return World(epochs=1).run_to(state)


def test_the_samples_are_all_the_messages_that_there_are() -> None:
    assert {*SAMPLES, m.Stop} == set(get_args(m.Request))


def test_the_table_accepts_these_pairs_and_no_other() -> None:
    assert {pair: set(after) for pair, (_, after) in TABLE.items()} == ACCEPTED


@pytest.mark.parametrize("state", State)
def test_a_message_that_is_not_due_is_refused_and_changes_nothing(state: State) -> None:
    world = world_in(state)
    for kind, sample in SAMPLES.items():
        if (state, kind) not in ACCEPTED:
            error = world.refused(sample, "session.not-now", fatal=False)
            assert kind.__name__ in error["what"]
            assert state in error["what"]


@pytest.mark.parametrize("state", State)
def test_stop_is_accepted_in_every_state_and_is_for_good(state: State) -> None:
    world = world_in(state)
    assert world.done(m.Stop()) == m.Done()
    assert world.run.state is State.STOPPED
    for sample in SAMPLES.values():
        world.refused(sample, "session.not-now", fatal=False)


@pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
def test_the_chain_of_a_whole_run_verifies_and_names_every_step(head: int) -> None:
    world = World(head=head).run_to(State.LINKED)
    asked = world.question("trace", pictures(2, seed=50))
    world.done(m.Query("una", asked.envelope))
    shard = world.parties["beta"].shards[0]
    note = world.parties["beta"].note(run=world.run.vault.run, commitment=to_text(shard.commitment(0)))
    world.done(m.RecordDisclosure("beta", note))
    events = world.chain()
    many = len(PARTIES)
    assert [event.kind for event in events] == [
        *("plan", *["approval"] * many, *["provision"] * many, "manifest", *["countersignature"] * many),
        *("checkpoint", "ingest", "checkpoint", "epoch", "checkpoint", "epoch", "checkpoint"),
        *("hunt", "release", "link", "query", "disclosure"),
    ]
    assert events[-1].digest() == world.run.chain.head
    bodies = {event.kind: event.body for event in events}
    form = "ternary" if head else "two-way"
    assert bodies["plan"] == {"plan": world.plan.digest(), "form": form, "simulated": True}
    assert bodies["manifest"] == {"manifest": world.manifest.digest(), "records": 27}
    assert bodies["ingest"] == {"records": 27, "ignored": 0}
    named = {bodies[kind]["model"] for kind in ("hunt", "release", "link", "query")}
    assert named == {world.run.model_digest}
    assert bodies["disclosure"] == {"party": "beta", "commitment": to_text(shard.commitment(0))}


def test_a_refused_request_adds_no_event_to_the_next_ones() -> None:
    world = World().run_to(State.ENROLLING)
    world.done(world.provision("alpha"))
    world.refused(m.Provision("beta", world.provision("alpha").envelope), "signature.invalid")
    world.refused(m.MakeManifest(), "provision.missing")
    world.done(world.provision("beta"))
    assert [event.kind for event in world.chain()] == ["plan", *["approval"] * 3, "provision", "provision"]


def test_what_a_handler_noted_before_it_failed_never_reaches_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_way(run: Run, _message: Any) -> tuple[m.Done, State]:
        run.record("disclosure", {"party": "alpha"})
        raise ProtocolError("some.failure", "half way", step="test", fix="None.")

    world = World().run_to(State.ENROLLING)
    with monkeypatch.context() as patch:
        patch.setitem(TABLE, (State.ENROLLING, m.MakeManifest), (half_way, frozenset({State.AGREEING})))
        world.refused(m.MakeManifest(), "some.failure")
    world.run_to(State.AGREEING)
    assert "disclosure" not in {event.kind for event in world.chain()}


def test_a_handler_cannot_lead_where_the_table_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def leap(_run: Run, _message: Any) -> tuple[m.Done, State]:
        return m.Done(), State.LINKED

    world = World().run_to(State.AGREED)
    monkeypatch.setitem(TABLE, (State.AGREED, m.Ingest), (leap, frozenset({State.READY})))
    world.refused(m.Ingest(()), "session.other-state")


def test_the_hosts_choice_of_an_error_code_does_not_keep_a_failed_run_alive() -> None:
    world = World().run_to(State.READY)
    words = ProtocolError("session.not-now", "try again", step="center", fix="Try again.").diagnostics()
    world.host.on_tensor = lambda _head, _tensor, channel: channel.send(m.CallFailed(words))
    world.refused(m.Train(0), "session.not-now", fatal=True)


def test_a_full_chain_is_an_answer_not_the_end_of_the_enclave(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World().run_to(State.LINKED)
    monkeypatch.setattr(chain, "MAX_EVENTS", len(world.events))
    note = world.parties["beta"].note(
        run=world.run.vault.run, commitment=to_text(world.parties["beta"].shards[0].commitment(0))
    )
    world.refused(m.RecordDisclosure("beta", note), "chain.full")
    world.attest("query")  # no event: still possible


def test_a_chain_that_fills_up_within_the_run_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World().run_to(State.RELEASED)
    monkeypatch.setattr(chain, "MAX_EVENTS", len(world.events))
    reply = world.send(m.Link())
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal, reply.events) == ("chain.full", True, ())  # no room for the reason
    assert world.run.state is State.STOPPED


def test_a_field_that_the_run_does_not_have_yet_is_a_named_error() -> None:
    with pytest.raises(ProtocolError) as raised:
        present(None)
    assert raised.value.code == "session.not-yet"
    assert present(0) == 0


# --- the loop around it ---------------------------------------------------------------------------------------------


def channels() -> tuple[Channel, Channel, Any]:
    """Enclave's channel, host's channel, host's socket."""
    ours, theirs = memory_socketpair()
    return Channel(cast(socket.socket, theirs)), Channel(cast(socket.socket, ours)), ours


def test_the_enclave_answers_in_order_and_ends_with_stop() -> None:
    enclave, host, _ = channels()
    requests: list[m.Request] = [m.MakeManifest(), World().configure(), m.Stop(), m.Link()]
    for request in requests:
        host.send(request)
    enclave_main(enclave, SimulatedAttester(SigningKey(), measurement=MEASUREMENT))
    first, second, third = (host.receive(m.REPLIES) for _ in range(3))
    assert isinstance(first, m.Failed)
    assert isinstance(second, m.Done)
    events = [open_envelope(e, "event", e.signer, chain.Event, step="test") for e in second.events]
    assert [event.kind for event in events] == ["plan", *["approval"] * 3]
    assert third == m.Done()
    with pytest.raises(EnvironmentFault):  # the request after Stop was never looked at
        host.receive(m.REPLIES)


def test_a_fatal_failure_ends_the_enclave(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_run: Run, _message: Any) -> tuple[m.Done, State]:
        raise ProtocolError("some.failure", "no", step="test", fix="None.")

    monkeypatch.setattr(session, "_HARMLESS", frozenset[State]())
    monkeypatch.setitem(TABLE, (State.NEW, m.Configure), (fail, frozenset({State.ENROLLING})))
    enclave, host, _ = channels()
    host.send(World().configure())
    host.send(m.Stop())
    enclave_main(enclave, SimulatedAttester(SigningKey(), measurement=MEASUREMENT))
    reply = host.receive(m.REPLIES)
    assert isinstance(reply, m.Failed)
    assert reply.fatal
    with pytest.raises(EnvironmentFault):
        host.receive(m.REPLIES)


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"", "door.unexpected"), (b"\xff" * 40, "door.unexpected"), (b"\x81\xa1t\xa4done", "door.unexpected")],
    ids=["empty", "garbage", "a reply"],
)
def test_what_is_no_request_ends_the_enclave_without_an_answer(body: bytes, code: str) -> None:
    enclave, _, sock = channels()
    send_frame(sock, FrameKind.MESSAGE, body)
    with pytest.raises(ProtocolError) as raised:
        enclave_main(enclave, SimulatedAttester(SigningKey(), measurement=MEASUREMENT))
    assert raised.value.code == code
    assert not sock.inbox


def test_the_end_of_the_stream_ends_the_enclave() -> None:
    enclave, host, _ = channels()
    host.close()
    with pytest.raises(EnvironmentFault) as raised:
        enclave_main(enclave, SimulatedAttester(SigningKey(), measurement=MEASUREMENT))
    assert raised.value.code == "door.closed"


def test_handle_itself_raises_nothing_of_ours() -> None:
    world = World().run_to(State.READY)
    world.host.on_tensor = lambda *_: world.host.end.close()
    reply = handle(world.run, m.Train(0))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("door.closed", True)
