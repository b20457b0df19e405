"""The audit: an honest center passes, and one changed bit of a repeated step stops the run for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Tensors
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.audit import Crossing, repeat
from caltrain.enclave.run import State
from caltrain.errors import IntegrityError
from caltrain.host.center import Center
from caltrain.models.weights import decode_state, encode_state
from caltrain.provenance.statements import LinkedModel, ModelStatement
from caltrain.training.zone import At, Zone
from support.recovery import DEEP, ends_as_if_undisturbed, planned, recovers
from support.tampering import commits_to, one_element, shows, tamper
from support.world import World, pictures

Cheat = Callable[[World], None]
FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


def audited(head: int, *, rate: float = 1.0) -> World:
    return World(head=head, change=planned(rate=rate)).run_to(State.READY)


# --- an honest center -----------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("length", [1, 2, 1000])
def test_an_honest_center_passes_and_the_weights_are_the_same(head: int, length: int) -> None:
    world = World(head=head, change=planned(rate=1.0, length=length))
    ends_as_if_undisturbed(world)
    runs = 2 * {1: 3, 2: 2, 1000: 1}[length]  # of two epochs of three steps
    noted = [event.body for event in world.chain() if event.kind == "audit"]
    assert noted[-1] == {"rate": 1.0, "runs": runs, "repeated": runs}


@FORMS
def test_an_honest_center_passes_after_the_cut_has_deepened(head: int) -> None:
    change = planned(rate=1.0, steps=2, deepen=((1, 3), (2, 5)), model=DEEP)
    ends_as_if_undisturbed(World(head=head, epochs=3, change=change))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_statements_say_at_which_rate_the_center_was_audited(rate: float) -> None:
    world = World(change=planned(rate=rate)).run_to(State.LINKED)
    asked = world.question("trace", pictures(1, seed=50))
    answers = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"])
    key = world.run.vault.signing.public
    trace = open_envelope(answers.traces[0], "trace", key, TraceStatement, step="test")
    model, linked = world.statement("model", ModelStatement), world.statement("linked-model", LinkedModel)
    assert [trace.audit_rate, model.audit_rate, linked.audit_rate] == [rate] * 3
    assert [e.body["audit_rate"] for e in world.chain() if e.kind == "release"] == [rate]
    assert ("audit" in {event.kind for event in world.chain()}) is (rate > 0)


# --- one that cheats ------------------------------------------------------------------------------------------------


def caught(world: World, code: str, *, tell: str = "") -> None:
    """Stopped with `code`, in the chain too; no checkpoint, no model; the last checkpoint is as it was.

    What the audit found ends the run for good; from another finding it goes on where it was.
    """
    stored = {n: bytes(raw) for n, raw in world.host.storage.items() if n.startswith("checkpoint-")}
    kept = [event.body["sealed"] for event in world.chain() if event.kind == "checkpoint"]
    course = world.course
    error = world.refused(m.Train(course.epoch, course.step), code)
    assert tell in error["what"]
    assert world.chain()[-1].body == {"state": "ready", "code": code}
    assert [event.body["sealed"] for event in world.chain() if event.kind == "checkpoint"] == kept
    world.refused(m.Release(), "session.not-now", fatal=False)
    assert world.run.model is None
    assert {n: bytes(raw) for n, raw in world.host.storage.items() if n.startswith("checkpoint-")} == stored
    if not code.startswith("audit."):
        recovers(world)
        return
    world.restart()
    world.done(world.resume())
    *others, last = world.parties
    for party in others:
        world.done(world.rejoin(party))
    world.refused(world.rejoin(last), "resume.caught")


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(
    ("head", "role", "tell"),
    [
        (0, "loss", "its loss"),
        (0, "ir-grad", "its gradient"),
        (2, "center-out", "its output"),
        (2, "ir-grad", "its gr"),
    ],
)
def test_one_bit_of_one_value_in_one_step_is_found(head: int, role: str, tell: str, step: int) -> None:
    world = audited(head)
    tamper(world, role, one_element(), step=step)
    caught(world, "audit.other-result", tell=f"step {step}, {tell}")


class Still:
    """A zone that gives zeros."""

    def forward(self, live: Tensors, *, at: At, needs_input_grad: bool) -> Tensors:
        assert (at, needs_input_grad) == (At(0, 0, 1), True)
        return tuple(torch.zeros_like(x) for x in live)

    def backward(self, grads: Tensors, *, at: At) -> list[torch.Tensor]:
        assert at == At(0, 0, 1)
        return list(grads)


@pytest.mark.parametrize("out", [-torch.zeros(2, 2), torch.zeros(2, 2).t() - 0.0])
def test_the_sign_of_a_zero_is_a_bit_too(out: torch.Tensor) -> None:
    one = (torch.ones(2, 2),)
    crossing = Crossing(At(0, 0, 1), ir=one, ir_grad=one, out=(out,), out_grad=one)
    if out.signbit().any():
        with pytest.raises(IntegrityError, match=r"^audit\.other-result: "):
            repeat(cast(Zone, Still()), [crossing])
    else:
        repeat(cast(Zone, Still()), [crossing])


def nudge(world: World) -> None:
    bias = world.host.the_center.zone.module.get_parameter("2.conv.bias").data
    bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))


def before_a_commitment(epoch: int, step: int) -> Cheat:
    """The weights are changed after the last step of a short run."""

    def cheat(world: World) -> None:
        def commit(call: m.CommitCenter) -> m.Answer:
            if (call.epoch, call.step) == (epoch, step):
                nudge(world)
            return world.host.commit(call)

        world.host.on_commit = commit

    return cheat


def within_a_short_run(world: World) -> None:
    """The weights are changed between two steps of a short run."""

    def planted(head: object, tensors: object, channel: object) -> None:
        if (getattr(head, "role", ""), getattr(head, "step", 0)) == ("ir", 1):
            nudge(world)
        world.host.take(head, tensors, channel)  # type: ignore[arg-type]

    world.host.on_tensor = planted


def forgetting_momentum(world: World) -> None:
    """A checkpoint of the optimiser's memory that is not its own."""
    commits_to(world, lambda state: {n: v * 0 if n.startswith("momentum/") else v for n, v in state.items()})


