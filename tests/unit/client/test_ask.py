"""Asking an enclave: who asks what, what leaves before the evidence convinces, and which answers are believed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.attestation.verify import Policy
from caltrain.boundary.sealed import (
    MAX_SEALED,
    Answers,
    Question,
    SealedMessage,
    TraceStatement,
    open_for,
    open_message,
    seal_for,
    transcript_digest,
)
from caltrain.client.ask import Answered, ask, input_commitment, most_at_once
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, SigningKey, open_envelope
from caltrain.enclave.run import State
from caltrain.errors import AccessError, AttestationError, CaltrainError, DataError, IntegrityError, ProtocolError
from caltrain.plan import Plan, Right
from caltrain.provenance.verdict import SuspectRecords, VerdictStatement, inputs_root
from support.folders import policy_of
from support.members import Pixels
from support.samples import refused
from support.scripted_host import ScriptedHost
from support.world import MEASUREMENT, World, pictures
from support.worlds import finished_world

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OTHER = "sha256:" + "0" * 64
QUERY = "/v1/users/una/query"


class Asking:
    """Una, who may ask everything."""

    def __init__(self, world: World) -> None:
        self.world, self.host = world, ScriptedHost(world)
        self.policy: Policy = policy_of(world)
        self.plan: Plan = world.plan
        self.signer = world.users["una"].signer

    def ask(self, kind: Right, inputs: Pixels, *, user: str = "una") -> Answered:
        """Ask."""
        with self.host.client() as client:
            return ask(
                client,
                self.plan,
                self.policy,
                kind=kind,
                user=user,
                signer=self.signer,
                inputs=inputs,
                clock=lambda: NOW,
            )

    def refused(
        self,
        family: type[CaltrainError],
        code: str,
        *,
        requests: int,
        kind: Right = "trace",
        inputs: Pixels | None = None,
        user: str = "una",
    ) -> None:
        """Asking fails after so many requests."""
        with refused(family, code):
            self.ask(kind, pictures(3, seed=9) if inputs is None else inputs, user=user)
        assert len(self.host.requests) == requests
        assert len(self.host.sent("POST")) == max(0, requests - 1)


@pytest.fixture
def finished() -> World:
    """A world whose run is over."""
    return finished_world()


@pytest.fixture
def asking(finished: World) -> Asking:
    """A user, after a run."""
    return Asking(finished)


def test_a_prediction_is_that_of_the_linked_model(asking: Asking) -> None:
    answered = asking.ask("predict", pictures(3, seed=1))
    assert len(answered.answers.predicted) == 3
    assert np.allclose(np.sum(answered.answers.scores, axis=1), 1, atol=1e-4)
    assert answered.answers.model == asking.world.run.model_digest
    assert (answered.traces, answered.envelopes) == ((), ())
    assert answered.claims.simulated


def test_a_trace_is_signed_and_of_this_very_input(asking: Asking) -> None:
    inputs = pictures(2, seed=2)
    answered = asking.ask("trace", inputs)
    key = asking.world.manifest.enclave_signing_key
    for index, (trace, envelope) in enumerate(zip(answered.traces, answered.envelopes, strict=True)):
        assert open_envelope(envelope, "trace", key, TraceStatement, step="test") == trace
        assert trace.index == index
        assert trace.input_commitment == input_commitment(trace.nonce, inputs[index])
        assert len(trace.neighbours) > 0


def test_the_evidence_is_kept_for_a_dispute(asking: Asking) -> None:
    answered = asking.ask("trace", pictures(1, seed=2))
    assert answered.evidence.binding.nonce == answered.traces[0].nonce
    assert answered.evidence.binding.signing_key == asking.world.manifest.enclave_signing_key


def test_what_crosses_holds_no_input(asking: Asking) -> None:
    inputs = pictures(2, seed=3)
    asking.ask("predict", inputs)
    for body in asking.host.bodies:
        assert inputs[0].tobytes() not in body
        assert inputs[0].tobytes().hex().encode() not in body


def test_each_question_has_a_nonce_and_a_key_of_its_own(asking: Asking) -> None:
    nonces = {asking.ask("trace", pictures(1, seed=4)).traces[0].nonce for _ in range(3)}
    assert len(nonces) == 3


# -- before anything is sent -------------------------------------------------------------------------------------


def test_a_stranger_asks_for_nothing(asking: Asking) -> None:
    asking.refused(AccessError, "user.unknown", requests=0, user="mallory")
    asking.refused(AccessError, "user.unknown", requests=0, user="alpha")


def test_a_user_with_another_key_asks_for_nothing(asking: Asking) -> None:
    asking.signer = SigningKey()
    asking.refused(AccessError, "user.other-key", requests=0)


INPUTS: dict[str, tuple[Pixels, str]] = {
    "of another element type": (pictures(1, seed=1, dtype="f32"), "ask.shape"),
    "of another shape": (pictures(1, seed=1).reshape(1, 1, 2, 8), "ask.shape"),
    "not in a batch": (pictures(1, seed=1)[0], "ask.shape"),
    "big-endian": (pictures(1, seed=1).astype(">u2"), "ask.shape"),
    "none": (pictures(1, seed=1)[:0], "ask.count"),
    "too many": (np.zeros((1025, 1, 4, 4), np.uint8), "ask.count"),
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_that_do_not_fit_ask_for_nothing(asking: Asking, what: str) -> None:
    inputs, code = INPUTS[what]
    asking.refused(DataError, code, requests=0, inputs=inputs)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 32, 32), (3, 64, 64), (3, 224, 224), (3, 1024, 1024)])
def test_as_much_as_may_be_asked_fits_into_one_message(asking: Asking, shape: tuple[int, int, int]) -> None:
    data = msgspec.structs.replace(asking.plan.data, shape=shape)
    asking.plan = msgspec.structs.replace(asking.plan, data=data)
    most = most_at_once(asking.plan)
    assert most >= 1
    inputs = np.zeros((most, *shape), np.uint8)
    sent: list[int] = []

    def count(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return asking_bundle(asking, request)
        sent.append(len(request.read()))
        return httpx.Response(500, content=b"enough")

    asking.host.handle = count  # type: ignore[method-assign]
    with refused(ProtocolError, "host.garbage"):
        asking.ask("predict", inputs)
    assert sent[0] <= MAX_ENVELOPE_BYTES
    if most < 1024:
        grown = np.zeros((most + 1, *shape), np.uint8)
        with refused(DataError, "ask.count"):
            asking.ask("predict", grown)
        assert sent[0] > MAX_ENVELOPE_BYTES * 0.9 - inputs.nbytes / most * 2


def asking_bundle(asking: Asking, request: httpx.Request) -> httpx.Response:
    """Evidence of the world's enclave for whatever plan the user has."""
    bundle = asking.world.attest("query", nonce=request.url.params["nonce"])
    binding = msgspec.structs.replace(bundle.binding, plan=asking.plan.digest())
    attester = SimulatedAttester(asking.world.root, measurement=MEASUREMENT)
    found = EvidenceBundle(binding=binding, evidence=attester.evidence(binding.report_data()))
    return httpx.Response(200, content=msgspec.json.encode(found))


