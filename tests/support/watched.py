"""A whole life of a run, and everything that crosses in it: by phase, and by a name for what it is.

Names are `tensor ROLE`, `read OBJECT` and `write OBJECT` (calls for what the host stores), `ask commit` and `ask show`
(calls about the CenterNet), `tell PHASE` (progress), `answer FIELD` (of a reply) and `event KIND`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast, get_args

import msgspec
import pytest
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.tensors import Role, TensorHead
from caltrain.crypto.digests import to_text
from caltrain.enclave import contents
from caltrain.enclave.pool import PoolShape
from caltrain.enclave.run import State
from caltrain.exposure.policy import Bound, Policy
from caltrain.models.spec import Partition
from caltrain.plan import CutApproval, ExposureSpec, Plan, Right
from caltrain.training.spec import CenterSpec
from support.members import Pixels
from support.repairs import leave_out, quarantine_of
from support.tiny import pictures
from support.world import World

_PHASES: dict[type, str] = {
    m.Ingest: "ingest",
    m.Assess: "assessment",
    m.Vote: "assessment",
    m.Train: "training",
    m.MoveCut: "cut",
    m.Hunt: "hunt",
    m.Release: "release",
    m.Link: "link",
    m.Query: "questions",
    m.RecordDisclosure: "questions",
    m.Resume: "resume",
    m.Rejoin: "resume",
}
_OF_TRAINING = {
    "measuring": {
        *("tensor eval-ir", "tensor eval-out", "read held-out", "write held-out", "tell measure", "answer held_out")
    },
    "audit": {"ask show", "read center-state", "event audit"},
}


@dataclass(frozen=True)
class Seen:
    """One crossing: its size in bytes as the host sees it, and what is to look into."""

    phase: str
    name: str
    size: int = 0
    tensors: Tensors = ()
    body: dict[str, Any] | None = None


def object_of(name: str) -> str:
    """What kind of object a name of the host's storage means."""
    return re.sub(r"-\d.*$|/.*$", "", name)


def phase_of(request: m.Request, name: str) -> str:
    """The phase of the table to which a crossing belongs."""
    if name in {"write checkpoint", "event checkpoint"}:
        return "checkpoint"
    if name in {"event stopped", "answer error"}:
        return "failure"
    phase = _PHASES.get(type(request), "agreement")
    if phase == "training":
        return next((other for other, names in _OF_TRAINING.items() if name in names), phase)
    return phase


class _Noting:
    """The host's end of the stream while its CenterNet answers."""

    def __init__(self, channel: Channel, world: Watched) -> None:
        self._channel, self._world = channel, world

    def send_tensors(self, tensors: Sequence[Tensor], *, role: Role, run: str, epoch: int, step: int) -> None:
        """Note, and send."""
        self._world.note_tensors(role, tuple(x.clone() for x in tensors))
        self._channel.send_tensors(tensors, role=role, run=run, epoch=epoch, step=step)


class Watched(World):
    """A world that keeps all that crosses."""

    def __init__(self, **given: Any) -> None:
        self.seen: list[Seen] = []
        self._request: m.Request = m.Stop()
        super().__init__(**given)
        self.host.on_tensor = self._take

    def note_tensors(self, role: str, tensors: Tensors) -> None:
        """Tensors that crossed, in either direction."""
        self._note(f"tensor {role}", sum(x.numel() * x.element_size() for x in tensors), tensors=tensors)

    def _note(self, name: str, size: int, **more: Any) -> None:
        self.seen.append(Seen(phase_of(self._request, name), name, size, **more))

    def _take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        self.note_tensors(head.role, tuple(x.clone() for x in tensors))
        self.host.take(head, tensors, cast(Channel, _Noting(channel, self)))

    def send(self, request: m.Request) -> m.Reply:
        """Note what crosses while it is handled."""
        self._request, before = request, len(self.host.log)
        reply = super().send(request)
        self.host.serve()  # what was told last waits for nobody
        for crossing in self.host.log[before:]:
            if crossing.message is not None:
                self._note(*_call(crossing.message))
        for name, size in _fields(reply):
            self._note(f"answer {name}", size)
        for event in self.chain_of_host()[len(self.chain_of_host()) - len(_events(reply)) :]:
            self._note(f"event {event.kind}", 0, body=event.body)
        return reply

    def names(self) -> dict[str, set[str]]:
        """By phase, the names of what crossed."""
        found: dict[str, set[str]] = {}
        for seen in self.seen:
            found.setdefault(seen.phase, set()).add(seen.name)
        return found

    def move(self, front: int) -> None:
        """The cut moves, with every party's word where that makes the FrontNet shallower."""
        head, run = self.run.chain.head, self.run.vault.run
        words = {
            name: party.signer.sign("move-cut", CutApproval(run=run, head=head, party=name, front=front))
            for name, party in self.parties.items()
        }
        shallower = front < self.course.front
        moved = self.plan.partition.at(front)
        left = dict(self.run.front.state()) if self.run.front else {}
        self.done(m.MoveCut(front, words if shallower else {}))
        layers = {str(layer) for layer in range(moved.front, len(self.plan.model.layers))}
        entered = {n: v for n, v in left.items() if n.removeprefix("momentum/").partition(".")[0] in layers}
        self.host.the_center.recut(front, entered if shallower else {})


