"""A verdict: what is judged, what is said of it and how exactly, and that its length says nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from caltrain.accountability.cases import Dossier, Mispredictions, Verdict
from caltrain.accountability.outcomes import Kind
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import MAX_SEALED, Answers
from caltrain.crypto.digests import canonical_json, digest, to_text
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, SigningKey
from caltrain.crypto.merkle import merkle_root
from caltrain.enclave import evidence as links
from caltrain.enclave import verdict as module
from caltrain.enclave.run import State, present
from caltrain.exposure.figures import Estimate
from caltrain.plan import Plan
from caltrain.provenance import verdict as statements
from caltrain.records.commitment import RecordRef
from caltrain.records.shard import MAX_SHARD_RECORDS
from caltrain.training.spec import CenterSpec
from support.oracle import known_records, released_model
from support.verdicts import NOBODY, asked_for_verdict, somebody
from support.world import PARTIES, World, pictures

DIGEST = "sha256:" + "0" * 64
Judged = list[tuple[Dossier, Mispredictions]]


def linked(**options: Any) -> World:
    return World(**({"epochs": 1} | options)).run_to(State.LINKED)


def judged_as(patch: pytest.MonkeyPatch, found: Callable[[], Verdict]) -> Judged:
    """From now on every verdict is this one; what it was asked about is kept."""
    asked: Judged = []

    def judge(dossier: Dossier, mispredictions: Mispredictions) -> Verdict:
        asked.append((dossier, mispredictions))
        return found()

    patch.setattr(module, "judge", judge)
    return asked


def test_a_verdict_is_judged_on_every_record_and_on_these_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, world = judged_as(monkeypatch, lambda: NOBODY), linked()
    _, answers, _ = asked_for_verdict(world)
    ((dossier, mispredictions),) = asked
    links, known = dossier.links, known_records(world, released_model(world))
    assert links.contributors == PARTIES
    assert len(links.labels) == len(known) == 27
    table = present(world.run.linkage).table(world.run.model_digest, limit=1 << 20)
    for row in range(27):
        own = next(k for k in known if k.reference == table.record(row))
        assert int(links.labels[row]) == own.label
        assert links.contributors[int(links.sources[row])] == own.reference.party
        assert table.commitments[row].tobytes() == own.commitment
        np.testing.assert_allclose(links.fingerprints[row].numpy(), own.fingerprint, atol=3e-4)
    torch.testing.assert_close(links.fingerprints.norm(dim=1), torch.ones(27))
    assert tuple(mispredictions.predicted.tolist()) == answers.predicted
    assert mispredictions.fingerprints.shape == (3, links.fingerprints.shape[1])


def test_the_witness_speaks_of_the_record_of_the_same_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, world = judged_as(monkeypatch, lambda: NOBODY), linked()
    asked_for_verdict(world)
    dossier, _ = asked[0]
    contents, store = present(world.run.contents), present(world.run.linkage)
    table = store.table(world.run.model_digest, limit=1 << 20)
    hunted = World(epochs=1).run_to(State.HUNTED)
    order = [reference for reference, _ in present(hunted.run.passed).lines]
    by_leaf = {(r.party, shard_place(hunted, r), r.leaf): row for row, r in enumerate(order)}
    rows = torch.tensor([by_leaf[r.party, shard_place(world, r), r.leaf] for r in map(table.record, range(27))])
    (own,), (by_pool,) = dossier.witnesses, contents.in_order(torch.arange(27))
    said = own.testify(torch.arange(27), without=frozenset({0}), forget=torch.tensor([4]))
    expected = by_pool.testify(rows, without=frozenset({0}), forget=rows[[4]])
    torch.testing.assert_close(said, expected)


def shard_place(world: World, reference: RecordRef) -> int:
    ids = [shard.header.shard for shard in world.parties[reference.party].shards]
    return ids.index(reference.shard)


def test_the_statement_says_what_was_found_with_no_more_digits_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_as(monkeypatch, lambda: somebody([20, 3, 11]))
    world = linked()
    asked, _, said = asked_for_verdict(world)
    nonce = asked.bundle.binding.nonce
    pixels = pictures(3, seed=99)
    leaves = [digest("input/v1", bytes.fromhex(nonce), x.tobytes()) for x in pixels]
    assert said.input_commitment == to_text(merkle_root(bytes.fromhex(leaf.removeprefix("sha256:")) for leaf in leaves))
    assert (said.run, said.model) == (world.run.vault.run, world.run.model_digest)
    assert (said.user, said.nonce, said.inputs) == ("una", nonce, 3)
    assert said.head == world.chain()[-2].digest()  # the last event is this question
    assert (said.outcome, said.responsible, said.reason) == ("responsible", ("beta",), "records")
    assert said.kinds == ("trigger", "trigger", "mislabelled")
    own = said.blamed[1]
    assert [b.party for b in said.blamed] == [*PARTIES]
    assert (own.share_of_blame, own.share_of_data, own.p_value, own.adjusted) == (1.0, 0.333, 0.0001, 0.0002)
    assert said.blamed[0].p_value == 1.0
    assert said.precision == Estimate(0.988, 0.912, 1.0, 3)
    assert (said.audit_rate, said.resumes, said.simulated) == (0.0, 0, True)


def test_suspects_are_named_by_place_and_commitment_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_as(monkeypatch, lambda: somebody([20, 3, 11]))
    world = linked()
    _, _, said = asked_for_verdict(world)
    table = present(world.run.linkage).table(world.run.model_digest, limit=1 << 20)
    expected = {table.record(row): to_text(table.commitments[row].tobytes()) for row in (20, 3, 11)}
    assert said.records() == expected
    assert said.found == 3
    assert next(iter(said.records())) == table.record(20)


def test_more_suspects_than_a_statement_holds_are_counted_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_as(monkeypatch, lambda: somebody([*range(27)]))
    world = linked()
    monkeypatch.setattr(module, "MAX_SUSPECTS", 20)
    monkeypatch.setattr(module, "MAX_SUSPECT_SHARDS", 3)
    _, _, said = asked_for_verdict(world)
    assert said.found == 27
    assert len(said.suspects) == 3
    table = present(world.run.linkage).table(world.run.model_digest, limit=1 << 20)
    first = list(dict.fromkeys((r.party, r.shard) for r in map(table.record, range(27))))[:3]
    due = {table.record(row) for row in range(20) if (table.record(row).party, table.record(row).shard) in first}
    assert set(said.records()) == due


def test_all_verdicts_on_so_many_inputs_are_equally_long(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [NOBODY]
    judged_as(monkeypatch, lambda: found[0])
    world = linked()

    def length() -> int:
        asked = world.question("verdict", pictures(3, seed=99))
        return len(world.done(m.Query("una", asked.envelope)).sealed["una"])

    lengths = [length()]
    for rows in ([5], [*range(27)]):
        found[0] = somebody(rows)
        lengths.append(length())
    assert len(set(lengths)) == 1
    assert lengths[0] < 300_000


def test_a_reason_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = somebody([*range(27)])
    judged_as(monkeypatch, lambda: Verdict(**(vars(longest) | {"reason": "x" * 5000})))
    _, answers, said = asked_for_verdict(linked())
    assert len(said.reason) == statements.MAX_REASON
    assert len(answers.padding) >= 1 << 16


@pytest.mark.parametrize(
    ("inputs", "parties", "shards", "records"), [(1, 1, 1, 1), (1024, 256, 1 << 20, 1 << 30), (1024, 2, 3, 50_000)]
)
def test_the_longest_verdict_has_room_and_an_envelope(inputs: int, parties: int, shards: int, records: int) -> None:
    named, listed = min(shards, statements.MAX_SUSPECT_SHARDS), min(records, statements.MAX_SUSPECTS)
    share, name = 0.123, "n" * 40
    kind: Kind = "out-of-distribution"
    each = listed // named
    suspects = tuple(
        statements.SuspectRecords(
            party=name,
            shard="f" * 32,
            leaves=(MAX_SHARD_RECORDS,) * each,
            commitments=base64.b64encode(bytes(32 * each)).decode(),
        )
        for _ in range(named)
    )
    blamed = statements.Blamed(
        party=name, responsible=False, share_of_blame=share, share_of_data=share, p_value=0.1234, adjusted=0.1234
    )
    statement = statements.VerdictStatement(
        run="f" * 32,
        model=DIGEST,
        method="m" * 40,
        user=name,
        nonce="f" * 64,
        inputs=inputs,
        input_commitment=DIGEST,
        head=DIGEST,
        predicted=(1 << 20,) * inputs,
        outcome="responsible",
        blamed=(blamed,) * parties,
        kinds=(kind,) * inputs,
        found=1 << 40,
        suspects=suspects,
        precision=Estimate(share, share, share, 1 << 40),
        reason="x" * statements.MAX_REASON,
        audit_rate=0.12345,
        resumes=1 << 20,
        simulated=False,
    )
    envelope = SigningKey().sign("verdict", statement)
    assert len(envelope.payload) < MAX_ENVELOPE_BYTES
    answers = Answers(model=DIGEST, predicted=statement.predicted, verdict=envelope, budget_left=1 << 30)
    room = module.room_for(inputs, parties=parties, shards=shards, records=records)
    assert len(msgspec.msgpack.encode(answers)) + (1 << 16) <= room
    assert room < MAX_SEALED


def test_a_real_verdict_on_random_pictures_names_nobody() -> None:
    _, _, said = asked_for_verdict(linked())
    assert (said.outcome, said.responsible, said.found, said.records()) == ("cannot-tell", (), 0, {})
    assert len(said.kinds) == 3


def test_what_a_verdict_starts_from_is_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, world = judged_as(monkeypatch, lambda: NOBODY), linked()
    asked_for_verdict(world)
    asked_for_verdict(world)
    store = present(world.run.linkage)
    gone = store.table(world.run.model_digest, limit=1 << 20).record(0)
    store.remove([gone], model=world.run.model_digest, time=99)
    asked_for_verdict(world)
    first, second, third = (dossier for dossier, _ in asked)
    assert first is second
    assert len(third.links.labels) == 26


def test_links_that_take_too_much_memory_are_refused_and_the_question_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = linked()
    monkeypatch.setattr(links, "MOST_BYTES", 27 * 16 * 4 - 1)
    asked = world.question("verdict", pictures(3, seed=99))
    reply = world.send(m.Query("una", asked.envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("linkage.too-large", False)
    assert world.run.spent == {"una": 3}
    assert world.run.evidence is None
    monkeypatch.setattr(links, "MOST_BYTES", 27 * 16 * 4)
    asked_for_verdict(world)


def test_a_verdict_that_cannot_be_worked_out_is_a_named_error_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> Verdict:
        raise RuntimeError("no convergence")

    world = linked()
    with monkeypatch.context() as patch:
        judged_as(patch, fails)
        reply = world.send(m.Query("una", world.question("verdict", pictures(3, seed=99)).envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal, world.run.spent) == ("verdict.not-computable", False, {"una": 3})
    asked_for_verdict(world)


def test_each_input_counts_and_the_chain_notes_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_as(monkeypatch, lambda: NOBODY)
    world = linked(budget=5)
    asked, answers, _ = asked_for_verdict(world)
    assert answers.budget_left == 2
    assert (answers.scores, answers.traces) == ((), ())
    assert answers.verdict is not None
    body = world.chain()[-1].body
    assert (body["user"], body["kind"], body["inputs"]) == ("una", "verdict", 3)
    public = {"model": answers.model, "predicted": answers.predicted, "traces": [], "verdict": answers.verdict.payload}
    assert body["answer"] == digest("answer/v1", asked.question.answer_key, canonical_json(public))
    world.refused(m.Query("una", world.question("verdict", pictures(3, seed=1)).envelope), "user.budget-spent")


def test_who_may_only_predict_gets_no_verdict() -> None:
    world = linked()
    asked = world.question("verdict", pictures(1, seed=1), user="pat")
    world.refused(m.Query("pat", asked.envelope), "user.may-not")


def test_a_verdict_of_an_audited_run_says_at_which_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def audited(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, center=CenterSpec(audit_rate=0.5, audit_steps=2))

    judged_as(monkeypatch, lambda: NOBODY)
    assert asked_for_verdict(linked(change=audited))[2].audit_rate == 0.5
