"""Whether a protected run ends with the bits of the plain loop: a short run of each form, released and repeated."""

from __future__ import annotations

import msgspec
import torch

from caltrain.bench.protected import protected_run
from caltrain.bench.training_ways import records_of
from caltrain.host.device import Device
from caltrain.models.spec import Partition
from caltrain.models.weights import state_of
from caltrain.presets import Preset
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

_BATCH, _STEPS = 16, 3


def weights_identical(preset: Preset) -> bool:
    """Both forms at the preset's cut, three steps each."""
    two_way = Partition(front=preset.partition.front)
    return all(_same(preset, partition) for partition in (two_way, preset.partition))


def _same(preset: Preset, partition: Partition) -> bool:
    training = msgspec.structs.replace(preset.training, batch=_BATCH, epochs=1)
    short = msgspec.structs.replace(preset, partition=partition, training=training)
    pixels, labels = records_of(short, _BATCH * _STEPS)
    with protected_run(short, name="identity") as run:
        center = run.ingest(pixels, labels, Device.cpu())
        run.train_epoch(0)
        state, seed = run.release(center.center)
    seeds = RunSeeds.from_run_seed(seed)
    plain = state_of(
        train_plain(short.model, partition, short.data, training, pixels=pixels, labels=labels, seeds=seeds)
    )
    return state.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in state.items())
