"""Runs that end before their time, and what an undisturbed run would have come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from caltrain.boundary.messages import Answer, Rejoin, Write
from caltrain.enclave.checkpoint import CheckpointHeader
from caltrain.enclave.run import State, present
from caltrain.models.layers import Conv, Dropout, Flatten, Linear, MaxPool
from caltrain.models.spec import Deepen, ModelSpec
from caltrain.models.weights import state_of
from caltrain.plan import Plan
from caltrain.training.spec import CenterSpec
from support.world import CLASSES, Change, World

DEEP = ModelSpec(
    layers=(
        Conv(filters=4, batch_norm=True),
        MaxPool(),
        Conv(filters=4),
        Conv(filters=4, batch_norm=True),
        Dropout(p=0.25),
        Conv(filters=4),
        Flatten(),
        Linear(units=len(CLASSES)),
    )
)
"""A model whose cut can move: FrontNets of 2, 3, 4 or 5 layers, HeadNets of 0 to 2."""


def planned(
    *,
    rate: float = 0.0,
    steps: int = 0,
    deepen: tuple[tuple[int, int], ...] = (),
    quorum: int = 0,
    length: int = 2,
    model: ModelSpec | None = None,
    **more: Any,
) -> Change:
    """A plan with an audit, checkpoints every `steps`, (epoch, front) of a schedule, a quorum; `more` of training."""

    schedule = tuple(Deepen(epoch=epoch, front=front) for epoch, front in deepen)

    def change(plan: Plan) -> Plan:
        return msgspec.structs.replace(
            plan,
            center=CenterSpec(audit_rate=rate, audit_steps=length),
            training=msgspec.structs.replace(plan.training, checkpoint_steps=steps, **more),
            partition=msgspec.structs.replace(plan.partition, deepen=schedule),
            model=model or plan.model,
            resume_quorum=quorum,
        )

    return change


def same_bits(world: World, other: torch.nn.Module) -> bool:
    """Whether the released model has the weights of `other`, bit for bit."""
    ours, theirs = state_of(present(world.run.model)), state_of(other)
    assert set(ours) == set(theirs)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def ends_as_if_undisturbed(world: World, *, cuts: dict[int, int] | None = None) -> None:
    """The rest of the run ends with the bits of the plain loop."""
    world.run_to(State.LINKED)
    assert same_bits(world, world.plain(world.run.seed, cuts=cuts))


def recovers(world: World) -> None:
    """After a refusal: the last good checkpoint is there, opens with the parties' words, and the run ends well."""
    world.host.be_honest()
    world.take_up()
    ends_as_if_undisturbed(world)


class Killed(BaseException):
    """Enclave and host end here: nothing after it happens."""


class Killer:
    """Ends both sides just after the host has answered for the `moment`-th time; counts on for ever if it is 0."""

    def __init__(self, world: World, moment: int = 0) -> None:
        self.count, self.moment = 0, moment
        host = world.host
        host.on_read = self._after(host.read)
        host.on_write = self._after(host.write)
        host.on_commit = self._after(host.commit)
        host.on_show = self._after(host.show)
        host.on_tensor = self._after(host.take)

    def _after(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*arguments: Any) -> Any:
            answer = act(*arguments)
            self.count += 1
            if self.count == self.moment:
                raise Killed
            return answer

        return acted


def torn(world: World, name: str, *, after: int) -> None:
    """The machine dies in the middle of the next write to `name`, of which `after` bytes reach the disk."""
    honest = world.host.write

    def write(call: Write) -> Answer:
        if call.name != name:
            return honest(call)
        honest(msgspec.structs.replace(call, data=call.data[:after]))
        raise Killed

    world.host.on_write = write


def trained(*, quorum: int = 0, head: int = 2) -> World:
    """A run with three checkpoints of training behind it, killed."""
    world = World(head=head, change=planned(steps=1, quorum=quorum)).run_to(State.READY)
    for _ in range(3):
        world.train()
    return world


def last_word(world: World) -> Rejoin:
    """All parties but the last have spoken; the word of the last."""
    *others, last = world.parties
    for name in others:
        world.done(world.rejoin(name))
    return world.rejoin(last)


def newest(world: World) -> bytearray:
    """The checkpoint that counts."""
    return world.host.storage[world.newest_checkpoint()]


def older(world: World) -> str:
    """The name of the one before it."""
    return f"checkpoint-{1 - int(world.newest_checkpoint()[-1])}"


def with_header(raw: bytes, **changes: object) -> bytes:
    """A checkpoint with another header in clear."""
    length = int.from_bytes(raw[:4], "little")
    header = msgspec.msgpack.decode(raw[4 : 4 + length], type=CheckpointHeader)
    other = msgspec.msgpack.encode(msgspec.structs.replace(header, **changes))
    return len(other).to_bytes(4, "little") + other + raw[4 + length :]
