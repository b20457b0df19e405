"""Peak memory of enclave and host in protected training, for N records and for ten times as many.

    python scripts/memory.py [--records 6000] [--epochs 2] [--forms ternary two-way]

Random records of MNIST's size and form, a small convolutional net, every run in processes of its own: the enclave
program, and a process that is host and CenterNet. The records are drawn and sealed shard by shard, as parties would.
Peaks are the kernel's high-water marks of resident memory up to the last checkpoint of training; release and linking
are left out. `above` is what a process had more than with all its libraries loaded and no record seen. Ends with exit
code 1 if a peak with ten times the records is more than 10 % above that with N.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import msgspec
import torch
from torch import Tensor

from caltrain.bench.protected import protected_run
from caltrain.host.device import Device
from caltrain.models.spec import Partition
from caltrain.presets import PRESETS, Preset

LIMIT = 1.10
MIB = 1 << 10  # /proc counts in KiB


class Peak(msgspec.Struct, frozen=True):
    """KiB of one process: resident before the first record, and at most until the end of training."""

    before: int
    most: int


class Peaks(msgspec.Struct, frozen=True):
    """Both processes of one run."""

    enclave: Peak
    host: Peak


class Drawn:
    """Random records or labels, made when they are asked for: nobody holds them all."""

    def __init__(self, count: int, shape: tuple[int, ...], *, below: int, dtype: torch.dtype) -> None:
        self._count, self._shape, self._below, self._dtype = count, shape, below, dtype

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self._count)
        generator = torch.Generator().manual_seed(start)
        return torch.randint(0, self._below, (stop - start, *self._shape), generator=generator, dtype=self._dtype)


def preset_of(form: str, epochs: int) -> Preset:
    """MNIST's preset on one thread."""
    preset = PRESETS["mnist"]
    training = msgspec.structs.replace(preset.training, epochs=epochs, threads=1)
    partition = preset.partition if form == "ternary" else Partition(front=preset.partition.front)
    return msgspec.structs.replace(preset, training=training, partition=partition)


def one(form: str, records: int, epochs: int) -> Peaks:
    """One run in this process and the enclave's."""
    preset = preset_of(form, epochs)
    pixels = cast(Tensor, Drawn(records, preset.data.shape, below=256, dtype=torch.uint8))
    labels = cast(Tensor, Drawn(records, (), below=len(preset.data.classes), dtype=torch.int64))
    with protected_run(preset, name="memory") as run:
        enclave, host = _program(run.enclave.process.pid), os.getpid()
        before = _status(enclave, "VmRSS"), _status(host, "VmRSS")
        run.ingest(pixels, labels, Device.cpu())
        for epoch in range(epochs):
            run.train_epoch(epoch)
        return Peaks(Peak(before[0], _status(enclave, "VmHWM")), Peak(before[1], _status(host, "VmHWM")))


def _program(process: int) -> int:
    """The largest of a process and all that it started: the enclave, where it runs inside a sandbox's processes."""
    family = [process]
    for parent in family:
        family += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split())
    return max(family, key=lambda pid: _status(pid, "VmRSS"))


def _status(process: int, name: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(form: str, records: int, epochs: int) -> Peaks:
    """One run in fresh processes."""
    argv = [sys.executable, __file__, "--one", form, "--records", str(records), "--epochs", str(epochs)]
    return msgspec.json.decode(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout, type=Peaks)


def compared(form: str, records: int, epochs: int) -> bool:
    """Print the rows of one form; whether both processes keep within the limit."""
    few, many = (measured(form, n, epochs) for n in (records, 10 * records))
    within = True
    for name in ("enclave", "host"):
        small, large = getattr(few, name), getattr(many, name)
        ratio = large.most / small.most
        within &= ratio <= LIMIT
        above = [f"{(peak.most - peak.before) / MIB:9.1f}" for peak in (small, large)]
        print(f"{form:8} {name:8} {small.most / MIB:8.1f} {large.most / MIB:8.1f} {ratio:6.3f} {' '.join(above)}")
    return within


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--forms", nargs="+", choices=("ternary", "two-way"), default=["ternary", "two-way"])
    parser.add_argument("--one", choices=("ternary", "two-way"), help="one run in this process, as JSON")
    given = parser.parse_args()
    if given.one:
        print(msgspec.json.encode(one(given.one, given.records, given.epochs)).decode())
        return 0
    print(f"MiB at most, for {given.records} records (N) and ten times as many; above: what came after start-up")
    print(f"{'form':8} {'process':8} {'N':>8} {'10 N':>8} {'ratio':>6} {'above, N':>9} {'10 N':>9}")
    within = [compared(form, given.records, given.epochs) for form in given.forms]
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(main())
