"""Losses of the first steps of every included model, narrow, from a fixed seed: tests/golden/losses.json.

Bits are the same on one machine only: another CPU has other kernels, which add in another order. So the losses are
compared with a tolerance, far below what another initial weight, order, mask or layer would change.

To write them anew, after a change that is meant to change them: `cd tests && python -m support.golden`.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from caltrain.models.spec import Partition
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from caltrain.training.spec import TrainingSpec
from support.networks import SMALL

TOLERANCE = 1e-3
_PATH = Path(__file__).parents[1] / "golden" / "losses.json"


def losses(name: str) -> list[float]:
    """Loss of each step of one epoch."""
    small, found = SMALL[name], list[float]()
    pixels, labels = small.data()
    front, head = small.cuts[0]
    train_plain(
        small.make(),
        Partition(front=front, head=head),
        small.schema,
        TrainingSpec(epochs=1, batch=small.batch, learning_rate=0.005, schedule="constant", threads=1),
        pixels=pixels,
        labels=labels,
        seeds=RunSeeds.from_run_seed(bytes(range(32))),
        on_step=lambda _epoch, _step, loss: found.append(loss),
    )
    return found


def read() -> dict[str, list[float]]:
    """What was written down."""
    return msgspec.json.decode(_PATH.read_bytes(), type=dict[str, list[float]])


def write() -> None:
    """Write it anew."""
    values = {name: [round(loss, 6) for loss in losses(name)] for name in SMALL}
    _PATH.write_bytes(msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")


if __name__ == "__main__":
    write()
