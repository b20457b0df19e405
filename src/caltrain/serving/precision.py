"""How values cross a cut of a served model: as float32, as bfloat16, or as int8 with one scale a record.

Both sides use this, in both directions. A record's numbers depend on that record alone, whatever is computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caltrain.boundary.tensors import refuse
from caltrain.serving.package import Across

_LARGEST = 127


def narrow(tensors: Sequence[Tensor], across: Across) -> list[Tensor]:
    """What to send for float32 tensors (N, ...), in their memory layout; for int8 each one and its scales (N,)."""
    match across:
        case "f32":
            return list(tensors)
        case "bf16":
            return [x.to(torch.bfloat16) for x in tensors]
        case "int8":
            return [part for x in tensors for part in _quantised(x)]


def widen(tensors: Sequence[Tensor], across: Across) -> list[Tensor]:
    """Inverse of `narrow` up to rounding. Raises ProtocolError `tensor.malformed` for what it does not give.

    What is not finite stays so: look for it in the result.
    """
    match across:
        case "f32":
            return [_typed(x, torch.float32) for x in tensors]
        case "bf16":
            return [_typed(x, torch.bfloat16).to(torch.float32) for x in tensors]
        case "int8":
            if len(tensors) % 2:
                raise refuse("int8 values without their scales")
            return [_restored(x, scale) for x, scale in zip(tensors[::2], tensors[1::2], strict=True)]


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.flatten(1).abs().amax(1) if x.dim() > 1 else x.abs()
    scale = torch.where(largest == 0, 1.0, largest / _LARGEST)
    return (x / _beside(scale, x)).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def _restored(x: Tensor, scale: Tensor) -> Tensor:
    if x.dim() < 1 or tuple(scale.shape) != (x.shape[0],):
        raise refuse(f"scales of {tuple(scale.shape)} for values of {tuple(x.shape)}")
    return _typed(x, torch.int8).to(torch.float32) * _beside(_typed(scale, torch.float32), x)


def _beside(scale: Tensor, x: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (x.dim() - 1))


def _typed(x: Tensor, due: torch.dtype) -> Tensor:
    if x.dtype != due:
        raise refuse(f"elements of {x.dtype}, {due} were due")
    return x