def _events(reply: m.Reply) -> Sequence[object]:
    return () if isinstance(reply, m.Ready) else reply.events


def _call(message: object) -> tuple[str, int]:
    match message:
        case m.Read(name, _, length):
            return f"read {object_of(name)}", length
        case m.Write(name, _, data):
            return f"write {object_of(name)}", len(data)
        case m.Progress(phase):
            return f"tell {phase}", 0
        case m.CommitCenter():
            return "ask commit", 0
        case m.ShowCenter():
            return "ask show", 0
    raise AssertionError(f"no name for {message!r}")


def _fields(reply: m.Reply) -> Iterator[tuple[str, int]]:
    """The fields of a reply that say something, with the size of what is in them."""
    if isinstance(reply, m.Failed):
        yield "error", 0
    if isinstance(reply, m.Done):
        for name in reply.__struct_fields__:
            value = getattr(reply, name)
            if name != "events" and value != getattr(m.Done(), name):
                yield name, len(msgspec.msgpack.encode(value))


def audited(plan: Plan) -> Plan:
    """Every step of the center is repeated, the first cut has room to move, and the parties judge it."""
    partition = Partition(front=1, head=plan.partition.head)
    bounds = Bound(measure="ssim", at_most=0.3), Bound(measure="channel_correlation", at_most=1.0)
    exposure = ExposureSpec(policy=Policy(bounds=bounds), sample=8)
    center = CenterSpec(audit_rate=1.0, audit_steps=2)
    return msgspec.structs.replace(plan, partition=partition, center=center, exposure=exposure)


@cache
def life(head: int) -> Watched:
    """A run of 23 records and 4 held out, from the plan to a disclosure.

    With a pool of two parts, and no room to keep what is in the records.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PoolShape.fit.__kwdefaults__ or {}, "part_bytes", 256)
        patch.setattr(contents, "_HELD", 0)
        return _live(Watched(head=head, held_out=1, epochs=4, change=audited))


def _live(world: Watched) -> Watched:
    world.run_to(State.AGREED)
    world.host.storage[f"shards/alpha/{'f' * 32}"] = bytearray(b"one that the manifest does not list")
    world.run_to(State.READY).train()
    world.move(2)
    world.train()
    world.move(1)
    world.train()
    world.take_up()
    world.run_to(State.LINKED)
    inputs: Pixels = pictures(3, seed=9)
    for kind in get_args(Right):
        asked = world.question(kind, inputs)
        world.done(m.Query(asked.user, asked.envelope))
    party = world.parties["alpha"]
    commitment = to_text(party.shards[0].commitment(0))
    if not party.shards[0].entry.held_out:
        world.done(m.RecordDisclosure("alpha", party.note(run=world.run.vault.run, commitment=commitment)))
    return world


@cache
def repair(head: int) -> Watched:
    """A run that leaves out records of an earlier one, up to its first step."""
    world = Watched(head=head)
    leave_out(world, quarantine_of(world))
    world.run_to(State.READY)
    return world


@cache
def failure(head: int) -> Watched:
    """A run that stops."""
    world = Watched(head=head).run_to(State.READY)
    assert isinstance(world, Watched)
    world.send(m.Train(7, 7))
    return world
