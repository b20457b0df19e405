"""A tensor frame: what the tensor is and where it belongs, then its bytes (inline, or in a slot of the ring).

Strides travel with the tensor: the kernels that torch picks, and with them the last bits of a result, depend on the
memory layout. Only dense layouts pass, so the bytes are exactly the elements.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from caltrain.errors import ProtocolError
from caltrain.records.commitment import ShardId

Role = Literal["ir", "labels", "center-out", "center-grad", "ir-grad", "loss"]
Element = Literal["f32", "i64"]
_DTYPES: dict[Element, torch.dtype] = {"f32": torch.float32, "i64": torch.int64}
_NAMES: dict[torch.dtype, Element] = {dtype: name for name, dtype in _DTYPES.items()}
_Extent = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Extents = Annotated[tuple[_Extent, ...], msgspec.Meta(max_length=5)]


class TensorHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tensor of which step, and its layout; `slot` is the ring slot, or None when the bytes are inline."""

    role: Role
    run: ShardId
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    step: Annotated[int, msgspec.Meta(ge=0)]
    dtype: Element
    shape: _Extents
    strides: _Extents
    slot: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flatten(tensor: Tensor) -> tuple[Tensor, memoryview]:
    """The dense tensor whose layout to announce, and a view of its bytes in storage order."""
    tensor = tensor.detach()
    if not _is_dense(tuple(tensor.shape), tensor.stride()):
        tensor = tensor.contiguous()
    return tensor, _bytes_of(tensor.as_strided((tensor.numel(),), (1,)))


def _bytes_of(flat: Tensor) -> memoryview:
    array: Any = flat.numpy()
    return memoryview(array).cast("B")


def head_of(tensor: Tensor, *, role: Role, run: str, epoch: int, step: int, slot: int | None) -> TensorHead:
    """Head of a dense tensor."""
    return TensorHead(role, run, epoch, step, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.stride(), slot)


def restore(head: TensorHead, data: memoryview) -> Tensor:
    """A private copy of `data` as the tensor that `head` says. Raises ProtocolError `tensor.malformed`."""
    if (
        len(head.strides) != len(head.shape)
        or min(head.shape, default=0) < 1
        or not _is_dense(head.shape, head.strides)
        or head.nbytes != len(data)
    ):
        raise refuse(f"{head.role}: {len(data)} bytes as {head.shape} with strides {head.strides}")
    flat = torch.empty(math.prod(head.shape), dtype=_DTYPES[head.dtype])
    _bytes_of(flat)[:] = data
    return flat.as_strided(head.shape, head.strides)


def refuse(what: str) -> ProtocolError:
    """The error for a tensor that does not belong or is not what was due."""
    return ProtocolError(
        "tensor.malformed",
        f"a tensor was refused: {what}",
        step="receive tensor",
        fix="The other end sent what no correct one sends: stop the run and look at its log.",
    )
