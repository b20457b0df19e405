"""A repair: the records that the plan's list names are authenticated like all others, and not trained on."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.boundary import messages as m
from caltrain.boundary.sealed import LEFT_OUT, SuspicionReport, open_for
from caltrain.crypto.digests import to_raw, to_text
from caltrain.crypto.merkle import merkle_root
from caltrain.enclave import quarantine as module
from caltrain.enclave.run import State, present
from caltrain.errors import EnvironmentFault
from caltrain.models.weights import model_digest
from caltrain.plan import Plan
from caltrain.provenance.statements import LinkedModel, ModelStatement
from caltrain.records.quarantine import FormerParty, Quarantine, Quarantined
from caltrain.records.schema import encode_record
from caltrain.training.spec import CenterSpec
from support.members import Member
from support.oracle import released_model, released_part
from support.repairs import FEW, REPLACED, RUN, Place, entry, leave_out, quarantine_of, repaired
from support.watched import Watched
from support.world import World, pictures

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


def audited(plan: Plan) -> Plan:
    """Every step of the center is repeated inside, and there are checkpoints within an epoch."""
    training = msgspec.structs.replace(plan.training, checkpoint_steps=1)
    return msgspec.structs.replace(plan, center=CenterSpec(audit_rate=1.0, audit_steps=1), training=training)


# --- a whole run ------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("held_out", [0, 2])
def test_the_model_is_bit_for_bit_that_of_the_plain_loop_without_the_rows(head: int, held_out: int) -> None:
    places = FEW if not held_out else (("alpha", 0, 1), ("beta", 0, 0), ("gamma", 1, 3))
    world = repaired(places, head=head, held_out=held_out, change=audited).run_to(State.LINKED)
    assert world.run.records == 27 - 4 * held_out - len(places)
    seed = released_part(world, "beta").run_seed
    ours = model_digest(world.plan.model, released_model(world).state_dict())
    assert ours == world.run.model_digest
    assert model_digest(world.plan.model, world.plain(seed).state_dict()) == ours
    world.left_out = set()  # and not that of the loop with them
    assert model_digest(world.plan.model, world.plain(seed).state_dict()) != ours


def test_exactly_the_other_records_are_linked_and_committed_to() -> None:
    world, places = repaired(), set(FEW)
    world.run_to(State.LINKED)
    due = {
        entry(world, (name, number, leaf)).record: entry(world, (name, number, leaf)).commitment
        for name, party in world.parties.items()
        for number, shard in enumerate(party.shards)
        for leaf in range(len(shard.records))
        if (name, number, leaf) not in places
    }
    assert len(due) == 23
    assert {record: to_text(found[1]) for record, found in world.linked().items()} == due
    statement = world.statement("linked-model", LinkedModel)
    assert (statement.records, statement.repair) == (23, world.plan.repair)
    assert statement.commitments == to_text(merkle_root(sorted(map(to_raw, due.values()))))


def test_the_manifest_orders_the_same_records_as_the_pool() -> None:
    world = repaired().run_to(State.AGREED)
    refs = [*world.manifest.references(without=world.left_out)]
    assert len(refs) == world.manifest.trained(world.plan) == 23
    assert set(refs).isdisjoint(world.left_out)
    assert [*world.manifest.references()] == sorted([*refs, *world.left_out], key=[*world.manifest.references()].index)
    assert len([*world.manifest.references()]) == world.manifest.records() == 27


def test_chain_and_statements_say_what_was_left_out() -> None:
    world = repaired().run_to(State.LINKED)
    repair = world.plan.repair
    assert repair
    assert (repair.run, repair.model, repair.records) == (RUN, REPLACED, 4)
    assert world.statement("model", ModelStatement).repair == repair
    (event,) = [event for event in world.chain() if event.kind == "repair"]
    assert msgspec.convert(event.body, type(repair)) == repair
    kinds = [found.kind for found in world.chain()]
    assert kinds.index("countersignature") < kinds.index("repair") < kinds.index("ingest")


def test_a_first_run_says_that_nothing_was_left_out() -> None:
    world = World()
    world.host.storage["quarantine"] = bytearray(b"nobody asks for it")
    world.run_to(State.LINKED)
    assert world.statement("model", ModelStatement).repair is None
    assert world.statement("linked-model", LinkedModel).repair is None
    assert "repair" not in [event.kind for event in world.chain()]
    asked = [call.message.name for call in world.host.log if isinstance(call.message, m.Read)]
    assert "quarantine" not in asked


def test_a_repair_may_leave_out_a_party_and_no_record_of_the_others() -> None:
    world, former = World(), FormerParty(name="delta", public_key=Member("delta").signer.public)
    leave_out(world, quarantine_of(world, []), without=(former,))
    world.run_to(State.LINKED)
    said = world.statement("linked-model", LinkedModel)
    assert (said.records, said.repair.records, said.repair.without) == (27, 0, (former,))
    assert world.chain()[-1].kind == "link"


def test_a_party_learns_no_suspicion_of_what_was_left_out() -> None:
    world = repaired().run_to(State.LINKED)
    beta = world.parties["beta"]
    report = open_for(
        beta.data_key,
        "suspicion/v1",
        world.suspicion["beta"],
        SuspicionReport,
        context=world.run.vault.run,
        step="test",
    )
    missing = [
        (number, leaf)
        for number, shard in enumerate(beta.shards)
        for leaf, score in enumerate(report.of(shard.header.shard))
        if score is None
    ]
    assert missing == [(0, 0), (1, 3)]
    unknown = [
        (number, leaf)
        for number, shard in enumerate(beta.shards)
        for leaf, row in enumerate(np.frombuffer(report.out_of_fold[shard.header.shard], "<u2").reshape(-1, 3))
        if (row == LEFT_OUT).all()
    ]
    assert unknown == missing


@FORMS
def test_a_repair_is_taken_up_again_with_the_same_bits(head: int) -> None:
    world = repaired(head=head, change=audited).run_to(State.AGREED)
    world.take_up()  # before the list was read
    world.run_to(State.READY).train()
    del world.host.storage["quarantine"]  # once the pool is filled nobody needs it
    world.take_up()
    world.run_to(State.LINKED)
    assert model_digest(world.plan.model, world.plain(released_part(world, "alpha").run_seed).state_dict()) == (
        world.run.model_digest
    )
    assert world.statement("model", ModelStatement).repair == world.plan.repair


def test_what_the_host_sees_does_not_depend_on_what_is_in_the_records_left_out() -> None:
    def view(places: tuple[Place, ...]) -> list[tuple[str, str, int]]:
        world = Watched(head=2)
        leave_out(world, quarantine_of(world, places))
        world.run_to(State.LINKED)
        assert "read quarantine" in {seen.name for seen in world.seen}
        return [(seen.phase, seen.name, seen.size) for seen in world.seen]

    assert view((("alpha", 0, 1), ("beta", 1, 2))) == view((("alpha", 1, 0), ("beta", 0, 4)))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(world: World, code: str) -> None:
    """Ingest stops with this error; nothing was taken in and the host got no seed."""
    world.run_to(State.AGREED)
    world.refused(world.ingest(), code)
    assert world.run.pool is None
    assert world.run.front is None
    assert "repair" not in [event.kind for event in world.chain()]


def test_another_list_than_the_plans_is_refused() -> None:
    world = World()
    leave_out(world, quarantine_of(world), stored=quarantine_of(world, FEW[:3]).encode())
    refused(world, "quarantine.other-list")


@pytest.mark.parametrize("changes", [{"run": "0" * 32}, {"model": "sha256:" + "0" * 64}, {"records": 3}])
def test_a_list_that_does_not_say_what_the_plan_says_is_refused(changes: dict[str, Any]) -> None:
    world = World()
    leave_out(world, quarantine_of(world), **changes)
    refused(world, "quarantine.other-run")


def test_a_list_that_the_host_does_not_have_or_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = repaired()
    world.run_to(State.AGREED)
    del world.host.storage["quarantine"]
    assert world.refused(world.ingest(), "storage.missing")["family"] == EnvironmentFault.__name__
    monkeypatch.setattr(module, "MAX_QUARANTINE_BYTES", 100)
    refused(repaired(), "storage.too-long")


def test_every_entry_must_be_found_where_it_says() -> None:
    for field, value in (("party", "delta"), ("shard", "0" * 32), ("leaf", 5)):
        world = World()
        one = entry(world, FEW[0])
        moved = Quarantined(msgspec.structs.replace(one.record, **{field: value}), one.commitment)
        leave_out(world, Quarantine.of([moved], run=RUN, model=REPLACED))
        refused(world, "repair.unknown-record")


@pytest.mark.parametrize("place", FEW)
def test_a_record_with_another_commitment_is_not_the_one_that_is_meant(place: Place) -> None:
    world = World()
    entries = [entry(world, other) for other in FEW if other != place]
    wrong = Quarantined(entry(world, place).record, entries[0].commitment)
    leave_out(world, Quarantine.of([*entries, wrong], run=RUN, model=REPLACED))
    refused(world, "repair.other-commitment")


def test_a_held_out_record_is_not_left_out() -> None:
    world = World(held_out=1)
    leave_out(world, quarantine_of(world, (("alpha", 1, 0),)))
    refused(world, "repair.held-out")


def test_a_party_keeps_a_record_or_leaves_the_plan() -> None:
    world = World()
    everything = [("beta", number, leaf) for number, size in ((0, 5), (1, 4)) for leaf in range(size)]
    leave_out(world, quarantine_of(world, everything))
    refused(world, "repair.empty-party")


def labelled(labels: dict[str, list[int]], places: list[Place], *, held_out: int = 0) -> World:
    """A world with these labels by party, five records a shard, that leaves out these records."""
    world = World()
    for seed, (name, party) in enumerate(world.parties.items()):
        party.shards.clear()
        party.seal(world.plan.data, pictures(9, seed=seed), labels.get(name, [0, 1] * 4 + [0]), shard_records=5)
        if seed < held_out:
            party.shards[-1].listed["held_out"] = True
    leave_out(world, quarantine_of(world, places))
    return world


OWLS = {"beta": [2, 2, 0, 1, 0, 1, 0, 2, 1]}


def test_a_class_keeps_a_record() -> None:
    refused(labelled(OWLS, [("beta", 0, 0), ("beta", 0, 1), ("beta", 1, 2)]), "repair.empty-class")
    labelled(OWLS, [("beta", 0, 0), ("beta", 0, 1)]).run_to(State.READY)
    labelled({}, [("beta", 0, 0)]).run_to(State.READY)  # a class that nobody had before is no loss


def test_a_class_that_is_only_held_out_any_more_is_lost() -> None:
    owls = {"alpha": [2, 0, 0, 0, 0, 2, 2, 2, 2]}
    refused(labelled(owls, [("alpha", 0, 0)], held_out=1), "repair.empty-class")


def test_the_error_does_not_tell_the_host_which_class_it_is() -> None:
    world = labelled(OWLS, [("beta", 0, 0), ("beta", 0, 1), ("beta", 1, 2)]).run_to(State.AGREED)
    error = world.refused(world.ingest(), "repair.empty-class")
    assert "owl" not in str(error)
    assert "beta" not in str(error)


def test_fewer_records_than_a_batch_are_refused_before_anybody_signs() -> None:
    places = [(name, 0, leaf) for name in ("alpha", "beta", "gamma") for leaf in range(5)]
    places += [("alpha", 1, leaf) for leaf in range(3)] + [("beta", 1, leaf) for leaf in range(2)]
    world = repaired(places)
    world.done(world.configure())
    for name in world.parties:
        world.done(world.provision(name))
    world.refused(m.MakeManifest(), "manifest.too-few-records")
    fits = repaired(places[:-1])
    assert fits.run_to(State.TRAINED).run.records == 8


def altered(world: World) -> None:
    """The sealed bytes of a record in quarantine."""
    shard = world.parties["alpha"].shards[0]
    raw = world.host.storage[f"shards/alpha/{shard.entry.shard}"]
    raw[shard.frames_at + shard.header.frame_bytes + 20] ^= 1


def test_a_record_in_quarantine_is_authenticated_like_all_others() -> None:
    world = repaired().run_to(State.AGREED)
    world.upload()
    altered(world)
    world.refused(world.ingest(), "sealed.not-authentic")


def test_a_copy_of_a_record_in_quarantine_does_not_take_its_place() -> None:
    world = World()
    alpha = world.parties["alpha"]
    again, label = alpha.shards[0].records[1], 0
    others = [encode_record(world.plan.data, image, label) for image in pictures(2, seed=50)]
    alpha.shards.append(alpha.forge(world.plan.data, [*others, again]))
    leave_out(world, quarantine_of(world))
    refused(world, "ingest.duplicate-record")


def test_the_pool_holds_no_byte_of_a_record_in_quarantine() -> None:
    world = repaired().run_to(State.READY)
    assert present(world.run.pool).shape.records == 23
    row = present(world.run.pool).shape.row_bytes
    assert len(world.host.storage["pool-0"]) == 23 * row + 16
    rows = present(world.run.pool).rows(0, 23)
    shard = world.parties["alpha"].shards[0]
    assert not any(shard.commitment(1) == bytes(found[16:48]) for found in rows)
    assert any(shard.commitment(0) == bytes(found[16:48]) for found in rows)
