"""Whether a record's bits depend on its place in a batch: kernels may compute the last rows in another way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.models.layers import Shape
from caltrain.models.network import Network


@torch.inference_mode()
def check_places(zone: Network, shapes: Sequence[Shape], rows: int) -> None:
    """Compute drawn values for `zone`, in eval mode, in several orders of a batch of `rows`.

    `shapes` are those of one record at the zone's start. Which kernel computes a batch depends on its size and layout,
    not on values. Raises ConfigError `model.bits-by-place`.
    """
    generator = torch.Generator().manual_seed(0)
    live = [_laid_out(torch.randn(rows, *shape, generator=generator)) for shape in shapes]
    found, _ = zone.through(live)
    for order in (torch.arange(rows).flip(0), torch.arange(rows).roll(1), torch.arange(rows).roll(rows // 2)):
        again, _ = zone.through([_laid_out(x[order]) for x in live])
        if not all(torch.equal(a[order], b) for a, b in zip(found, again, strict=True)):
            raise ConfigError(
                "model.bits-by-place",
                f"in batches of {rows} a record's last bits depend on its place in the batch",
                step="check fixed batches",
                fix="Choose another number of --rows, such as a multiple of 16, or leave out --fixed.",
            )


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
