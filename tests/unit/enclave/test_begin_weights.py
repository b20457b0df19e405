"""A run that begins with public weights: the same bits as the plain loop, audited, and after a restart."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.enclave.run import State
from caltrain.host.center import Center
from caltrain.models.network import build
from caltrain.models.weights import decode_state, encode_state, state_of
from caltrain.plan import Plan
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds, initialise
from caltrain.training.spec import CenterSpec, InitialWeights
from support.world import MODEL, SHAPE, World


def public_weights(seed: bytes = b"p" * 32) -> bytes:
    """Weights of the whole model as safetensors."""
    network = build(MODEL, input_shape=SHAPE)
    initialise(network, seed)
    return encode_state(state_of(network))


RAW = public_weights()


class Tuned(World):
    """A world whose plan names these weights; the host keeps them."""

    def __init__(self, *, head: int, frozen: int, audit_rate: float) -> None:
        def change(plan: Plan) -> Plan:
            initial = InitialWeights(sha256="sha256:" + hashlib.sha256(RAW).hexdigest(), frozen=frozen)
            training = msgspec.structs.replace(plan.training, initial=initial)
            center = CenterSpec(audit_rate=audit_rate, audit_steps=2)
            return msgspec.structs.replace(plan, training=training, center=center)

        super().__init__(head=head, change=change)
        self.host.storage["initial"] = bytearray(RAW)

    def take_in(self) -> None:
        done = self.done(self.ingest())
        self.host.center = Center(self.plan, seed=done.center_seed, records=self.manifest.records())
        self.host.center.start_from(decode_state(RAW, step="test"))

    def expected(self) -> dict[str, torch.Tensor]:
        """What the plain loop makes of it."""
        pixels, labels = self.data()
        plan = self.plan
        model = train_plain(
            plan.model,
            plan.partition,
            plan.data,
            plan.training,
            pixels=pixels,
            labels=labels,
            seeds=RunSeeds.from_run_seed(self.run.seed),
            initial=decode_state(RAW, step="test"),
        )
        return dict(state_of(model))


@pytest.mark.parametrize("audit_rate", [0.0, 1.0])
@pytest.mark.parametrize(("head", "frozen"), [(2, 0), (0, 0), (2, 2), (0, 3), (1, 1), (2, 4)])
def test_it_ends_with_the_plain_loops_bits(head: int, frozen: int, audit_rate: float) -> None:
    world = Tuned(head=head, frozen=frozen, audit_rate=audit_rate)
    world.run_to(State.RELEASED)
    assert world.run.model is not None
    found, expected = state_of(world.run.model), world.expected()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    begun = decode_state(RAW, step="test")
    kept = {n for n, v in begun.items() if v.is_floating_point() and torch.equal(found[n], v)}
    assert {int(name.partition(".")[0]) for name in kept} <= set(range(frozen))


def test_other_weights_than_the_plans_end_the_run() -> None:
    world = Tuned(head=2, frozen=0, audit_rate=0.0).run_to(State.AGREED)
    world.host.storage["initial"] = bytearray(public_weights(b"q" * 32))
    world.refused(world.ingest(), "initial.other-digest")


def test_an_audited_center_that_does_not_begin_with_them_is_caught() -> None:
    world = Tuned(head=2, frozen=0, audit_rate=1.0).run_to(State.AGREED)
    done = world.done(world.ingest())
    world.host.center = Center(world.plan, seed=done.center_seed, records=world.manifest.records())
    world.refused(m.Train(0, 0), "center.other-state")
