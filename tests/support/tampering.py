"""A host whose CenterNet answers honestly but for one tensor.

tamper(world, "ir-grad", step=1, instead=changed(lambda x: x * 2))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import Answer, CallFailed, CommitCenter, Data, Message, ShowCenter
from caltrain.boundary.tensors import Role
from caltrain.crypto.digests import to_raw
from caltrain.host.kept import center_object
from caltrain.models.weights import decode_state, encode_state, model_digest
from support.world import World

Fields = dict[str, Any]
Send = Callable[[Channel, Sequence[Tensor], Fields], None]


class Tampering(Channel):
    """The host's channel, but what is due in one role at one place is sent by `instead`."""

    def __init__(self, channel: Channel, place: tuple[str, int, int], instead: Send) -> None:
        self.channel, self.place, self.instead = channel, place, instead

    def send_tensors(self, tensors: Sequence[Tensor], *, role: Role, run: str, epoch: int, step: int) -> None:
        """As `Channel.send_tensors`, but for that place."""
        fields: Fields = {"role": role, "run": run, "epoch": epoch, "step": step}
        if (role, epoch, step) == self.place:
            self.instead(self.channel, tensors, fields)
        else:
            self.channel.send_tensors(tensors, role=role, run=run, epoch=epoch, step=step)


def tamper(world: World, role: str, instead: Send, *, epoch: int = 0, step: int = 1) -> None:
    """From now on the host sends `instead` what is due in `role` at that step."""
    host = world.host
    host.on_tensor = lambda head, tensors, channel: host.take(
        head, tensors, Tampering(channel, (role, epoch, step), instead)
    )


def changed(change: Callable[[Tensor], Tensor]) -> Send:
    """Every tensor is another one."""
    return lambda channel, tensors, fields: channel.send_tensors([change(x) for x in tensors], **fields)


def called(**other: Any) -> Send:
    """The tensors are right; what their head says is not."""
    return lambda channel, tensors, fields: channel.send_tensors(tensors, **(fields | other))


def one_element(value: float | None = None) -> Send:
    """One element is `value`, or the next float32 to what it should be."""

    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        first = (0,) * tensor.dim()
        up = torch.nextafter(tensor[first], torch.tensor(torch.inf))
        tensor[first] = up if value is None else value
        return tensor

    return changed(poison)


def message(answer: Message) -> Send:
    """A message in place of the tensors."""
    return lambda channel, _tensors, _fields: channel.send(answer)


def shows(world: World, change: Callable[[bytes], bytes]) -> None:
    """When the host is asked for a committed state, it gives other bytes."""
    host = world.host

    def show(call: ShowCenter) -> Answer:
        answer = host.show(call)
        if isinstance(answer, CallFailed):
            return answer
        raw = change(bytes(host.storage["center-state"]))
        host.storage["center-state"] = bytearray(raw)
        return Data(len(raw).to_bytes(8, "big"))

    host.on_show = show


def commits_to(world: World, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The host commits to another CenterNet than the one that computes, and shows that other one."""
    host, spec = world.host, world.plan.model

    def commit(call: CommitCenter) -> Answer:
        answer = host.commit(call)
        state = change(decode_state(host.the_center.committed(call.epoch, call.step), step="test"))
        if call.durable:
            host.storage[center_object(call.epoch, call.step)] = bytearray(encode_state(state))
        return Data(to_raw(model_digest(spec, state))) if isinstance(answer, Data) else answer

    host.on_commit = commit
    shows(world, lambda raw: encode_state(change(decode_state(raw, step="test"))))
