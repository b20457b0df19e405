"""Link: every record is named by its own fingerprint, label, source and commitment; each party learns of its own."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.boundary.sealed import SuspicionReport, open_for
from caltrain.crypto.digests import canonical_json, digest, to_text
from caltrain.crypto.merkle import merkle_root
from caltrain.enclave import hunt, pool, release
from caltrain.enclave.run import State, present
from caltrain.errors import IntegrityError
from caltrain.models.weights import state_of
from caltrain.plan import Plan
from caltrain.provenance.statements import LinkedModel
from support.oracle import known_records, released_model
from support.world import PARTIES, World

Weights = dict[str, torch.Tensor]
FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


def test_the_link_names_the_model_and_commits_to_every_record() -> None:
    world = World().run_to(State.LINKED)
    commitments = sorted(known.commitment for known in known_records(world, released_model(world)))
    statement = world.statement("linked-model", LinkedModel)
    assert statement == LinkedModel(
        run=world.run.vault.run,
        model=world.run.model_digest,
        records=27,
        commitments=to_text(merkle_root(commitments)),
        audit_rate=0.0,
        resumes=0,
        simulated=True,
        repair=None,
    )
    assert world.chain()[-1].body == {
        "model": world.run.model_digest,
        "records": 27,
        "statement": digest("linked-model/v1", canonical_json(statement)),
    }


@pytest.mark.parametrize("small", [False, True], ids=["one block", "small blocks, parts, batches and segments"])
def test_every_record_is_linked_by_its_own_fingerprint_and_label(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:  # the last block is a lone row, and there are five parts
        shape = classmethod(lambda cls, records, size: cls(records, size, 2, 6))
        monkeypatch.setattr(pool.PoolShape, "fit", shape)
        monkeypatch.setattr(hunt, "_BATCH", 2)
        monkeypatch.setattr(release, "_SEGMENT", 10)
    world = World().run_to(State.LINKED)
    known = {k.reference: k for k in known_records(world, released_model(world))}
    linked = world.linked()
    assert sorted(linked) == sorted(known)
    for reference, (label, commitment, fingerprint) in linked.items():
        expected = known[reference]
        assert commitment == expected.commitment
        assert label == expected.label
        np.testing.assert_allclose(fingerprint.numpy(), expected.fingerprint, atol=3e-4)  # what float16 keeps


def test_blocks_and_parts_of_the_pool_do_not_show_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.PoolShape, "fit", classmethod(lambda cls, records, size: cls(records, size, 2, 6)))
    world = World().run_to(State.RELEASED)
    ours, theirs = state_of(present(world.run.model)), state_of(world.plain(world.run.seed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def suspicion(world: World, party: str, key: bytes) -> SuspicionReport:
    return open_for(
        key, "suspicion/v1", world.suspicion[party], SuspicionReport, context=world.run.vault.run, step="test"
    )


def disagreement(world: World, k: int) -> dict[tuple[str, str, int], float]:
    """The definition, record by record: the share of the k nearest with another label, weighted by nearness."""
    known, found = known_records(world, released_model(world)), {}
    for own in known:
        others = [k for k in known if k is not own]
        distances = np.array([np.linalg.norm(o.fingerprint - own.fingerprint) for o in others])
        nearest = np.argsort(distances, kind="stable")[:k]
        weights = 1 / (distances[nearest] + 0.05)
        differs = np.array([others[i].label != own.label for i in nearest])
        reference = own.reference
        found[reference.party, reference.shard, reference.leaf] = float((weights * differs).sum() / weights.sum())
    return found


def test_a_party_learns_how_suspicious_its_own_records_are_and_nothing_of_the_others() -> None:
    world = World().run_to(State.LINKED)
    expected = disagreement(world, world.plan.trace.suspicion_neighbours)
    assert set(world.suspicion) == set(PARTIES)
    for party in world.parties.values():
        report = suspicion(world, party.name, party.data_key)
        assert report.model == world.run.model_digest
        assert set(report.scores["disagreement"]) == {shard.header.shard for shard in party.shards}
        for shard in party.shards:
            own = [expected[party.name, shard.header.shard, leaf] for leaf in range(len(shard.records))]
            np.testing.assert_allclose(np.array(report.of(shard.header.shard)) / 1000, own, atol=2e-3)
        for other in set(PARTIES) - {party.name}:
            with pytest.raises(IntegrityError) as raised:
                suspicion(world, party.name, world.parties[other].data_key)
            assert raised.value.code == "sealed.not-authentic"


def test_a_single_record_has_no_neighbours_and_is_not_suspicious() -> None:
    def alone(plan: Plan) -> Plan:
        training = msgspec.structs.replace(plan.training, batch=1)
        return msgspec.structs.replace(plan, training=training, parties=plan.parties[:1])

    world = World(change=alone, records=1)
    world.parties = {"alpha": world.parties["alpha"]}
    world.run_to(State.LINKED)
    alpha = world.parties["alpha"]
    assert suspicion(world, "alpha", alpha.data_key).of(alpha.shards[0].header.shard) == (0,)


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_pool_that_is_changed_before_the_hunt_stops_the_run(position: int) -> None:
    world = World().run_to(State.TRAINED)
    world.host.storage["pool-0"][position] ^= 1
    world.refused(m.Hunt(), "sealed.not-authentic")
    assert world.run.passed is None


@pytest.mark.parametrize("name", ["linkage-0-0", "linkage-0-0-rows"])
def test_a_host_that_loses_the_links_while_they_are_written_is_noticed_at_once(name: str) -> None:
    world = World().run_to(State.RELEASED)

    def forget(call: m.Write) -> m.Answer:
        return m.Data() if call.name == name else world.host.write(call)

    world.host.on_write = forget
    reply = world.send(m.Link())
    if name.endswith("-rows"):
        assert isinstance(reply, m.Failed)
        assert reply.error["code"] == "linkage.missing"
    else:  # what it said is durable is not: the next enclave would notice, this one has what it needs
        assert isinstance(reply, m.Done)


def test_progress_of_the_hunt_is_told_up_to_all_records() -> None:
    world = World().run_to(State.LINKED)
    world.host.serve()
    told = [c.message for c in world.host.log if isinstance(c.message, m.Progress) and c.message.phase == "hunt"]
    assert [(p.done, p.total) for p in told] == [(27, 27)]
