"""From stored records to the tensor that the first layer sees: augmentation, normalisation, memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

from caltrain.records.schema import DataSchema
from caltrain.training.seeds import Draws
from caltrain.training.spec import Augment


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of every 4-d tensor of a run."""
    return torch.channels_last if channels_last else torch.contiguous_format


def augment(pixels: Tensor, spec: Augment, draws: Draws) -> Tensor:
    """Shift and mirror each record of (N, C, H, W) by its own draw; any element type."""
    n, _, height, width = pixels.shape
    if spec.shift:
        s = spec.shift
        offset = torch.randint(0, 2 * s + 1, (2, n, 1), generator=draws.generator("shift"))
        padded = torch.nn.functional.pad(pixels, (s, s, s, s))
        rows, columns = offset[0] + torch.arange(height), offset[1] + torch.arange(width)  # (N, H), (N, W)
        record = torch.arange(n)[:, None, None]
        # Indices on both sides of the slice put the channels last; back to (N, C, H, W).
        pixels = padded[record, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if spec.flip:
        mirrored = torch.rand((n, 1, 1, 1), generator=draws.generator("flip")) < 0.5
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
    return pixels


def normalise(pixels: Tensor, schema: DataSchema, *, channels_last: bool) -> Tensor:
    """(N, C, H, W) of u8 (scaled to 0..1) or f32 to normalised float32 in the run's layout."""
    x = pixels.to(torch.float32)
    if schema.dtype == "u8":
        x = x / 255
    mean, std = (torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (schema.mean, schema.std))
    return ((x - mean) / std).contiguous(memory_format=memory_format(channels_last))
