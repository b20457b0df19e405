"""Questions: answered only to whom the plan names, within the budget, and truly; disclosures noted only by owners."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import (
    Answers,
    Question,
    SealedMessage,
    TraceStatement,
    open_for,
    transcript_digest,
)
from caltrain.crypto import hpke
from caltrain.crypto.digests import canonical_json, digest, to_text
from caltrain.crypto.dsse import SigningKey, open_envelope
from caltrain.enclave import answer
from caltrain.enclave.run import State
from caltrain.errors import IntegrityError
from caltrain.plan import Plan
from support.members import Asked, Member, Pixels, question
from support.oracle import fingerprint, known_records, released_model
from support.world import World, pictures

INPUTS = pictures(3, seed=99)
OTHER_KEY = hpke.HpkePrivateKey()


def linked(**options: Any) -> World:
    return World(**({"epochs": 1} | options)).run_to(State.LINKED)


def answers(world: World, asked: Asked) -> Answers:
    sealed = world.done(m.Query(asked.user, asked.envelope)).sealed
    assert set(sealed) == {asked.user}
    return asked.open(sealed[asked.user])


def traces(world: World, given: Answers) -> list[TraceStatement]:
    key = world.run.vault.signing.public
    return [open_envelope(envelope, "trace", key, TraceStatement, step="test") for envelope in given.traces]


def refused(world: World, asked: Asked, code: str) -> None:
    """No answer, no event, no budget spent."""
    world.refused(m.Query(asked.user, asked.envelope), code)
    assert world.run.spent == {}


# --- who may not ask ------------------------------------------------------------------------------------------------

Attack = Callable[[World], m.Request]


def sent_by(name: str, sign: Callable[[World], Member], **changes: Any) -> Attack:
    """A question under the user name `name`, signed by somebody."""

    def attack(world: World) -> m.Request:
        asked = question(sign(world), world.attest("query"), kind="trace", inputs=INPUTS, **changes)
        return m.Query(name, asked.envelope)

    return attack


def una(world: World) -> Member:
    return world.users["una"]


def pat(world: World) -> Member:
    return world.users["pat"]


def bound(**changes: Any) -> Attack:
    """Una seals for fresh evidence, but takes another binding for true."""

    def attack(world: World) -> m.Request:
        bundle = world.attest("query")
        other = EvidenceBundle(binding=msgspec.structs.replace(bundle.binding, **changes), evidence=bundle.evidence)
        return m.Query("una", question(una(world), other, kind="predict", inputs=INPUTS).envelope)

    return attack


def replayed(world: World) -> m.Request:
    request = m.Query("una", world.question("predict", INPUTS).envelope)
    world.done(request)
    world.run.spent.clear()
    return request


def handmade(plain: bytes, *, key: str | None = None) -> Attack:
    """Una seals arbitrary bytes, as it should be but for `key`."""

    def attack(world: World) -> m.Request:
        binding = world.attest("query").binding
        transcript = transcript_digest(binding, "una")
        sealed = hpke.seal_to(key or binding.encryption_key, plain, info=transcript.encode())
        message = SealedMessage(
            sender="una", nonce=binding.nonce, transcript=transcript, sealed=base64.b64encode(sealed).decode()
        )
        return m.Query("una", una(world).signer.sign("query", message))

    return attack


def asking(**changes: Any) -> Attack:
    """Una's question with other fields than the client would fill in."""
    return lambda world: m.Query("una", world.question("predict", INPUTS, **changes).envelope)


def packed(**changes: Any) -> bytes:
    honest = Question(kind="predict", count=3, inputs=INPUTS.tobytes(), answer_key=bytes(32))
    return msgspec.msgpack.encode(msgspec.to_builtins(honest, builtin_types=(bytes,)) | changes)