# -- evidence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"purpose": "training"}, "evidence.other-purpose"),
        ({"plan": OTHER}, "evidence.other-plan"),
        ({"nonce": "ab" * 32}, "evidence.other-nonce"),
    ],
)
def test_evidence_for_something_else_gets_no_question(asking: Asking, changes: dict[str, Any], code: str) -> None:
    def edited(body: bytes) -> bytes:
        bundle = msgspec.json.decode(body, type=EvidenceBundle)
        binding = msgspec.structs.replace(bundle.binding, **changes)
        attester = SimulatedAttester(asking.world.root, measurement=MEASUREMENT)
        return msgspec.json.encode(EvidenceBundle(binding=binding, evidence=attester.evidence(binding.report_data())))

    asking.host.edit["/v1/attestation"] = edited
    asking.refused(AttestationError, code, requests=1)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"allow_simulated": False}, "evidence.simulated"),
        ({"measurements": ("sha384:" + "cd" * 48,)}, "evidence.other-measurement"),
        ({"simulated_roots": (SigningKey().public,)}, "evidence.unknown-root"),
    ],
)
def test_an_enclave_that_the_policy_does_not_accept_gets_no_question(
    asking: Asking, changes: dict[str, Any], code: str
) -> None:
    asking.policy = msgspec.structs.replace(asking.policy, **changes)
    asking.refused(AttestationError, code, requests=1)


