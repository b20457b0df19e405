"""How well the host can group records by label from what crosses in ternary training.

    python scripts/label_groups.py [DATA [DIR]]

Trains the demo's data in three zones, without processes. For 20 batches, at once and after 200, the rows of what
crosses are clustered: one row a record, scaled to length one; k-means with as many clusters as classes. Printed for
each tensor: the purity of the clusters, the purity of clusters of the same sizes drawn at random (what knowing nothing
gives), and the share of records named rightly by somebody who knows one or five labels of each class, names each
cluster by their majority, and says nothing of a cluster in which none lies.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from caltrain.demo.scenario import build_scenario
from caltrain.exposure.attacks.labels import Groups, label_groups
from caltrain.models.spec import zone_ranges
from caltrain.presets import PRESETS, Preset, PresetName
from caltrain.project import DEFAULT_PARTIES
from caltrain.training.batches import augment, normalise
from caltrain.training.seeds import Draws, RunSeeds, epoch_order
from caltrain.training.zone import At, Zone

BATCHES = 20
LATER = 200


class Step(NamedTuple):
    """What crosses in a step, by role, and the labels of its records, which do not."""

    tensors: dict[str, Tensor]
    labels: Tensor


Table = dict[str, Groups]


def crossings(preset: Preset, pixels: Tensor, labels: Tensor, *, seed: bytes) -> Iterator[Step]:
    """The steps of a ternary run."""
    training, seeds = preset.training, RunSeeds.from_run_seed(seed)
    front, center, head = (
        Zone(preset.model, layers, input_shape=preset.data.shape, training=training, seed=key)
        for layers, key in zip(
            zone_ranges(preset.model, preset.partition), (seeds.front, seeds.center, seeds.head), strict=True
        )
    )
    steps, order = len(labels) // training.batch, torch.arange(len(labels))
    for number in itertools.count():
        at = At(*divmod(number, steps), steps)
        if at.step == 0:
            order = order[epoch_order(len(labels), seed=seeds.order, epoch=at.epoch)]
        rows = order[at.step * training.batch : (at.step + 1) * training.batch]
        x = augment(pixels[rows], training.augment, Draws(seeds.augment, at.epoch, at.step), size=preset.model.size)
        x = normalise(x, preset.data, channels_last=training.channels_last)
        ir = front.forward([x], at=at, needs_input_grad=False)
        out = center.forward(ir, at=at, needs_input_grad=True)
        head.forward(out, at=at, needs_input_grad=True)
        grad, _ = head.backward_from_labels(labels[rows], at=at)
        yield Step({"ir": ir[0], "center-out": out[0], "center-grad": grad[0]}, labels[rows])
        front.backward(center.backward(grad, at=at), at=at)


def measure(preset: Preset, pixels: Tensor, labels: Tensor, *, after: int = 0, seed: bytes = bytes(32)) -> Table:
    """By role, what the tensors of `BATCHES` batches tell, `after` so many."""
    torch.set_num_threads(preset.training.threads)
    steps = list(itertools.islice(crossings(preset, pixels, labels, seed=seed), after, after + BATCHES))
    truth, classes = torch.cat([step.labels for step in steps]).numpy(), len(preset.data.classes)
    rows = {role: torch.cat([step.tensors[role] for step in steps]) for role in steps[0].tensors}
    return {role: label_groups(found, truth, classes=classes, seed=0) for role, found in rows.items()}


def table(found: Table) -> str:
    """For people."""
    lines = [f"{'tensor':12} {'purity':>7} {'floor':>7} {'by 1':>7} {'by 5':>7}"]
    for role, groups in found.items():
        values = groups.purity.value, groups.floor, *(named.right.value for named in groups.named)
        lines.append(f"{role:12} " + " ".join(f"{value:7.3f}" for value in values))
    return "\n".join(lines)


def main(data: PresetName, data_dir: Path | None) -> None:
    """Print the table for one of the demo's data sets."""
    scenario = build_scenario(data, parties=DEFAULT_PARTIES, data_dir=data_dir, download=False, seed=0)
    pixels = torch.from_numpy(np.concatenate([h.images for h in scenario.holdings]))
    labels = torch.from_numpy(np.concatenate([h.labels for h in scenario.holdings]))
    for after in (0, LATER):
        print(f"{data}, {BATCHES} batches after {after}")
        print(table(measure(PRESETS[data], pixels, labels, after=after)))


if __name__ == "__main__":
    name: PresetName = next((known for known in PRESETS if known in sys.argv[1:2]), "digits")
    main(name, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