REFUSED: dict[str, tuple[Attack, str]] = {
    "a name that the plan does not have": (sent_by("eve", una), "user.unknown"),
    "a party": (sent_by("alpha", lambda w: w.parties["alpha"]), "user.unknown"),
    "signed by somebody else": (sent_by("una", lambda _w: Member("una", SigningKey())), "signature.invalid"),
    "signed by another user": (sent_by("una", pat, sender="una"), "signature.invalid"),
    "in another user's name": (sent_by("pat", pat, sender="una"), "user.other-sender"),
    "a right that the plan does not give": (sent_by("pat", pat), "user.may-not"),
    "replayed": (replayed, "nonce.unknown"),
    "a nonce of one's own": (bound(nonce="cd" * 32), "nonce.unknown"),
    "sealed for another plan": (bound(plan="sha256:" + "0" * 64), "sealed.malformed"),
    "sealed for another purpose": (bound(purpose="training"), "sealed.malformed"),
    "sealed for another enclave": (bound(encryption_key=OTHER_KEY.public), "sealed.malformed"),
    "sealed to another key": (handmade(packed(), key=OTHER_KEY.public), "hpke.not-authentic"),
    "no question in it": (handmade(b"\x90"), "sealed.malformed"),
    "an unknown kind": (handmade(packed(kind="train")), "sealed.malformed"),
    "no inputs": (handmade(packed(count=0, inputs=b"")), "sealed.malformed"),
    "more inputs than one may send": (handmade(packed(count=1025)), "sealed.malformed"),
    "a short answer key": (handmade(packed(answer_key=bytes(31))), "sealed.malformed"),
    "more inputs than it says": (asking(count=2), "query.shape"),
    "fewer inputs than it says": (asking(count=4), "query.shape"),
    "a byte less": (handmade(packed(inputs=INPUTS.tobytes()[:-1])), "query.shape"),
    "nothing": (handmade(packed(inputs=b"")), "query.shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_who_may_not_ask_or_asks_wrongly_gets_nothing(name: str) -> None:
    attack, code = REFUSED[name]
    world = linked()
    world.refused(attack(world), code)
    assert world.run.spent == {}
    assert answers(world, world.question("trace", INPUTS)).budget_left == 17  # the honest user is not hindered


def test_what_these_are_made_from_is_answered() -> None:
    world = linked()
    world.done(handmade(packed())(world))
    world.done(asking()(world))


def test_evidence_for_training_opens_no_question() -> None:
    world = World(epochs=1).run_to(State.ENROLLING)
    bundle = world.attest("training")
    world.run_to(State.LINKED)
    refused(world, question(una(world), bundle, kind="predict", inputs=INPUTS), "nonce.unknown")
    as_query = msgspec.structs.replace(bundle.binding, purpose="query")
    forged = EvidenceBundle(binding=as_query, evidence=bundle.evidence)
    refused(world, question(una(world), forged, kind="predict", inputs=INPUTS), "nonce.unknown")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_is_refused(value: float) -> None:
    inputs = pictures(2, seed=5, dtype="f32").copy()
    inputs[1, 0, 3, 3] = value
    world = linked(dtype="f32")
    refused(world, world.question("predict", inputs), "query.not-finite")


@pytest.mark.parametrize("kind", ["predict", "trace"])
def test_an_input_that_makes_the_model_overflow_is_refused_and_costs_its_budget(kind: Any) -> None:
    world = linked(dtype="f32")
    asked = world.question(kind, np.full((1, 1, 4, 4), 3e38, "<f4"))
    head = world.run.chain.head
    reply = world.send(m.Query("una", asked.envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("query.overflow", False)
    assert (world.run.state, world.run.chain.head, world.run.spent) == (State.LINKED, head, {"una": 1})
    answers(world, world.question(kind, pictures(1, seed=5, dtype="f32")))


@pytest.mark.parametrize("kind", ["predict", "trace"])
def test_a_finite_model_whose_logits_overflow_gives_no_answer(kind: Any) -> None:
    world = linked(head=0)
    assert world.run.model is not None
    # The host's own weights, had it committed to them: the link does not need the last layer.
    world.run.model.get_parameter("5.linear.weight").data.fill_(3e38)
    world.run.model.get_parameter("5.linear.bias").data.fill_(3e38)
    reply = world.send(m.Query("una", world.question(kind, INPUTS).envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("query.overflow", False)


# --- budget ---------------------------------------------------------------------------------------------------------


def test_the_budget_counts_inputs_of_both_kinds_down_to_the_last_one() -> None:
    world = linked(budget=5)
    assert answers(world, world.question("trace", INPUTS)).budget_left == 2
    over = world.question("predict", INPUTS)
    world.refused(m.Query("una", over.envelope), "user.budget-spent")
    assert answers(world, world.question("predict", INPUTS[:2])).budget_left == 0
    for kind in ("predict", "trace"):
        world.refused(m.Query("una", world.question(kind, INPUTS[:1]).envelope), "user.budget-spent")
    assert world.run.spent == {"una": 5}
    assert [e.body["inputs"] for e in world.chain() if e.kind == "query"] == [3, 2]


def test_each_user_has_a_budget_of_its_own() -> None:
    world = linked(budget=3)
    answers(world, world.question("trace", INPUTS))
    assert answers(world, world.question("predict", INPUTS, user="pat")).budget_left == 0


# --- true answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u8", "f32"])
@pytest.mark.parametrize("batch", [256, 2])
def test_a_prediction_is_that_of_the_released_model(dtype: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "_BATCH", batch)
    world, inputs = linked(dtype=dtype), pictures(5, seed=3, dtype=dtype)
    given = answers(world, world.question("predict", inputs, user="pat"))
    model = released_model(world)
    odds = np.stack([fingerprint(model, world.plan, x)[1] for x in as_tensors(inputs)])
    np.testing.assert_allclose(np.array(given.scores), odds, atol=2e-6)
    assert list(given.predicted) == odds.argmax(1).tolist()
    assert (given.model, given.traces, given.budget_left) == (world.run.model_digest, (), 15)
    assert all(round(score, 6) == score for row in given.scores for score in row)


def as_tensors(inputs: Pixels) -> Any:
    import torch

    return torch.from_numpy(inputs.copy())


def coarse(plan: Plan) -> Plan:
    return msgspec.structs.replace(
        plan, trace=msgspec.structs.replace(plan.trace, neighbours=4, distance_step=0.03, distance_floor=0)
    )


@pytest.mark.parametrize("batch", [256, 2])
def test_a_trace_ranks_the_nearest_records_of_the_predicted_class(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "_BATCH", batch)
    world, inputs = linked(change=coarse), pictures(5, seed=3)
    given = answers(world, world.question("trace", inputs))
    model = released_model(world)
    known = {k.reference: k for k in known_records(world, model)}
    for x, label, trace in zip(as_tensors(inputs), given.predicted, traces(world, given), strict=True):
        own = fingerprint(model, world.plan, x)[0]
        true = {r: float(np.linalg.norm(k.fingerprint - own)) for r, k in known.items() if k.label == label}
        nearest = sorted(true.values())[:4]
        assert [n.rank for n in trace.neighbours] == [1, 2, 3, 4]
        assert len({n.record for n in trace.neighbours}) == 4
        for neighbour, distance in zip(trace.neighbours, nearest, strict=True):
            assert abs(true[neighbour.record] - distance) < 1e-4
            assert neighbour.distance is not None
            assert abs(neighbour.distance - distance) <= 0.015 + 1e-4
            assert neighbour.distance == round(round(neighbour.distance / 0.03) * 0.03, 6)
            assert neighbour.commitment == to_text(known[neighbour.record].commitment)


def test_a_trace_says_of_which_input_run_model_and_user_it_is() -> None:
    world = linked()
    asked = world.question("trace", INPUTS)
    given = answers(world, asked)
    nonce = asked.bundle.binding.nonce
    before = world.chain()[-2]  # the last event is that of this question
    for index, trace in enumerate(traces(world, given)):
        assert msgspec.structs.replace(trace, neighbours=(), references=0) == TraceStatement(
            run=world.run.vault.run,
            model=world.run.model_digest,
            user="una",
            nonce=nonce,
            index=index,
            input_commitment=digest("input/v1", bytes.fromhex(nonce), INPUTS[index].tobytes()),
            head=before.digest(),
            predicted=given.predicted[index],
            any_label=False,
            contributors=(),
            neighbours=(),
            basis="leave-one-out",
            references=0,
            audit_rate=0.0,
            resumes=0,
            simulated=True,
        )
    assert given.scores == ()


def test_a_trace_shows_no_more_records_than_the_class_has() -> None:
    world = linked(change=lambda p: msgspec.structs.replace(p, trace=msgspec.structs.replace(p.trace, neighbours=100)))
    given = answers(world, world.question("trace", INPUTS))
    _, labels = world.data()
    sizes = [int((labels == label).sum()) for label in given.predicted]
    assert [len(trace.neighbours) for trace in traces(world, given)] == sizes


def test_only_the_asker_can_read_the_answer_and_nobody_the_question() -> None:
    world = linked()
    asked = world.question("trace", INPUTS)
    reply = world.done(m.Query("una", asked.envelope))
    una, pat = (transcript_digest(asked.bundle.binding, name) for name in ("una", "pat"))
    for key, place in ((bytes(32), una), (asked.question.answer_key, pat)):
        with pytest.raises(IntegrityError) as raised:
            open_for(key, "answer/v1", reply.sealed["una"], Answers, context=place, step="test")
        assert raised.value.code == "sealed.not-authentic"
    crossed = msgspec.json.encode(asked.envelope) + msgspec.msgpack.encode(reply) + bytes(world.host.enclave_end.sent)
    assert INPUTS[0].tobytes() not in crossed
    assert asked.question.answer_key not in crossed


@pytest.mark.parametrize("kind", ["predict", "trace"])
def test_the_chain_notes_who_asked_how_much_and_commits_to_the_answer(kind: Any) -> None:
    world = linked()
    asked = world.question(kind, INPUTS)
    given = answers(world, asked)
    public = {"model": given.model, "predicted": given.predicted, "traces": [t.payload for t in given.traces]}
    assert world.chain()[-1].body == {
        "user": "una",
        "kind": kind,
        "inputs": 3,
        "model": world.run.model_digest,
        "answer": digest("answer/v1", asked.question.answer_key, canonical_json(public)),
    }


# --- disclosures ----------------------------------------------------------------------------------------------------


def own_commitment(world: World, party: str) -> str:
    return to_text(world.parties[party].shards[1].commitment(2))


def note(party: str, signer: str, /, **changes: Any) -> Attack:
    """Beta's own record, as `party` notes it with `signer`'s key."""

    def attack(world: World) -> m.Request:
        honest = {"run": world.run.vault.run, "commitment": own_commitment(world, "beta")}
        members = world.parties | world.users
        return m.RecordDisclosure(party, members[signer].note(**(honest | changes)))

    return attack


DISCLOSURES: dict[str, tuple[Attack, str]] = {
    "an unknown party": (note("eve", "beta"), "party.unknown"),
    "a model user": (note("una", "una"), "party.unknown"),
    "signed by another": (note("beta", "alpha", party="beta"), "signature.invalid"),
    "in another's name": (note("beta", "beta", party="alpha"), "disclosure.not-own"),
    "another's record": (note("alpha", "alpha"), "disclosure.not-own"),
    "a record of nobody": (note("beta", "beta", commitment="sha256:" + "0" * 64), "disclosure.not-own"),
    "another run": (note("beta", "beta", run="0" * 32), "disclosure.not-own"),
}


@pytest.mark.parametrize("name", DISCLOSURES)
def test_a_disclosure_is_noted_only_by_the_records_owner_in_its_run(name: str) -> None:
    attack, code = DISCLOSURES[name]
    world = linked()
    world.refused(attack(world), code)
    assert "disclosure" not in {event.kind for event in world.chain()}


def test_the_owners_note_becomes_an_event() -> None:
    world = linked()
    world.done(note("beta", "beta")(world))
    event = world.chain()[-1]
    assert (event.kind, event.body) == ("disclosure", {"party": "beta", "commitment": own_commitment(world, "beta")})


# --- what a hostile host or user may try besides ---------------------------------------------------------------------


def test_a_note_that_the_host_repeats_is_one_event() -> None:
    world = linked()
    beta = world.parties["beta"]
    note = beta.note(run=world.run.vault.run, commitment=to_text(beta.shards[0].commitment(0)))
    for _ in range(3):
        world.done(m.RecordDisclosure("beta", note))
    assert [event.kind for event in world.chain()].count("disclosure") == 1


def test_an_answer_that_would_not_fit_through_the_door_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = linked()
    monkeypatch.setattr(answer, "MAX_SCORES", len(INPUTS) * len(world.plan.data.classes) - 1)
    asked = world.question("predict", INPUTS)
    world.refused(m.Query(asked.user, asked.envelope), "query.too-many")


def test_an_input_without_a_fingerprint_is_not_traced() -> None:
    world = linked(dtype="f32")
    # The features are finite, their norm is not: what is left is a vector of zeros.
    asked = world.question("trace", np.full((1, *world.plan.data.shape), 1e25, "<f4"))
    events = len(world.chain())
    reply = world.send(m.Query("una", asked.envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("query.overflow", False)
    assert len(world.chain()) == events
