"""Numbers that are none stop a run before they leave, or are kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from caltrain.errors import DataError


def check_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raise DataError `train.overflow` for NaN, infinity, or values so large that their norm is infinite."""
    if not all(bool(torch.linalg.vector_norm(x.float()).isfinite()) for x in tensors):
        raise DataError(
            "train.overflow",
            f"{what} are not finite numbers",
            step="train",
            fix="Lower the learning rate; with f32 data, look for records with huge elements.",
        )
