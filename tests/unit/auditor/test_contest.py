"""What contributors answer to a trace: every way is decided, record by record, and it is said who is wrong."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.attestation.evidence import Evidence
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.auditor.bundle import TraceBundle, Verified, check_input, judge_bundle, read_bundle, verify_bundle
from caltrain.auditor.collect import encode_bundle
from caltrain.auditor.contest import Outcome
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import AccessError, AttestationError, CaltrainError, IntegrityError, LineageError
from caltrain.plan import Plan, Reader
from caltrain.provenance.chain import Chain
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure, Refusal
from caltrain.records.shown import Reading, seal_disclosure
from support.bundles import INPUT, disclosed, statement_of, traced_world
from support.folders import policy_of
from support.samples import refused
from support.world import MEASUREMENT, pictures

OTHER = "sha256:" + "0" * 64
UNA, AUDITOR = (Reading(name, HpkePrivateKey()) for name in ("una", "auditor"))
READERS = {reading.name: reading.key.public for reading in (UNA, AUDITOR)}


def for_readers(plan: Plan) -> Plan:
    readers = tuple(Reader(name=name, encryption_key=key) for name, key in READERS.items())
    return msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, disclose_to=readers))


class Case:
    """A bundle without disclosures, and what its contributors can answer."""

    def __init__(self, *, sealed: bool = False) -> None:
        self.world, self.bundle = traced_world(change=for_readers) if sealed else traced_world()
        self.trace, self.model = statement_of(self.bundle), self.world.run.model_digest
        self.named = [n.record for n in self.trace.neighbours]
        self.policy = policy_of(self.world)

    def judge(self, *answers: Envelope, reading: Reading | None = None, **changes: Any) -> Verified:
        return judge_bundle(
            msgspec.structs.replace(self.bundle, disclosures=answers, **changes),
            plan_digest=self.world.plan.digest(),
            policy=self.policy,
            reading=reading,
        )

    def outcomes(self, *answers: Envelope, reading: Reading | None = None) -> list[Outcome]:
        return [decision.outcome for decision in self.judge(*answers, reading=reading).decisions]

    def sign(self, party: str, kind: str, value: object) -> Envelope:
        return self.world.parties[party].signer.sign(kind, value)

    def refusal(self, reference: RecordRef, *, by: str = "", **changes: Any) -> Envelope:
        refusal = Refusal(record_ref=reference, model=self.model)
        return self.sign(by or reference.party, "refusal", msgspec.structs.replace(refusal, **changes))

    def honest(self, reference: RecordRef) -> Disclosure:
        key = self.world.parties[reference.party].signer.public
        return open_envelope(disclosed(self.world, reference), "disclosure", key, Disclosure, step="test")

    def told(self, reference: RecordRef, **changes: Any) -> Envelope:
        return self.sign(reference.party, "disclosure", msgspec.structs.replace(self.honest(reference), **changes))

    def sealed(
        self,
        reference: RecordRef,
        inner: Envelope | None = None,
        *,
        model: str = "",
        readers: Mapping[str, str] = READERS,
    ) -> Envelope:
        envelope = inner or disclosed(self.world, reference)
        sealed = seal_disclosure(envelope, reference, model=model or self.model, readers=readers)
        return self.sign(reference.party, "sealed-disclosure", sealed)

    def retraced(self, **first: Any) -> Envelope:
        """The trace as an enclave would sign it that says something else of its first neighbour."""
        changed = msgspec.structs.replace(self.trace.neighbours[0], **first)
        trace = msgspec.structs.replace(self.trace, neighbours=(changed, *self.trace.neighbours[1:]))
        return self.world.run.vault.signing.sign("trace", trace)

    def refused(self, family: type[CaltrainError], code: str, *answers: Envelope, **options: Any) -> None:
        """Neither judged nor verified."""
        with refused(family, code):
            self.judge(*answers, **options)


@cache
def plain() -> Case:
    """One for all tests: nobody changes it."""
    return Case()


@cache
def private() -> Case:
    """One whose plan names readers."""
    return Case(sealed=True)


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


# -- who says what, and who is wrong -----------------------------------------------------------------------------


def test_who_says_nothing_and_who_refuses_is_listed() -> None:
    case = plain()
    rest: list[Outcome] = ["undisclosed"] * (len(case.named) - 2)
    assert case.outcomes(disclosed(case.world, case.named[0]), case.refusal(case.named[1])) == [
        "disclosed",
        "refused",
        *rest,
    ]
    verified = case.judge(case.refusal(case.named[1]))
    assert verified.undisclosed == tuple(case.named)
    assert verified.records == {}
    assert [d.rank for d in verified.decisions] == [n.rank for n in case.trace.neighbours]


def other_record(case: Case, reference: RecordRef) -> bytes:
    shard = next(s for s in case.world.parties[reference.party].shards if s.header.shard == reference.shard)
    return shard.records[(reference.leaf + 1) % len(shard.records)]


WRONG: dict[str, tuple[Callable[[Case, RecordRef], Envelope], Outcome, str]] = {
    "another record": (
        lambda c, r: c.told(r, record=b64(other_record(c, r))),
        "substituted",
        "disclosure.substituted",
    ),
    "another salt": (lambda c, r: c.told(r, salt=b64(bytes(32))), "substituted", "disclosure.substituted"),
    "nonsense": (lambda c, r: c.told(r, record="?"), "substituted", "disclosure.malformed"),
    "a proof of another": (
        lambda c, r: c.told(r, proof=c.honest(r).proof[::-1]),
        "not-in-shard",
        "disclosure.not-in-shard",
    ),
    "a proof without form": (
        lambda c, r: c.told(r, proof=c.honest(r).proof[1:]),
        "not-in-shard",
        "merkle.malformed-proof",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_contributor_signs_falsely_is_its_own_fault_and_the_other_records_are_decided(what: str) -> None:
    case = plain()
    first, second = next((a, b) for a in case.named for b in case.named if a != b)
    make, outcome, code = WRONG[what]
    answers = (make(case, first), disclosed(case.world, second))
    judged = case.judge(*answers)
    by_record = {decision.record: decision for decision in judged.decisions}
    assert (by_record[first].outcome, by_record[second].outcome) == (outcome, "disclosed")
    fault = by_record[first].fault
    assert fault is not None
    assert fault.code == code
    with refused(LineageError, code):
        verify_bundle(msgspec.structs.replace(case.bundle, disclosures=answers), plan_digest=case.world.plan.digest())


def test_a_false_answer_is_not_undone_by_another_one() -> None:
    case = plain()
    honest, false = disclosed(case.world, case.named[0]), case.told(case.named[0], salt=b64(bytes(32)))
    for answers in ((honest, false), (false, honest), (false, case.refusal(case.named[0]))):
        assert case.outcomes(*answers)[0] == "substituted"
    assert case.outcomes(case.refusal(case.named[0]), honest)[0] == "disclosed"


def test_an_enclave_that_names_something_else_than_was_sealed_is_disproved_by_the_contributor() -> None:
    case = plain()
    trace = case.retraced(commitment=OTHER)
    judged = case.judge(disclosed(case.world, case.named[0]), trace=trace)
    assert judged.decisions[0].outcome == "disproves"
    with refused(LineageError, "disclosure.disproves") as caught:
        verify_bundle(
            msgspec.structs.replace(case.bundle, trace=trace, disclosures=(disclosed(case.world, case.named[0]),)),
            plan_digest=case.world.plan.digest(),
        )
    assert "against the enclave" in caught.value.fix


def test_who_altered_the_record_after_sealing_disproves_nothing() -> None:
    """Neither what was sealed nor what the trace names: whatever the enclave says, the contributor is caught."""
    case = plain()
    altered = case.told(case.named[0], record=b64(other_record(case, case.named[0])))
    for trace in (case.bundle.trace, case.retraced(commitment=OTHER)):
        assert case.judge(altered, trace=trace).decisions[0].outcome == "substituted"


# -- what is no answer to this trace -----------------------------------------------------------------------------


def untraced(case: Case) -> RecordRef:
    return next(
        RecordRef(name, shard.header.shard, leaf)
        for name, party in case.world.parties.items()
        for shard in party.shards
        for leaf in range(len(shard.records))
        if RecordRef(name, shard.header.shard, leaf) not in case.named
    )


STRAY: dict[str, tuple[Callable[[Case], Envelope], type[CaltrainError], str]] = {
    "a disclosure of another record": (
        lambda c: disclosed(c.world, untraced(c)),
        LineageError,
        "disclosure.not-traced",
    ),
    "a disclosure for another model": (
        lambda c: c.told(c.named[0], model=OTHER),
        LineageError,
        "disclosure.other-model",
    ),
    "a refusal of another record": (lambda c: c.refusal(untraced(c)), LineageError, "disclosure.not-traced"),
    "a refusal for another model": (
        lambda c: c.refusal(c.named[0], model=OTHER),
        LineageError,
        "disclosure.other-model",
    ),
    "a refusal in another's name": (
        lambda c: c.refusal(c.named[0], by=next(p for p in c.world.parties if p != c.named[0].party)),
        LineageError,
        "disclosure.not-traced",
    ),
    "a refusal by nobody": (
        lambda c: SigningKey().sign("refusal", Refusal(record_ref=c.named[0], model=c.model)),
        LineageError,
        "disclosure.unknown-signer",
    ),
    "an approval": (
        lambda c: c.world.parties["alpha"].approve(c.world.plan),
        IntegrityError,
        "signature.invalid",
    ),
    "a refusal that is none": (
        lambda c: c.sign("alpha", "refusal", {"no": "thing"}),
        IntegrityError,
        "payload.malformed",
    ),
}


@pytest.mark.parametrize("what", STRAY)
def test_what_answers_no_record_of_this_trace_is_an_error(what: str) -> None:
    make, family, code = STRAY[what]
    case = plain()
    case.refused(family, code, make(case))


# -- for the plan's readers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [UNA, AUDITOR], ids=lambda reading: reading.name)
def test_readers_whom_the_plan_names_see_the_record_and_others_that_it_is_there(reading: Reading) -> None:
    case = private()
    answer = case.sealed(case.named[0])
    assert case.outcomes(answer)[0] == "sealed"
    assert case.judge(answer).records == {}
    shown = case.judge(answer, reading=reading)
    assert shown.decisions[0].outcome == "disclosed"
    shard = next(s for s in case.world.parties[case.named[0].party].shards if s.header.shard == case.named[0].shard)
    assert shown.records == {case.named[0]: shard.records[case.named[0].leaf]}


def test_nobody_else_opens_it_and_that_is_no_fault_of_the_contributor() -> None:
    case = private()
    for reading in (Reading("eve", HpkePrivateKey()), Reading("una", HpkePrivateKey()), Reading("eve", UNA.key)):
        for answers in ([case.sealed(case.named[0])], []):
            case.refused(AccessError, "disclosure.not-a-reader", *answers, reading=reading)


def test_who_reads_where_the_plan_has_no_readers_is_told_so() -> None:
    case = plain()
    case.refused(AccessError, "disclosure.not-a-reader", reading=UNA)


def test_a_record_in_clear_is_refused_where_the_plan_names_readers() -> None:
    case = private()
    case.refused(LineageError, "disclosure.not-sealed", disclosed(case.world, case.named[0]))
    case.refused(LineageError, "disclosure.not-sealed", disclosed(case.world, case.named[0]), reading=UNA)


def test_a_sealed_substitute_is_caught_by_its_readers() -> None:
    case = private()
    false = case.told(case.named[0], salt=b64(bytes(32)))
    answer = case.sealed(case.named[0], inner=false)
    assert case.outcomes(answer)[0] == "sealed"
    assert case.outcomes(answer, reading=UNA)[0] == "substituted"


INSIDE: dict[str, tuple[Callable[[Case], Envelope], str]] = {
    "another record": (
        lambda c: c.sealed(c.named[0], inner=disclosed(c.world, untraced_of(c, c.named[0].party))),
        "disclosure.other-inside",
    ),
    "another model": (
        lambda c: c.sealed(c.named[0], inner=c.told(c.named[0], model=OTHER)),
        "disclosure.other-inside",
    ),
    "what somebody else signed": (
        lambda c: c.sealed(c.named[0], inner=SigningKey().sign("disclosure", c.honest(c.named[0]))),
        "signature.invalid",
    ),
    "a refusal": (
        lambda c: c.sealed(c.named[0], inner=c.refusal(c.named[0])),
        "signature.invalid",
    ),
    "what is sealed to fewer readers than the plan names": (
        lambda c: c.sealed(c.named[0], readers={"auditor": AUDITOR.key.public}),
        "disclosure.not-for-you",
    ),
    "what is sealed under another key": (
        lambda c: c.sealed(c.named[0], readers=READERS | {"una": HpkePrivateKey().public}),
        "hpke.not-authentic",
    ),
}


def untraced_of(case: Case, party: str) -> RecordRef:
    return next(
        RecordRef(party, shard.header.shard, leaf)
        for shard in case.world.parties[party].shards
        for leaf in range(len(shard.records))
        if RecordRef(party, shard.header.shard, leaf) not in case.named
    )


@pytest.mark.parametrize("what", INSIDE)
def test_what_is_inside_must_be_what_the_outside_says_and_hides_no_other_answer(what: str) -> None:
    make, code = INSIDE[what]
    case = private()
    bad, other = make(case), case.named[1]
    found = case.judge(bad, case.sealed(other), reading=UNA)
    assert [d.outcome for d in found.decisions[:2]] == ["unreadable", "disclosed"]
    fault = found.decisions[0].fault
    assert fault is not None
    assert (fault.code, code in str(fault)) == ("disclosure.not-opened", True)
    assert list(found.records) == [other]
    with refused(LineageError, "disclosure.not-opened"):
        found.sound()
    assert case.outcomes(bad)[0] == "sealed", "who is no reader cannot tell"


def test_a_sealed_answer_for_another_model_is_no_answer() -> None:
    case = private()
    case.refused(LineageError, "disclosure.other-model", case.sealed(case.named[0], model=OTHER), reading=UNA)


# -- evidence and input ------------------------------------------------------------------------------------------


def test_the_evidence_is_appraised_by_the_auditors_own_policy() -> None:
    case = plain()
    assert case.judge().appraised
    assert not judge_bundle(case.bundle, plan_digest=case.world.plan.digest()).appraised


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"allow_simulated": False}, "evidence.simulated"),
        ({"simulated_roots": ()}, "evidence.unknown-root"),
        ({"measurements": ("sha384:" + "cd" * 48,)}, "evidence.other-measurement"),
    ],
)
def test_an_enclave_that_the_auditor_does_not_accept_proves_nothing(changes: dict[str, Any], code: str) -> None:
    case = plain()
    policy = msgspec.structs.replace(case.policy, **changes)
    with refused(AttestationError, code):
        judge_bundle(case.bundle, plan_digest=case.world.plan.digest(), policy=policy)


def attested(case: Case, *, measurement: str = MEASUREMENT, **changes: Any) -> Any:
    """Sound evidence for another binding."""
    binding = msgspec.structs.replace(case.bundle.evidence.binding, **changes)
    attester = SimulatedAttester(case.world.root, measurement=measurement)
    return msgspec.structs.replace(
        case.bundle.evidence, binding=binding, evidence=attester.evidence(binding.report_data())
    )


@pytest.mark.parametrize(
    "changes",
    [{"purpose": "training"}, {"plan": OTHER}, {"nonce": "ab" * 32}, {"signing_key": SigningKey(bytes(32)).public}],
    ids=lambda changes: next(iter(changes)),
)
def test_evidence_for_something_else_is_refused_with_and_without_a_policy(changes: dict[str, Any]) -> None:
    case = plain()
    evidence = attested(case, **changes)
    case.refused(LineageError, "bundle.other-evidence", evidence=evidence)
    with refused(LineageError, "bundle.other-evidence"):
        judge_bundle(msgspec.structs.replace(case.bundle, evidence=evidence), plan_digest=case.world.plan.digest())


def test_a_program_that_the_auditor_accepts_and_the_plan_does_not_name_is_refused() -> None:
    case, other = plain(), "sha384:" + "cd" * 48
    policy = msgspec.structs.replace(case.policy, measurements=(MEASUREMENT, other))
    bundle = msgspec.structs.replace(case.bundle, evidence=attested(case, measurement=other))
    with refused(AttestationError, "evidence.not-the-plans"):
        judge_bundle(bundle, plan_digest=case.world.plan.digest(), policy=policy)


def test_evidence_that_signs_something_else_is_refused() -> None:
    case = plain()
    evidence = msgspec.structs.replace(case.bundle.evidence, evidence=attested(case, nonce="ab" * 32).evidence)
    case.refused(AttestationError, "evidence.other-key", evidence=evidence)
    blank = msgspec.structs.replace(case.bundle.evidence, evidence=Evidence(kind="simulated", blob=""))
    case.refused(AttestationError, "evidence.malformed", evidence=blank)


def test_who_shows_the_input_shows_which_one_it_was() -> None:
    case = plain()
    verified = case.judge()
    both = np.concatenate((pictures(2, seed=5), INPUT))
    assert check_input(verified, INPUT) == 0
    assert check_input(verified, both) == 2
    for other in (both[:2], INPUT[:, :, ::-1], INPUT[:0], INPUT.astype(np.float32)):
        with refused(LineageError, "bundle.other-input"):
            check_input(verified, other)


@pytest.mark.parametrize("changes", [{"user": "pat"}, {"model": OTHER}])
def test_the_chain_must_hold_the_question_where_it_was_asked(changes: dict[str, str]) -> None:
    case = plain()
    body = {"user": case.trace.user, "model": case.model} | changes
    events = [e for e in case.world.chain() if e.kind != "query"]
    chain = Chain(case.world.run.vault.signing, run=case.world.manifest.run)
    rewritten = [chain.append(event.kind, event.body) for event in events]
    assert chain.head == case.trace.head
    case.refused(LineageError, "bundle.other-chain", chain=tuple(rewritten))  # the end is cut off
    case.refused(LineageError, "bundle.other-chain", chain=(*rewritten, chain.append("query", body)))


def test_another_event_in_the_questions_place_is_refused() -> None:
    case = plain()
    chain = Chain(case.world.run.vault.signing, run=case.world.manifest.run)
    events = [chain.append(e.kind, e.body) for e in case.world.chain() if e.kind != "query"]
    other = chain.append("disclosure", {"user": case.trace.user, "model": case.model})
    case.refused(LineageError, "bundle.other-chain", chain=(*events, other))


# -- no byte can be another one ----------------------------------------------------------------------------------


def whole(sealed: bool) -> tuple[Case, TraceBundle]:
    case = private() if sealed else plain()
    first = case.sealed(case.named[0]) if sealed else disclosed(case.world, case.named[0])
    return case, msgspec.structs.replace(case.bundle, disclosures=(first, case.refusal(case.named[1])))


@pytest.mark.parametrize("sealed", [False, True])
def test_no_byte_of_any_part_of_a_bundle_can_be_another_one(sealed: bool, tmp_path: Path) -> None:
    """Every part of the file is hit, whatever its length; with the policy the evidence, too."""
    case, bundle = whole(sealed)
    raw, path, draw = encode_bundle(bundle), tmp_path / "bundle.json", random.Random(2)
    fields: dict[str, msgspec.Raw] = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    assert set(fields) == set(TraceBundle.__struct_fields__)
    for name, content in fields.items():
        start = raw.index(f'"{name}":'.encode()) - 1
        places = range(start, start + len(name) + 4 + len(bytes(content)))
        for at in draw.sample(places, min(len(places), 60)):
            changed = bytearray(raw)
            changed[at] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(CaltrainError) as caught:
                verify_bundle(
                    read_bundle(path),
                    plan_digest=case.world.plan.digest(),
                    head=case.world.run.chain.head,
                    policy=case.policy,
                    reading=UNA if sealed else None,
                )
            assert caught.value.code, (name, at)
