"""How far a host gets that steers the FrontNet of the real enclave program, without the center's audit and with it.

    python scripts/steering.py [--data digits|mnist] [--folder DIR] [--form two-way|ternary] [--steps N] [--draws N]
        [--short-run N]

The host's CenterNet computes honestly, commits honestly, and sends gradients of `caltrain.exposure.attacks.steering`
instead of its own (plain norm bounds: the plan's `max_rms`). First table: unaudited, after so many steps, how close the
decoder's pictures of the last 256 records come, beside an honest host's with the same decoder, and guesses. The run
seed that the finished run releases tells which records these were. Second table: runs with the audit from which the
enclave withdraws by itself; the success that they had by then is the first table's after as many steps. What was seen
stays seen.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from caltrain.bench.protected import Counted, ProtectedRun, protected_run
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.tensors import Role, TensorHead
from caltrain.errors import CaltrainError
from caltrain.exposure.attacks.steering import HijackBudget, Hijacker
from caltrain.exposure.measures import reidentify, ssim
from caltrain.host.device import Device
from caltrain.models.spec import Partition
from caltrain.presets import PRESETS, Preset
from caltrain.records.readers.named import load
from caltrain.training.batches import augment
from caltrain.training.seeds import Draws, RunSeeds, epoch_order
from caltrain.training.spec import CenterSpec

RATES = (0.01, 0.05, 0.1, 0.5)
EPOCH = 32
SCORED = 256
CANDIDATES = 1000
Records = tuple[Tensor, Tensor]


class Success(NamedTuple):
    """Of 256 reconstructions: mean SSIM, and the share re-identified among 1,000 candidates."""

    ssim: float
    found: float


@dataclass
class Hostile:
    """A host's CenterNet, honest but for the gradients that it sends back, if it steers at all."""

    center: Counted
    hijacker: Hijacker
    steers: bool
    pictures: list[Tensor] = field(default_factory=list)
    crafted: Tensors = ()

    def take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        """Honest towards the honest center, which answers into a channel that is not."""
        if head.role == "ir":
            self.pictures.append(self.hijacker.reconstruct(tensors))
            self.crafted = self.hijacker.gradients(tensors) if self.steers else ()
        self.center.take(head, tensors, _Swapping(channel, self.crafted))

    def commit(self, epoch: int, step: int) -> bytes:
        """Of the honest center."""
        return self.center.commit(epoch, step)

    def committed(self, epoch: int, step: int) -> bytes:
        """Of the honest center."""
        return self.center.committed(epoch, step)


class _Swapping(Channel):
    def __init__(self, channel: Channel, crafted: Tensors) -> None:
        self._channel, self._crafted = channel, crafted

    def send_tensors(self, tensors: Sequence[Tensor], *, role: Role, run: str, epoch: int, step: int) -> None:
        """As the channel, but for the gradient."""
        sent = self._crafted if role == "ir-grad" and self._crafted else tensors
        self._channel.send_tensors(sent, role=role, run=run, epoch=epoch, step=step)


def start(run: ProtectedRun, records: Records, hijacker: Hijacker, *, steers: bool) -> Hostile:
    """Everything up to the first step."""
    hostile = Hostile(run.ingest(*records, Device.cpu()), copy.deepcopy(hijacker), steers)
    run.enclave.center = hostile
    return hostile


def unaudited(preset: Preset, records: Records, hijacker: Hijacker, *, steers: bool = True) -> list[Success]:
    """Success after every short run of a whole run."""
    with protected_run(preset, name="steering") as run:
        hostile = start(run, records, hijacker, steers=steers)
        for epoch in range(preset.training.epochs):
            run.train_epoch(epoch)
        _, seed = run.release(hostile.center.center)
    truth = true_pictures(preset, records[0], RunSeeds.from_run_seed(seed))
    last, every = SCORED // preset.training.batch, preset.center.audit_steps
    windows = [slice(max(0, stop - last), stop) for stop in range(every, len(truth) + 1, every)]
    return [success(torch.cat(hostile.pictures[w]), torch.cat(truth[w]), records[0]) for w in windows]


def true_pictures(preset: Preset, pixels: Tensor, seeds: RunSeeds) -> list[Tensor]:
    """Of every step, the batch as the first layer saw it."""
    training, order, found = preset.training, torch.arange(len(pixels)), []
    for epoch in range(training.epochs):
        order = order[epoch_order(len(pixels), seed=seeds.order, epoch=epoch)]
        for step, rows in enumerate(torch.split(order, training.batch)):
            found.append(augment(pixels[rows], training.augment, Draws(seeds.augment, epoch, step)).float() / 255)
    return found


def success(guesses: Tensor, truth: Tensor, others: Tensor) -> Success:
    """Candidates are the truth, and records of the same parties as they are stored."""
    candidates = torch.cat([truth, others[: CANDIDATES - len(truth)].float() / 255])
    return Success(float(ssim(guesses, truth).mean()), float(reidentify(guesses, candidates).float().mean()))


