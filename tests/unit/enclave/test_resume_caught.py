"""A run that the audit stopped is not taken up again; one that stopped for another reason is."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.tensors import TensorHead
from caltrain.enclave.run import Batch, State
from caltrain.plan import Plan
from caltrain.provenance.statements import LinkedModel, ModelStatement
from caltrain.training.prefetch import Prefetch
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


def test_statements_count_how_often_a_run_was_taken_up() -> None:
    world = World(change=audited).run_to(State.READY)
    world.take_up()
    world.train()
    world.take_up()
    world.run_to(State.LINKED)
    assert world.statement("model", ModelStatement).resumes == 2
    assert world.statement("linked-model", LinkedModel).resumes == 2
    assert World().run_to(State.LINKED).statement("linked-model", LinkedModel).resumes == 0


def test_after_a_fatal_failure_the_thread_that_reads_ahead_asks_for_nothing_more() -> None:
    world = World(change=audited).run_to(State.READY)
    asked: list[int] = []
    go_on = threading.Event()

    def batches() -> Iterator[Batch]:
        for number in range(100):
            asked.append(number)
            yield torch.zeros(0), torch.zeros(0)
            go_on.wait(5)

    ahead = Prefetch(batches())
    world.run.batches = ahead
    next(ahead)
    world.refused(m.Train(7), "train.not-here")
    go_on.set()
    (thread,) = [t for t in threading.enumerate() if t.name == "prefetch"]
    thread.join(5)
    assert not thread.is_alive()  # else it would wait for somebody to take the next batch
    assert len(asked) <= 3
