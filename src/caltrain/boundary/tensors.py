"""A tensor frame: which tensors these are and where they belong, then their bytes (inline, or in a slot of the ring).

At one cut several tensors may be live: they cross together. Strides travel with each: the kernels that torch picks,
and with them the last bits of a result, depend on the memory layout. Only dense layouts pass, so the bytes are exactly
the elements.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from caltrain.errors import ProtocolError
from caltrain.models.spec import MAX_LIVE
from caltrain.records.commitment import ShardId

Role = Literal["ir", "labels", "center-out", "center-grad", "ir-grad", "loss", "eval-ir", "eval-out"]
Element = Literal["f32", "i64", "bf16", "i8"]
_DTYPES: dict[Element, torch.dtype] = {
    "f32": torch.float32,
    "i64": torch.int64,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
}
_NAMES: dict[torch.dtype, Element] = {dtype: name for name, dtype in _DTYPES.items()}
_Extent = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Extents = Annotated[tuple[_Extent, ...], msgspec.Meta(max_length=5)]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Element type, shape and strides (in elements) of one tensor."""

    dtype: Element
    shape: _Extents
    strides: _Extents

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class TensorHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tensors of which step, in order; `slot` is the ring slot, or None when the bytes are inline."""

    role: Role
    run: ShardId
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    step: Annotated[int, msgspec.Meta(ge=0)]
    parts: Annotated[tuple[Layout, ...], msgspec.Meta(min_length=1, max_length=MAX_LIVE)]
    slot: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None

    @property
    def nbytes(self) -> int:
        """Size of all elements in bytes."""
        return sum(part.nbytes for part in self.parts)


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
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def layout_of(tensor: Tensor) -> Layout:
    """Layout of a dense tensor."""
    return Layout(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.stride())


def restore(head: TensorHead, data: memoryview) -> tuple[Tensor, ...]:
    """Private copies of `data` as the tensors that `head` says. Raises ProtocolError `tensor.malformed`."""
    for part in head.parts:
        if (
            len(part.strides) != len(part.shape)
            or min(part.shape, default=0) < 1
            or not _is_dense(part.shape, part.strides)
        ):
            raise refuse(f"{head.role} of {part.shape} with strides {part.strides}")
    if head.nbytes != len(data):
        raise refuse(f"{head.role}: {len(data)} bytes for {head.nbytes}")
    tensors, start = [], 0
    for part in head.parts:
        tensors.append(_copy(part, data[start : start + part.nbytes]))
        start += part.nbytes
    return tuple(tensors)


def _copy(part: Layout, data: memoryview) -> Tensor:
    flat = torch.empty(math.prod(part.shape), dtype=_DTYPES[part.dtype])
    _bytes_of(flat)[:] = data
    return flat.as_strided(part.shape, part.strides)


def refuse(what: str) -> ProtocolError:
    """The error for a tensor that does not belong or is not what was due."""
    return ProtocolError(
        "tensor.malformed",
        f"a tensor was refused: {what}",
        step="receive tensor",
        fix="The other end sent what no correct one sends: stop the run and look at its log.",
    )