def until_caught(preset: Preset, records: Records, hijacker: Hijacker) -> tuple[int, bool]:
    """Steps until the run was stopped by a finding, or all of them."""
    with protected_run(preset, name="steering") as run:
        hostile = start(run, records, hijacker, steers=True)
        try:
            for epoch in range(preset.training.epochs):
                run.train_epoch(epoch)
        except CaltrainError as error:
            if not error.code.startswith("audit."):
                raise
            return len(hostile.pictures), True
    return len(hostile.pictures), False


def audited(preset: Preset, records: Records, hijacker: Hijacker, curve: list[Success], *, draws: int) -> None:
    """Print the second table."""
    runs, length = len(curve), preset.center.audit_steps
    print(f"| audit rate | caught within {runs} short runs | calculated | steps until caught | SSIM | re-identified |")
    print("|---|---|---|---|---|---|")
    for rate in RATES:
        stricter = with_audit(preset, rate, length)
        ends = [until_caught(stricter, records, hijacker) for _ in range(draws)]
        by_then = [curve[steps // length - 1] for steps, _ in ends]
        caught, steps = sum(found for _, found in ends), [steps for steps, found in ends if found]
        print(
            f"| {rate:g} | {caught} of {draws} | {1 - (1 - rate) ** runs:.2f} "
            f"| {f'{np.mean(steps):.0f} ({min(steps)} to {max(steps)})' if steps else '-'} "
            f"| {np.mean([s.ssim for s in by_then]):.2f} | {np.mean([s.found for s in by_then]):.2f} |",
            flush=True,
        )


def with_audit(preset: Preset, rate: float, length: int) -> Preset:
    """The preset with an audit of that share of its short runs of `length` steps."""
    return msgspec.structs.replace(preset, center=CenterSpec(audit_rate=rate, audit_steps=length))


def main() -> int:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--form", choices=("two-way", "ternary"), default="two-way")
    parser.add_argument("--steps", type=int, default=256, help=f"a multiple of {EPOCH}")
    parser.add_argument("--short-run", type=int, default=16, choices=(1, 2, 4, 8, 16), help="steps")
    parser.add_argument("--draws", type=int, default=8, help="runs at each audit rate")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    preset = PRESETS[asked.data]
    torch.set_num_threads(preset.training.threads)
    cut = Partition(front=preset.partition.front, head=0 if asked.form == "two-way" else preset.partition.head)
    # The rate stays as in the first epochs of a long run: the steps are the beginning of one.
    training = msgspec.structs.replace(preset.training, epochs=asked.steps // EPOCH, schedule="constant")
    preset = with_audit(msgspec.structs.replace(preset, partition=cut, training=training), 0.0, asked.short_run)
    records, public = _divide(asked.data, asked.folder, EPOCH * training.batch)
    budget = HijackBudget(batch=training.batch)
    hijacker = Hijacker(
        preset.model,
        preset.data,
        cut.front,
        public,
        budget=budget,
        max_rms=preset.center.max_rms,
        seed=asked.seed,
        varied=training.augment,
    )
    print(
        f"{asked.data}, {asked.form}, cut {cut.front}, {len(records[0])} records, {len(public)} public pictures",
        flush=True,
    )
    curve = unaudited(preset, records, hijacker)
    honest = unaudited(preset, records, hijacker, steers=False)
    print("| steps | SSIM | re-identified | honest host: SSIM | re-identified |\n|---|---|---|---|---|")
    for steps in (2**power for power in range(4, 20) if 2**power <= asked.steps):
        values = (*curve[steps // asked.short_run - 1], *honest[steps // asked.short_run - 1])
        print(f"| {steps} | {' | '.join(f'{value:.2f}' for value in values)} |")
    truth = records[0][:SCORED].float() / 255
    for name, guesses in (("mean image", public.mean(0, keepdim=True).expand_as(truth)), ("a draw", public[:SCORED])):
        found = success(guesses, truth, records[0][SCORED:])
        print(f"guess, {name}: SSIM {found.ssim:.2f}, re-identified {found.found:.3f}", flush=True)
    audited(preset, records, hijacker, curve, draws=asked.draws)
    return 0


def _divide(name: str, folder: Path | None, count: int) -> tuple[Records, Tensor]:
    """The parties' records, and as many or fewer other pictures that the host has."""
    split = load(name, folder, download=False)
    pixels = torch.from_numpy(np.concatenate([split.train.images, split.test.images]))
    labels = torch.from_numpy(np.concatenate([split.train.labels, split.test.labels]))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    theirs, public = order[:count], order[count : 2 * count]
    return (pixels[theirs], labels[theirs]), pixels[public].float() / 255


if __name__ == "__main__":
    raise SystemExit(main())
