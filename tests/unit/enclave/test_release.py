"""Release and link: the model that was trained, each part to whom it belongs, and every record linked to it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.sealed import SuspicionReport, open_for
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.digests import canonical_json, digest, to_raw, to_text
from caltrain.crypto.merkle import merkle_root
from caltrain.enclave import pool, release
from caltrain.enclave.run import State, present
from caltrain.errors import IntegrityError
from caltrain.models.weights import decode_state, encode_state, model_digest, state_of
from caltrain.plan import Plan
from caltrain.provenance.statements import LinkedModel, ModelStatement
from support.oracle import known_records, released_model, released_part
from support.world import PARTIES, World

Weights = dict[str, torch.Tensor]
FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


def refused(world: World, code: str, request: m.Release | None = None) -> None:
    """The release stops, and there is no model."""
    world.refused(request or world.release_request(), code)
    assert world.run.model is None
    assert world.run.model_digest == ""


# --- a host that gives another CenterNet ----------------------------------------------------------------------------


def test_a_center_that_was_changed_after_the_last_epoch_is_refused() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    request = world.release_request()
    state = decode_state(bytes(world.host.storage["center"]), step="test")
    state["2.conv.bias"][0] += 1e-6
    world.host.storage["center"] = bytearray(encode_state(state))
    refused(world, "release.other-center", request)


def test_the_center_of_an_earlier_epoch_is_refused() -> None:
    world = World().run_to(State.READY)
    world.train()
    earlier = world.release_request()
    before = world.host.storage["center"]
    world.train()
    world.host.storage["center"] = before
    refused(world, "release.other-center", earlier)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing but zeros": (lambda raw: bytes(len(raw)), "weights.malformed"),
    "no header": (lambda raw: raw[8:] + bytes(8), "weights.malformed"),
    "a header without end": (lambda raw: b"\xff" * 8 + raw[8:], "weights.malformed"),
    "a pickle": (lambda raw: b"\x80\x04." + raw[3:], "weights.malformed"),
    "cut short": (lambda raw: raw[:-1], "storage.short"),
    "empty": (lambda _raw: b"", "storage.short"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_weights_are_refused(name: str) -> None:
    change, code = BYTES[name]
    world = World(epochs=1).run_to(State.TRAINED)
    request = world.release_request()
    world.host.storage["center"] = bytearray(change(bytes(world.host.storage["center"])))
    refused(world, code, request)


def test_a_center_larger_than_the_plans_is_not_even_read() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    request = world.release_request()
    del world.host.storage["center"]
    refused(world, "release.too-large", m.Release(request.center_bytes + (1 << 20)))


def test_a_center_that_is_not_there_stops_the_run() -> None:
    refused(World(epochs=1).run_to(State.TRAINED), "storage.missing", m.Release(100))


def committed_to(change: Callable[[World, Weights], Weights], *, head: int = 2) -> World:
    """A trained world whose host committed to another CenterNet, which it will also give."""
    world = World(head=head, epochs=1).run_to(State.READY)
    center = world.host.the_center

    def other() -> Weights:
        return change(world, decode_state(center.weights(), step="test"))

    world.host.on_commit = lambda _call: m.Data(to_raw(model_digest(world.plan.model, other())))
    world.run_to(State.TRAINED)
    world.host.storage["center"] = bytearray(encode_state(other()))
    return world


def stored(world: World) -> m.Release:
    return m.Release(len(world.host.storage["center"]))


def with_value(value: float) -> Callable[[World, Weights], Weights]:
    return lambda _world, state: state | {"2.conv.bias": torch.full((4,), value)}


def with_front(world: World, state: Weights) -> Weights:
    """The CenterNet, and a FrontNet that the host knows."""
    front = state_of(present(world.run.front).module)
    return state | {name: torch.zeros_like(value) for name, value in front.items()}


def with_head(world: World, state: Weights) -> Weights:
    return state | {name: torch.zeros_like(v) for name, v in state_of(present(world.run.head).module).items()}


COMMITTED: dict[str, Callable[[World, Weights], Weights]] = {
    "NaN": with_value(torch.nan),
    "infinity": with_value(torch.inf),
    "a tensor less": lambda _w, state: {"2.conv.bias": state["2.conv.bias"]},
    "a tensor more": lambda _w, state: state | {"9.conv.bias": torch.zeros(4)},
    "another shape": lambda _w, state: state | {"2.conv.bias": torch.zeros(5)},
    "another type": lambda _w, state: state | {"2.conv.bias": torch.zeros(4, dtype=torch.float64)},
    "our FrontNet replaced": with_front,
    "our HeadNet replaced": with_head,
}


@pytest.mark.parametrize("name", COMMITTED)
def test_a_center_that_does_not_fit_is_refused_even_where_the_host_committed_to_it(name: str) -> None:
    world = committed_to(COMMITTED[name])
    refused(world, "weights.malformed", stored(world))


def test_the_same_way_round_an_honest_center_is_taken() -> None:
    world = committed_to(lambda _world, state: state)
    world.done(stored(world))


def test_inner_weights_that_a_hostile_center_blew_up_are_not_released() -> None:
    world = World(epochs=1).run_to(State.READY)
    host = world.host

    def blow_up(head: TensorHead, tensor: torch.Tensor, channel: Channel) -> None:
        if (head.role, head.step) != ("center-grad", 2):  # the last of the epoch
            return host.take(head, tensor, channel)
        huge = torch.full(head.shape, 3e38)
        return channel.send_tensor(huge, role="ir-grad", run=head.run, epoch=head.epoch, step=head.step)

    host.on_tensor = blow_up
    world.run_to(State.TRAINED)
    refused(world, "weights.malformed")


# --- what is released, and to whom ----------------------------------------------------------------------------------


@FORMS
def test_every_party_and_nobody_else_gets_front_and_head(head: int) -> None:
    world = World(head=head).run_to(State.RELEASED)
    assert set(world.released) == set(PARTIES)
    run = world.run
    zones = [zone.module for zone in (run.front, run.head) if zone is not None]
    inner = state_of(*zones)
    for party in PARTIES:
        part = released_part(world, party)
        assert part.model == run.model_digest
        weights = decode_state(part.weights, step="test")
        assert weights.keys() == inner.keys()
        assert all(torch.equal(value, inner[name]) for name, value in weights.items())
        whole = state_of(released_model(world, party))
        assert model_digest(world.plan.model, whole) == run.model_digest
        for other in set(PARTIES) - {party}:
            with pytest.raises(IntegrityError) as raised:
                released_part(world, party, key=world.parties[other].data_key)
            assert raised.value.code == "sealed.not-authentic"


@FORMS
def test_no_inner_weight_ever_comes_out_in_clear(head: int) -> None:
    world = World(head=head).run_to(State.READY)
    seen: list[bytes] = []

    def keep() -> None:
        for zone in (world.run.front, world.run.head):
            if zone is not None:
                seen.extend(v.numpy().tobytes() for v in state_of(zone.module).values() if v.numel() > 2)

    keep()
    for _ in range(2):
        world.train()
        keep()
    world.run_to(State.LINKED)
    came_out = bytes(world.host.enclave_end.sent) + b"".join(world.released.values())
    came_out += msgspec.json.encode(world.statements) + b"".join(world.suspicion.values())
    assert len(seen) == 3 * (8 if head else 6)
    assert not [raw for raw in seen if raw in came_out and any(raw)]


@pytest.mark.parametrize("reveal", [True, False])
def test_the_run_seed_is_given_only_where_the_plan_says_so(reveal: bool) -> None:
    world = World(reveal_seed=reveal).run_to(State.RELEASED)
    assert {released_part(world, party).run_seed for party in PARTIES} == {world.run.seed if reveal else b""}
    assert world.chain()[-1].body["seed_revealed"] is reveal


def test_the_statement_names_run_plan_manifest_and_model() -> None:
    world = World(epochs=3).run_to(State.RELEASED)
    assert world.statement("model", ModelStatement) == ModelStatement(
        run=world.run.vault.run,
        plan=world.plan.digest(),
        manifest=world.manifest.digest(),
        model=model_digest(world.plan.model, state_of(released_model(world))),
        epochs=3,
        center_audited=False,
        simulated=True,
    )


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_whole_model_computes_in_the_plans_memory_layout(channels_last: bool) -> None:
    def layout(plan: Plan) -> Plan:
        training = msgspec.structs.replace(plan.training, channels_last=channels_last)
        return msgspec.structs.replace(plan, training=training)

    model = present(World(change=layout).run_to(State.RELEASED).run.model)
    weight = model.get_parameter("2.conv.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert not model.training


# --- link -----------------------------------------------------------------------------------------------------------


def test_the_link_names_the_model_and_commits_to_every_record() -> None:
    world = World().run_to(State.LINKED)
    commitments = sorted(known.commitment for known in known_records(world, released_model(world)))
    statement = world.statement("linked-model", LinkedModel)
    assert statement == LinkedModel(
        run=world.run.vault.run,
        model=world.run.model_digest,
        records=27,
        commitments=to_text(merkle_root(commitments)),
        center_audited=False,
        simulated=True,
    )
    assert world.chain()[-1].body == {
        "model": world.run.model_digest,
        "records": 27,
        "statement": digest("linked-model/v1", canonical_json(statement)),
    }


@pytest.mark.parametrize("small", [False, True], ids=["one block", "small blocks, parts and batches"])
def test_every_record_is_linked_by_its_own_fingerprint_and_label(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:  # the last block is a lone row, and there are five parts
        shape = classmethod(lambda cls, records, size: cls(records, size, 2, 6))
        monkeypatch.setattr(pool.PoolShape, "fit", shape)
        monkeypatch.setattr(release, "_LINK_BATCH", 2)
    world = World().run_to(State.LINKED)
    known = {k.reference: k for k in known_records(world, released_model(world))}
    linkage = present(world.run.linkage)
    assert sorted(linkage.records) == sorted(known)
    for i, reference in enumerate(linkage.records):
        expected = known[reference]
        assert linkage.commitments[i] == expected.commitment
        assert int(linkage.labels[i]) == expected.label
        np.testing.assert_allclose(linkage.fingerprints[i].numpy(), expected.fingerprint, atol=1e-5)


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
        assert set(report.scores) == {shard.header.shard for shard in party.shards}
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
def test_a_pool_that_is_changed_before_the_link_stops_the_run(position: int) -> None:
    world = World().run_to(State.RELEASED)
    world.host.storage["pool-0"][position] ^= 1
    world.refused(m.Link(), "sealed.not-authentic")
    assert world.run.linkage is None


def test_a_finite_center_that_overflows_is_not_linked() -> None:
    world = committed_to(lambda _world, state: state | {"2.conv.weight": torch.full((4, 4, 3, 3), 3e38)})
    world.done(stored(world))
    world.refused(m.Link(), "link.not-finite")
    assert world.run.linkage is None


def test_progress_of_the_link_is_told_up_to_all_records() -> None:
    world = World().run_to(State.LINKED)
    world.host.serve()
    told = [c.message for c in world.host.log if isinstance(c.message, m.Progress) and c.message.phase == "link"]
    assert [(p.done, p.total) for p in told] == [(27, 27)]
