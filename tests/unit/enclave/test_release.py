"""Release: the model that was trained, each part to whom it belongs."""

from __future__ import annotations

import msgspec
import pytest
import torch

from caltrain.enclave.run import State, present
from caltrain.errors import IntegrityError
from caltrain.models.weights import decode_state, model_digest, state_of
from caltrain.plan import Plan
from caltrain.provenance.statements import ModelStatement
from support.oracle import released_model, released_part
from support.world import PARTIES, World

Weights = dict[str, torch.Tensor]
FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


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
    assert len(seen) == 3 * (7 if head else 5)
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
        front_public=False,
        audit_rate=0.0,
        resumes=0,
        simulated=True,
        repair=None,
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