def test_a_program_that_we_accept_but_the_plan_does_not_name_gets_no_question(asking: Asking) -> None:
    other = "sha384:" + "cd" * 48
    asking.policy = msgspec.structs.replace(asking.policy, measurements=(*asking.policy.measurements, other))

    def edited(body: bytes) -> bytes:
        binding = msgspec.json.decode(body, type=EvidenceBundle).binding
        attester = SimulatedAttester(asking.world.root, measurement=other)
        return msgspec.json.encode(EvidenceBundle(binding=binding, evidence=attester.evidence(binding.report_data())))

    asking.host.edit["/v1/attestation"] = edited
    asking.refused(AttestationError, "evidence.not-the-plans", requests=1)


def test_evidence_with_the_hosts_own_key_gets_no_question(asking: Asking) -> None:
    def edited(body: bytes) -> bytes:
        bundle = msgspec.json.decode(body, type=EvidenceBundle)
        binding = msgspec.structs.replace(bundle.binding, signing_key=SigningKey().public)
        return msgspec.json.encode(msgspec.structs.replace(bundle, binding=binding))

    asking.host.edit["/v1/attestation"] = edited
    asking.refused(AttestationError, "evidence.other-key", requests=1)


@pytest.mark.parametrize("garbage", [b"", b"<html>", b"{}", b"null"])
def test_evidence_without_form_gets_no_question(asking: Asking, garbage: bytes) -> None:
    asking.host.edit["/v1/attestation"] = lambda _: garbage
    asking.refused(ProtocolError, "host.garbage", requests=1)


# -- answers -----------------------------------------------------------------------------------------------------


class Forger:
    """Answers in the enclave's place, with the enclave's own keys: what a broken enclave could say."""

    def __init__(self, asking: Asking, change: Callable[[Answers, Forger], Answers]) -> None:
        self.world, self._change = asking.world, change
        self._asking = asking
        self._bindings: dict[str, Any] = {}

    def install(self) -> None:
        """Answer the next question."""
        self._asking.host.edit[QUERY] = self._answer

    def _answer(self, honest: bytes) -> bytes:
        envelope = msgspec.json.decode(self._asking.host.bodies[-1], type=Envelope)
        message = open_envelope(envelope, "query", self._asking.signer.public, SealedMessage, step="test")
        binding = self._bindings[message.nonce]
        vault = self.world.run.vault
        question = open_message(message, Question, binding=binding, key=vault.encryption, step="test")
        context = transcript_digest(binding, "una")
        answers = open_for(question.answer_key, "answer/v1", honest, Answers, context=context, step="test")
        return seal_for(question.answer_key, "answer/v1", self._change(answers, self), context=context)

    def watch(self) -> Forger:
        """Remember the bindings that are given out."""

        def remember(body: bytes) -> bytes:
            binding = msgspec.json.decode(body, type=EvidenceBundle).binding
            self._bindings[binding.nonce] = binding
            return body

        self._asking.host.edit["/v1/attestation"] = remember
        return self

    def retraced(self, answers: Answers, *, signer: SigningKey | None = None, **changes: Any) -> Answers:
        """The answers with the second trace changed and signed anew."""
        signing = self.world.run.vault.signing
        trace = open_envelope(answers.traces[1], "trace", signing.public, TraceStatement, step="test")
        changed = (signer or signing).sign("trace", msgspec.structs.replace(trace, **changes))
        return msgspec.structs.replace(answers, traces=(answers.traces[0], changed, *answers.traces[2:]))

    def rejudged(self, answers: Answers, *, signer: SigningKey | None = None, **changes: Any) -> Answers:
        """The answers with the verdict changed and signed anew."""
        signing, envelope = self.world.run.vault.signing, answers.verdict
        assert envelope is not None
        verdict = open_envelope(envelope, "verdict", signing.public, VerdictStatement, step="test")
        changed = (signer or signing).sign("verdict", msgspec.structs.replace(verdict, **changes))
        return msgspec.structs.replace(answers, verdict=changed)


