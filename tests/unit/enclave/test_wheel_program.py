"""A wheel of stages is part of the measured program: it runs only where plan and measurement name it, and same bits."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile

import msgspec
import pytest
import torch

from caltrain.attestation.measurement import with_wheel
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary import messages as m
from caltrain.crypto.digests import to_text
from caltrain.enclave.run import State
from caltrain.models.layers import Conv, Flatten, Linear, Stage
from caltrain.models.spec import ModelSpec, Partition, Wheel
from caltrain.models.weights import state_of
from caltrain.models.wheel import load_wheel
from caltrain.plan import EnclaveSpec, Plan
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from support.world import CLASSES, MEASUREMENT, World

CODE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.25)
    def forward(self, x):
        return torch.relu(x + self.drop(self.a(x)))

def build(name):
    return Block()
"""


def packed(code: str = CODE) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("ourstages.py", code)
    return stream.getvalue()


RAW = packed()
WHEEL = Wheel(sha256=to_text(hashlib.sha256(RAW).digest()), factory="ourstages:build")
STAGE = Stage(name="block", shape=(4, 4, 4), weights=4 * 4 * 9 + 4)
MODEL = ModelSpec(layers=(Conv(filters=4), STAGE, STAGE, Flatten(), Linear(units=len(CLASSES))), wheel=WHEEL)


def with_stages(plan: Plan) -> Plan:
    named = EnclaveSpec(measurement=with_wheel(MEASUREMENT, WHEEL.sha256))
    return msgspec.structs.replace(plan, model=MODEL, partition=Partition(front=2, head=1), enclave=named)


def world_with(wheel: bytes, *, change: bool = True, measured: bytes | None = None) -> World:
    """A world whose enclave was started with that wheel; `measured`: what its measurement says instead."""
    world = World(change=with_stages if change else lambda plan: plan)
    world.run.wheel = wheel
    said = wheel if measured is None else measured
    measurement = with_wheel(MEASUREMENT, to_text(hashlib.sha256(said).digest())) if said else MEASUREMENT
    world.run.vault.attester = SimulatedAttester(world.root, measurement=measurement)
    return world


def test_a_run_with_stages_of_a_wheel_ends_with_the_bits_of_the_plain_loop() -> None:
    world = world_with(RAW)
    world.run_to(State.AGREED)
    seed = world.done(world.ingest()).center_seed
    from caltrain.host.center import Center

    records = world.manifest.records()
    world.host.center = Center(world.plan, seed=seed, records=records, factory=load_wheel(RAW, WHEEL))
    world.run_to(State.LINKED)
    pixels, labels = world.data()
    plan, seeds = world.plan, RunSeeds.from_run_seed(world.run.seed)
    plain = train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=pixels,
        labels=labels,
        seeds=seeds,
        factory=load_wheel(RAW, WHEEL),
    )
    assert world.run.model is not None
    own, due = state_of(world.run.model), state_of(plain)
    assert own.keys() == due.keys()
    assert all(torch.equal(value, due[name]) for name, value in own.items())


def test_a_hosts_own_plan_with_its_own_wheel_is_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code must not run in a process that could still attest for the parties' plan."""
    ran: list[str] = []
    monkeypatch.setattr(os, "sync", lambda: ran.append("its code ran"))
    evil = packed("import os\nos.sync()\n")
    digest = to_text(hashlib.sha256(evil).digest())
    own = world_with(b"")
    wheel = Wheel(sha256=digest, factory="ourstages:build")
    model = msgspec.structs.replace(MODEL, wheel=wheel)
    # The honest program, which was started without a wheel, is given a plan with one.
    own.plan = msgspec.structs.replace(own.plan, model=model, enclave=EnclaveSpec(measurement=MEASUREMENT))
    own.refused(own.configure(), "plan.other-wheel")
    # Started with it, the program is another one: neither the parties' plan nor the host's passes for it.
    other = world_with(evil)
    other.refused(other.configure(), "plan.other-measurement")
    other.plan = own.plan
    other.refused(other.configure(), "plan.other-measurement")
    assert ran == []


@pytest.mark.parametrize("given", [b"", packed(CODE + "\n")], ids=["no wheel", "another wheel"])
def test_an_enclave_without_the_plans_wheel_is_refused_even_if_it_says_to_have_it(given: bytes) -> None:
    world = world_with(given, measured=RAW)
    code = "wheel.other-digest" if given else "plan.other-wheel"
    world.refused(world.configure(), code)


def test_a_plan_without_a_wheel_does_not_pass_for_a_program_with_one() -> None:
    world = world_with(RAW, change=False, measured=b"")
    world.refused(world.configure(), "plan.other-wheel")


def test_a_restarted_enclave_needs_the_wheel_as_well() -> None:
    world = world_with(RAW)
    world.run_to(State.AGREED)
    world.restart()
    measurement = with_wheel(MEASUREMENT, WHEEL.sha256)
    world.run.vault.attester = SimulatedAttester(world.root, measurement=measurement)
    reply = world.send(world.resume())
    assert isinstance(reply, m.Failed)
    assert reply.error["code"] == "plan.other-wheel"
    assert world.run.state is State.NEW
    world.run.wheel = RAW
    world.done(world.resume())


def test_the_measurement_with_a_wheel_is_another_for_each_wheel_and_program() -> None:
    ones = {with_wheel(a, b) for a in ("sha384:" + "a" * 96, "sha384:" + "b" * 96) for b in (WHEEL.sha256, "sha256:0")}
    assert len(ones) == 4
    assert all(len(one) == len(MEASUREMENT) for one in ones)
