"""A bundle with a verdict: the same steps as for a trace, and disclosures of the records that it names."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import msgspec
import pytest

from caltrain.auditor.bundle import TraceBundle, verify_bundle
from caltrain.auditor.left_out import check_left_out
from caltrain.auditor.verdict import VerifiedVerdict, check_inputs, judge_verdict, verify_verdict
from caltrain.crypto.digests import to_raw
from caltrain.crypto.dsse import SigningKey
from caltrain.enclave import verdict as inside
from caltrain.enclave.run import State
from caltrain.errors import CaltrainError, IntegrityError, LineageError
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Refusal
from support.bundles import disclosed, traced_world
from support.repairs import FEW, entry, quarantine_of, repaired
from support.samples import refused
from support.verdicts import restated, somebody, verdict_bundle
from support.world import World, pictures

OTHER = "sha256:" + "0" * 64


@cache
def judged() -> tuple[World, TraceBundle]:
    """A world, and a verdict that names two records of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "judge", lambda *_: somebody([2, 14]))
        world = World(epochs=1).run_to(State.LINKED)
        return world, verdict_bundle(world)


def verified(bundle: TraceBundle, *, head: str | None = None) -> VerifiedVerdict:
    return verify_verdict(bundle, plan_digest=judged()[0].plan.digest(), head=head)


def named() -> list[RecordRef]:
    return [*verified(judged()[1]).verdict.records()]


def test_a_sound_verdict_says_what_it_proves() -> None:
    world, bundle = judged()
    found = verified(bundle, head=world.chain()[-1].digest())
    assert (found.plan, found.run, found.model) == (world.plan.digest(), world.manifest.run, world.run.model_digest)
    assert found.verdict.responsible == ("beta",)
    assert (found.records, found.events) == ({}, len(bundle.chain))
    assert (found.simulated, found.center_audited, found.audit_rate, found.resumes) == (True, False, 0.0, 0)
    assert found.head == world.chain()[-1].digest()
    assert not found.front_public
    assert msgspec.structs.replace(found, audit_rate=0.1).center_audited


def test_records_that_the_verdict_names_can_be_disclosed() -> None:
    world, bundle = judged()
    bundle = msgspec.structs.replace(bundle, disclosures=tuple(disclosed(world, record) for record in named()))
    found = verified(bundle)
    assert set(found.records) == set(named())


def test_a_record_that_the_verdict_does_not_name_is_no_answer_to_it() -> None:
    world, bundle = judged()
    shards = [(name, shard) for name, party in world.parties.items() for shard in party.shards]
    every = {RecordRef(name, s.header.shard, leaf) for name, s in shards for leaf in range(len(s.records))}
    other = min(every - set(named()))
    bundle = msgspec.structs.replace(bundle, disclosures=(disclosed(world, other),))
    with refused(LineageError, "disclosure.not-traced"):
        verified(bundle)


def test_another_record_in_its_place_is_refused() -> None:
    world, bundle = judged()
    record = named()[0]
    shard = next(s for s in world.parties[record.party].shards if s.header.shard == record.shard)
    forged = bytes([shard.records[record.leaf][0], *shard.records[record.leaf][1:-1], 77])
    bundle = msgspec.structs.replace(bundle, disclosures=(disclosed(world, record, record=forged),))
    with refused(LineageError, "disclosure.substituted"):
        verified(bundle)


def test_who_answered_what_is_decided_record_by_record() -> None:
    world, bundle = judged()
    first, second = named()
    refusal = world.parties[first.party].signer.sign("refusal", Refusal(record_ref=first, model=world.run.model_digest))
    answers = (refusal, disclosed(world, second, record=b"another"))
    found = judge_verdict(msgspec.structs.replace(bundle, disclosures=answers), plan_digest=world.plan.digest())
    assert [decision.outcome for decision in found.decisions] == ["refused", "substituted"]
    assert [decision.rank for decision in found.decisions] == [1, 2]


def test_the_inputs_are_shown_all_and_in_order() -> None:
    found, inputs = verified(judged()[1]), pictures(3, seed=99)
    check_inputs(found, inputs)
    for others in (inputs[::-1], inputs[:2], pictures(3, seed=98)):
        with refused(LineageError, "verdict.other-inputs"):
            check_inputs(found, others)


def test_a_record_that_a_verdict_names_was_not_left_out() -> None:
    world = repaired(epochs=1).run_to(State.LINKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "judge", lambda *_: somebody([2, 14]))
        found = verify_verdict(verdict_bundle(world), plan_digest=world.plan.digest())
    out = quarantine_of(world)
    check_left_out(found, out.encode(), commitments=[entry(world, FEW[0]).commitment])
    first, *others = found.verdict.suspects
    text = base64.b64encode(to_raw(entry(world, FEW[0]).commitment)).decode()
    suspects = (msgspec.structs.replace(first, leaves=first.leaves[:1], commitments=text), *others)
    said = msgspec.structs.replace(found.verdict, suspects=suspects)
    with refused(LineageError, "quarantine.traced"):
        check_left_out(msgspec.structs.replace(found, verdict=said), out.encode())


CHANGES: dict[str, tuple[dict[str, Any], type[CaltrainError], str]] = {
    "of another model": ({"model": OTHER}, LineageError, "bundle.other-model"),
    "of another run": ({"run": "0" * 32}, LineageError, "bundle.other-model"),
    "of another chain": ({"head": OTHER}, LineageError, "bundle.other-chain"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_verdict_of_something_else_is_refused(name: str) -> None:
    changes, family, code = CHANGES[name]
    with refused(family, code):
        verified(restated(*judged(), **changes))


def test_a_verdict_that_the_enclave_did_not_sign_is_refused() -> None:
    _, bundle = judged()
    forged = SigningKey().sign("verdict", verified(bundle).verdict)
    with refused(IntegrityError, "signature.invalid"):
        verified(msgspec.structs.replace(bundle, trace=forged))


def test_a_trace_is_no_verdict_and_a_verdict_no_trace() -> None:
    world, bundle = judged()
    with refused(IntegrityError, "signature.invalid"):
        verify_bundle(bundle, plan_digest=world.plan.digest())
    traced, trace = traced_world()
    with refused(IntegrityError, "signature.invalid"):
        verify_verdict(trace, plan_digest=traced.plan.digest())
    assert bundle.trace.claims("verdict")
    assert not trace.trace.claims("verdict")


def test_another_plan_or_a_chain_cut_short_is_refused() -> None:
    _, bundle = judged()
    with refused(LineageError, "bundle.other-plan"):
        verify_verdict(bundle, plan_digest=OTHER)
    with refused(LineageError, "chain.other-head"):
        verified(bundle, head=OTHER)
    with refused(LineageError, "bundle.not-in-chain"):
        verified(msgspec.structs.replace(bundle, chain=bundle.chain[:5]))


def test_records_of_the_verdict_that_cannot_be_read_are_refused() -> None:
    world, bundle = judged()
    first, *others = verified(bundle).verdict.suspects
    broken = (msgspec.structs.replace(first, commitments="AAAA"), *others)
    with refused(IntegrityError, "verdict.malformed"):
        verified(restated(world, bundle, suspects=broken))
