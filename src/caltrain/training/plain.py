"""The plain reference: ordinary PyTorch over the unsplit module, with no code of enclave or host.

Given the run seed (which leaves the enclave only sealed to the parties, after the run) and the same records in the
manifest's order, it must end with the same weights, bit for bit, on the CPU with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.models.network import build, lay_out, set_draws, zone_of, zone_ranges
from caltrain.models.spec import ModelSpec, Partition
from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment, normalise
from caltrain.training.optimiser import optimiser, rate_at, set_rate
from caltrain.training.seeds import Draws, RunSeeds, epoch_order, initialise
from caltrain.training.spec import TrainingSpec

OnEpoch = Callable[[int, float], None]


def train_plain(
    spec: ModelSpec,
    partition: Partition,
    schema: DataSchema,
    training: TrainingSpec,
    *,
    pixels: Tensor,
    labels: Tensor,
    seeds: RunSeeds,
    on_epoch: OnEpoch = lambda _epoch, _loss: None,
) -> nn.Sequential:
    """Train on `pixels` (N, C, H, W) u8 or f32 and `labels` (N,) int64; returns the model in eval mode."""
    torch.set_num_threads(training.threads)
    model = build(spec, input_shape=schema.shape)
    # The partition decides only which key a layer draws its first weights and its dropout masks from.
    keys = (seeds.front, seeds.center, seeds.head)
    zones = [(zone_of(model, r), key) for r, key in zip(zone_ranges(spec, partition), keys, strict=True)]
    for zone, key in zones:
        initialise(zone, key)
    lay_out(model, channels_last=training.channels_last)
    model.train()
    sgd = optimiser(model, training)
    steps = len(labels) // training.batch
    order = torch.arange(len(labels))
    for epoch in range(training.epochs):
        order = order[epoch_order(len(labels), seed=seeds.order, epoch=epoch)]
        total = 0.0
        for step in range(steps):
            batch = order[step * training.batch : (step + 1) * training.batch]
            x = augment(pixels[batch], training.augment, Draws(seeds.augment, epoch, step))
            for zone, key in zones:
                set_draws(zone, Draws(key, epoch, step))
            loss = F.cross_entropy(model(normalise(x, schema, channels_last=training.channels_last)), labels[batch])
            set_rate(sgd, rate_at(training, epoch=epoch, step=step, steps=steps))
            sgd.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            total += loss.item()
        on_epoch(epoch, total / max(steps, 1))
    model.eval()
    return model
