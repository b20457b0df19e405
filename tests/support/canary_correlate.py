"""Whether a channel that leaves is a picture: outgoing tensors against the records that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.boundary.channel import Tensors
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.tensors import TensorHead, restore
from support.canary_replay import Step

ALIKE = 0.98
PIXELS = 16
"""Fewer pixels than these resemble something by chance."""


@dataclass(frozen=True)
class Likeness:
    """The channel of an outgoing tensor that is most like a record: absolute Pearson correlation."""

    r: float
    role: str
    epoch: int
    step: int
    record: int
    channel: int

    @property
    def found(self) -> bool:
        """Whether the channel shows the record."""
        return self.r >= ALIKE


def tensors_in(stream: bytes) -> Iterator[tuple[TensorHead, Tensors]]:
    """All tensors of a tapped stream, those of a frame together; what went through the ring follows its frame."""
    view, at = memoryview(stream), 0
    while at < len(view):
        length, kind = int.from_bytes(view[at : at + 4], "little"), view[at + 4]
        body, at = view[at + 5 : at + 4 + length], at + 4 + length
        if kind != FrameKind.TENSOR:
            continue
        size = int.from_bytes(body[:4], "little")
        head = msgspec.msgpack.decode(body[4 : 4 + size], type=TensorHead)
        if head.slot is None:
            data = body[4 + size :]
        else:
            data, at = view[at : at + head.nbytes], at + head.nbytes
        yield head, restore(head, data)


def pearson(channels: Tensor, references: Tensor) -> Tensor:
    """(N, C, P) and (N, R, P) to correlations (N, C, R); what does not vary correlates with nothing."""
    a, b = (t.double() - t.double().mean(dim=2, keepdim=True) for t in (channels, references))
    product = torch.einsum("ncp,nrp->ncr", a, b)
    norms = a.norm(dim=2)[:, :, None] * b.norm(dim=2)[:, None, :]
    return torch.where(norms > 1e-9, product / norms.clamp(min=1e-9), torch.zeros(()).double())


def references(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Each channel of (N, C, H, W) and their mean, averaged and sampled down to `size`: (N, R, pixels)."""
    with_grey = torch.cat((pictures, pictures.mean(dim=1, keepdim=True)), dim=1)
    averaged = F.adaptive_avg_pool2d(with_grey, size)
    sampled = F.interpolate(with_grey, size=size, mode="nearest")
    return torch.cat((averaged, sampled), dim=1).flatten(2)


def likeness(stream: bytes, steps: Sequence[Step], *, plain: Tensor, roles: Sequence[str]) -> dict[str, Likeness]:
    """For each of `roles` the channel most like the record (as it is in `plain`, or as augmented) it comes from."""
    by_place = {(s.epoch, s.step): s for s in steps}
    best: dict[str, Likeness] = {}
    for head, tensor in ((head, tensor) for head, tensors in tensors_in(stream) for tensor in tensors):
        if head.role not in roles or tensor.dim() != 4 or tensor[0, 0].numel() < PIXELS:
            continue
        step = by_place[head.epoch, head.step]
        pictures = torch.cat(
            [references(p, (tensor.shape[2], tensor.shape[3])) for p in (step.x, plain[step.batch])], dim=1
        )
        r = pearson(tensor.flatten(2), pictures).abs().amax(dim=2)
        record, channel = divmod(int(r.argmax()), r.shape[1])
        top = Likeness(float(r.max()), head.role, head.epoch, head.step, int(step.batch[record]), channel)
        best[head.role] = max(best.get(head.role, top), top, key=lambda found: found.r)
    return best
