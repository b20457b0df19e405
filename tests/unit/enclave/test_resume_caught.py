"""A run that the audit stopped is not taken up again; one that stopped for another reason is."""

from __future__ import annotations

import msgspec
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.tensors import TensorHead
from caltrain.enclave.run import State
from caltrain.plan import Plan
from caltrain.training.spec import CenterSpec
from support.world import World


def audited(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, center=CenterSpec(audit_rate=1.0, audit_steps=2))


def cheating(world: World) -> None:
    """One value of one gradient is another."""

    def take(head: TensorHead, tensors: tuple[Tensor, ...], channel: Channel) -> None:
        if head.role == "center-grad" and head.step == 1:
            tensors[0].view(-1)[0] += 1.0
        world.host.take(head, tensors, channel)

    world.host.on_tensor = take


def test_a_run_that_the_audit_stopped_is_not_taken_up_again() -> None:
    world = World(change=audited).run_to(State.READY)
    cheating(world)
    world.refused(m.Train(0), "audit.other-result")
    world.host.on_tensor = world.host.take
    world.restart()
    world.done(world.resume())
    first, second, third = world.parties
    world.done(world.rejoin(first))
    world.done(world.rejoin(second))
    reply = world.send(world.rejoin(third))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("resume.caught", False)
    assert world.run.state is State.RESUMING
    assert world.run.seed == b""
    assert world.run.front is None


def test_a_run_that_stopped_for_want_of_a_disk_is_taken_up() -> None:
    world = World(change=audited).run_to(State.READY)
    world.host.on_write = lambda _call: m.CallFailed({"family": "EnvironmentFault", "code": "storage.full"})
    world.refused(m.Train(0), "storage.full")
    assert world.chain()[-1].body == {"state": "ready", "code": "host.reported"}
    world.host.on_write = world.host.write
    world.take_up()
    world.train()