def lying_at(epoch: int, step: int) -> Cheat:
    def cheat(world: World) -> None:
        def commit(call: m.CommitCenter) -> m.Answer:
            answer = world.host.commit(call)
            return m.Data(bytes(32)) if (call.epoch, call.step) == (epoch, step) else answer

        world.host.on_commit = commit

    return cheat


def another_center(world: World) -> None:
    world.host.center = Center(world.plan, seed=bytes(32), records=world.manifest.records())


def showing_another(world: World) -> None:
    def other(raw: bytes) -> bytes:
        state = decode_state(raw, step="test")
        state["2.conv.bias"][0] += 1
        return encode_state(state)

    shows(world, other)


CHEATS: dict[str, tuple[Cheat, str]] = {
    "weights change between the steps of a short run": (within_a_short_run, "audit.other-result"),
    "weights change at the end of a short run": (before_a_commitment(0, 2), "audit.other-state"),
    "weights change at the end of an epoch": (before_a_commitment(1, 0), "audit.other-state"),
    "weights change before the first step": (before_a_commitment(0, 0), "center.other-state"),
    "another first CenterNet": (another_center, "center.other-state"),
    "it commits to nothing of this kind": (lying_at(0, 2), "audit.other-state"),
    "it commits to nothing of this kind, at the end": (lying_at(1, 0), "audit.other-state"),
    "it lies of its momentum": (forgetting_momentum, "audit.other-state"),
    "it shows another state": (showing_another, "audit.other-start"),
}


@FORMS
@pytest.mark.parametrize("name", CHEATS)
def test_a_center_that_is_not_the_one_it_says_is_found(name: str, head: int) -> None:
    cheat, code = CHEATS[name]
    world = audited(head)
    cheat(world)
    caught(world, code)


def with_our_front(raw: bytes) -> bytes:
    return encode_state(decode_state(raw, step="test") | {"0.conv.weight": torch.zeros(4, 1, 3, 3)})


@FORMS
def test_a_center_that_shows_more_than_its_own_is_found(head: int) -> None:
    world = audited(head)
    commits_to(world, lambda state: state)  # the honest one passes this way
    world.train()
    shows(world, with_our_front)
    caught(world, "audit.other-start")


@FORMS
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_weights_that_change_between_two_requests_are_found_at_any_rate(head: int, rate: float) -> None:
    world = audited(head, rate=rate)
    world.train()
    nudge(world)
    caught(world, "center.other-state")
