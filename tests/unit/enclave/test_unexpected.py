"""What nobody foresaw ends a run by a name, and tells the host no more than that it happened."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from caltrain.boundary import messages as m
from caltrain.enclave import session
from caltrain.enclave.run import State
from caltrain.plan import Plan
from caltrain.training.spec import CenterSpec
from support.world import World

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


def audited(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, center=CenterSpec(audit_rate=1.0, audit_steps=2))


@pytest.mark.parametrize("state", [State.ENROLLING, State.READY])
def test_an_error_of_no_family_stops_the_run_and_says_nothing_of_itself(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("the record is 17, 23, 42")

    world = World().run_to(state)
    request = m.Train(0) if state is State.READY else m.MakeManifest()
    allowed = session.TABLE[state, type(request)][1]
    monkeypatch.setitem(session.TABLE, (state, type(request)), (broken, allowed))
    error = world.refused(request, "enclave.internal", fatal=True)
    assert "17" not in str(error)
    assert world.chain()[-1].body == {"state": str(state), "code": "enclave.internal"}


FAILURES = {
    "it says that its disk failed": {"family": "EnvironmentFault", "code": "storage.failed", "what": "disk"},
    "it blames a party": {"family": "IntegrityError", "code": "audit.other-start", "what": "ALPHA POISONED THE RUN"},
    "it answers nothing that can be read": {},
}


@FORMS
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_host_that_does_not_show_what_is_audited_has_been_caught(failure: dict[str, str], head: int) -> None:
    world = World(head=head, change=audited).run_to(State.READY)
    world.host.on_show = lambda _: m.CallFailed(failure)
    error = world.refused(m.Train(0), "audit.not-shown")
    assert "ALPHA" not in str(error)
    assert world.chain()[-1].body == {"state": "ready", "code": "audit.not-shown"}


@FORMS
@pytest.mark.parametrize("answer", [b"", b"1234567", (1 << 60).to_bytes(8, "big"), bytes(8)])
def test_an_answer_of_the_wrong_size_is_no_way_out_of_the_audit(answer: bytes, head: int) -> None:
    world = World(head=head, change=audited).run_to(State.READY)
    world.host.on_show = lambda _: m.Data(answer)
    reply = world.send(m.Train(0))
    assert isinstance(reply, m.Failed)
    assert reply.error["code"].startswith("audit.")


def test_a_loss_that_is_no_number_stops_the_run_before_its_gradient_leaves() -> None:
    world = World().run_to(State.READY)
    head = world.run.head
    assert head is not None
    real = head.backward_from_labels
    setattr(head, "backward_from_labels", lambda labels, at: (real(labels, at=at)[0], math.nan))  # noqa: B010
    world.refused(m.Train(0), "train.overflow")
    assert "center-grad" not in {crossed.role for crossed in world.host.out()}


@pytest.mark.parametrize("zone", ["front", "head"])
def test_inner_weights_that_are_no_numbers_do_not_replace_a_good_checkpoint(zone: str) -> None:
    world = World().run_to(State.READY)
    world.train()
    kept = {name: bytes(value) for name, value in world.host.storage.items() if name.startswith("checkpoint-")}
    inner = getattr(world.run, zone)
    real = inner.descent.step

    def spoil(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        for parameter in inner.descent.parameters.values():
            parameter.data.fill_(math.nan)

    inner.descent.step = spoil
    reply = world.send(m.Train(1))
    assert isinstance(reply, m.Failed)
    assert reply.fatal
    assert {n: bytes(v) for n, v in world.host.storage.items() if n.startswith("checkpoint-")} == kept
    world.take_up()


@pytest.mark.parametrize("resumed", [False, True], ids=["as it began", "after a restart"])
def test_the_plans_bound_is_that_of_what_comes_in(resumed: bool) -> None:
    narrow = CenterSpec(max_rms=1e-6)
    world = World(change=lambda plan: msgspec.structs.replace(plan, center=narrow)).run_to(State.READY)
    if resumed:
        world.take_up()
    world.refused(m.Train(0), "tensor.malformed")
