"""The ways of training that are compared: the plain loop, and protected runs in two forms, on the same records."""

from __future__ import annotations

import os
from contextlib import suppress

import msgspec
import torch
from torch import Tensor

from caltrain.bench.memory import peak_mb
from caltrain.bench.protected import protected_run
from caltrain.bench.worker import Gate, Job, Peak, Stopped
from caltrain.host.device import Device
from caltrain.models.spec import Partition
from caltrain.presets import Preset
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds


def preset_of(job: Job) -> Preset:
    """The job's preset, in the form that its way has."""
    preset = msgspec.json.decode(job.preset, type=Preset)
    if job.way == "two-way":
        partition = Partition(front=preset.partition.front)
        return msgspec.structs.replace(preset, partition=partition)
    return preset


def records_of(preset: Preset, count: int) -> tuple[Tensor, Tensor]:
    """Random pictures (N, C, H, W) u8 and labels (N,): what they show costs nothing."""
    generator = torch.Generator().manual_seed(0)
    shape, classes = preset.data.shape, len(preset.data.classes)
    pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, classes, (count,), generator=generator)


def plain_way(job: Job, gate: Gate) -> Peak:
    """Ordinary PyTorch over the unsplit module."""
    preset = preset_of(job)
    pixels, labels = records_of(preset, job.records)
    with suppress(Stopped):
        train_plain(
            preset.model,
            preset.partition,
            preset.data,
            preset.training,
            pixels=pixels,
            labels=labels,
            seeds=RunSeeds.from_run_seed(bytes(32)),
            on_step=lambda *_: gate.step(),
        )
    return Peak(peak_rss_mb=peak_mb(os.getpid()))


def protected_way(job: Job, gate: Gate) -> Peak:
    """The enclave program and the CenterNet of this process."""
    preset = preset_of(job)
    with protected_run(preset, name="bench") as run:
        center = run.ingest(*records_of(preset, job.records), Device.choose(job.device, run.plan))
        center.on_ir = lambda _epoch, _step: gate.step()
        with suppress(Stopped):
            for epoch in range(preset.training.epochs):
                run.train_epoch(epoch)
        images = preset.training.batch * max(1, center.steps)
        return Peak(
            peak_rss_mb=peak_mb(os.getpid()),
            bytes_out_per_image=center.bytes_out / images,
            bytes_in_per_image=center.bytes_in / images,
        )