def says(**changes: Any) -> Callable[[Answers, Forger], Answers]:
    """Answers with other fields."""
    return lambda answers, _: msgspec.structs.replace(answers, **changes)


def retraced(**changes: Any) -> Callable[[Answers, Forger], Answers]:
    """Answers with another second trace."""
    return lambda answers, forger: forger.retraced(answers, **changes)


def rejudged(**changes: Any) -> Callable[[Answers, Forger], Answers]:
    """Answers with another verdict."""
    return lambda answers, forger: forger.rejudged(answers, **changes)


ANSWERS: dict[str, tuple[Callable[[Answers, Forger], Answers], str]] = {
    "of another model": (says(model=OTHER), "answer.mismatch"),
    "for fewer inputs": (says(predicted=(0, 1)), "answer.mismatch"),
    "for more inputs": (says(predicted=(0, 1, 2, 0)), "answer.mismatch"),
    "with a trace too few": (
        lambda answers, _: msgspec.structs.replace(answers, traces=answers.traces[:2]),
        "answer.mismatch",
    ),
    "with a trace too many": (
        lambda answers, _: msgspec.structs.replace(answers, traces=(*answers.traces, answers.traces[0])),
        "answer.mismatch",
    ),
    "without traces": (says(traces=()), "answer.mismatch"),
    "with traces in another order": (
        lambda answers, _: msgspec.structs.replace(answers, traces=answers.traces[::-1]),
        "answer.mismatch",
    ),
    "with a trace of another model": (retraced(model=OTHER), "answer.mismatch"),
    "with a trace for another user": (retraced(user="pat"), "answer.mismatch"),
    "with a trace for another nonce": (retraced(nonce="ab" * 32), "answer.mismatch"),
    "with a trace of another input": (retraced(input_commitment=OTHER), "answer.mismatch"),
    "with a trace of another place": (retraced(index=2), "answer.mismatch"),
    "with a trace of another class": (retraced(predicted=99), "answer.mismatch"),
    "with a trace of any class": (retraced(any_label=True), "answer.mismatch"),
    "with a trace of one contributor": (retraced(contributors=("beta",)), "answer.mismatch"),
    "with a trace by another method": (retraced(method="trak"), "answer.mismatch"),
    "with a trace that somebody else signed": (retraced(signer=SigningKey()), "signature.invalid"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_does_not_fit_its_question_is_refused(asking: Asking, what: str) -> None:
    change, code = ANSWERS[what]
    Forger(asking, change).watch().install()
    asking.refused(IntegrityError, code, requests=2)


MISSHAPEN = SuspectRecords(party="alpha", shard="0" * 32, leaves=(1, 2), commitments="AAAA")
VERDICTS: dict[str, tuple[Callable[[Answers, Forger], Answers], str]] = {
    "without a verdict": (says(verdict=None), "answer.mismatch"),
    "with traces besides": (says(traces=(SigningKey().sign("trace", {}),)), "signature.invalid"),
    "for fewer inputs": (says(predicted=(0, 1)), "answer.mismatch"),
    "with a verdict on other predictions": (rejudged(predicted=(9, 9, 9)), "answer.mismatch"),
    "with a verdict of another model": (rejudged(model=OTHER), "answer.mismatch"),
    "with a verdict for another user": (rejudged(user="pat"), "answer.mismatch"),
    "with a verdict for another nonce": (rejudged(nonce="ab" * 32), "answer.mismatch"),
    "with a verdict on more inputs": (rejudged(inputs=4), "answer.mismatch"),
    "with a kind too few": (rejudged(kinds=("hard", "hard")), "answer.mismatch"),
    "with a verdict on other inputs": (rejudged(input_commitment=OTHER), "answer.mismatch"),
    "with records that cannot be read": (rejudged(suspects=(MISSHAPEN,)), "verdict.malformed"),
    "with a verdict that somebody else signed": (rejudged(signer=SigningKey()), "signature.invalid"),
}


@pytest.mark.parametrize("what", VERDICTS)
def test_a_verdict_that_does_not_fit_its_question_is_refused(asking: Asking, what: str) -> None:
    change, code = VERDICTS[what]
    Forger(asking, change).watch().install()
    asking.refused(IntegrityError, code, requests=2, kind="verdict")


def test_a_verdict_is_signed_and_on_these_very_inputs(asking: Asking) -> None:
    Forger(asking, lambda answers, _: answers).watch().install()
    inputs = pictures(3, seed=9)
    answered = asking.ask("verdict", inputs)
    (verdict,), (envelope,) = answered.verdicts, answered.envelopes
    key = asking.world.manifest.enclave_signing_key
    assert open_envelope(envelope, "verdict", key, VerdictStatement, step="test") == verdict
    assert verdict.input_commitment == inputs_root(input_commitment(verdict.nonce, x) for x in inputs)
    assert (answered.traces, answered.answers.traces) == ((), ())


def test_traces_to_a_prediction_are_refused(asking: Asking) -> None:
    traces = asking.ask("trace", pictures(3, seed=9)).envelopes
    asking.host.requests.clear()
    Forger(asking, says(traces=traces)).watch().install()
    asking.refused(IntegrityError, "answer.mismatch", requests=2, kind="predict")


def test_an_honest_answer_through_the_same_hands_is_believed(asking: Asking) -> None:
    Forger(asking, lambda answers, _: answers).watch().install()
    assert len(asking.ask("trace", pictures(3, seed=9)).traces) == 3


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda _: b"", lambda _: b"<html>"])
def test_an_answer_that_the_host_touched_does_not_open(asking: Asking, change: Callable[[bytes], bytes]) -> None:
    asking.host.edit[QUERY] = change
    asking.refused(IntegrityError, "sealed.not-authentic", requests=2)


def test_the_answer_to_an_earlier_question_does_not_open(asking: Asking) -> None:
    kept: list[bytes] = []

    def keep(raw: bytes) -> bytes:
        kept.append(raw)
        return kept[0]

    asking.host.edit[QUERY] = keep
    asking.ask("trace", pictures(3, seed=9))
    asking.host.requests.clear()
    asking.refused(IntegrityError, "sealed.not-authentic", requests=2)


def test_an_answer_without_end_is_not_read(asking: Asking) -> None:
    asking.host.edit[QUERY] = lambda _: bytes(MAX_SEALED + 1)
    asking.refused(ProtocolError, "host.garbage", requests=2)


def test_the_hosts_refusal_reaches_the_user() -> None:
    asking = Asking(World(budget=2).run_to(State.LINKED))
    asking.ask("predict", pictures(2, seed=1))
    with refused(AccessError, "user.budget-spent"):
        asking.ask("predict", pictures(1, seed=1))


def test_the_commitment_to_an_input_depends_on_nonce_and_pixels() -> None:
    one, other = pictures(2, seed=1)
    commitments = {
        input_commitment("ab" * 32, one),
        input_commitment("cd" * 32, one),
        input_commitment("ab" * 32, other),
    }
    assert len(commitments) == 3
    assert input_commitment("ab" * 32, np.asfortranarray(one)) in commitments
