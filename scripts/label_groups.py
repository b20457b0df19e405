"""How well the host can group records by label from what crosses in ternary training.

    python scripts/label_groups.py [DATA [DIR]]

Trains the first batches of the demo's data in three zones, without processes, and clusters the rows of what crosses
(one row a record, scaled to length one; k-means with as many clusters as classes). Printed for each tensor: the purity
of the clusters, the purity of clusters of the same sizes drawn at random (what knowing nothing gives), and the share of
records named rightly by somebody who knows one or five labels of each class, names each cluster by their majority, and
says nothing of a cluster in which none lies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from caltrain.demo.scenario import build_scenario
from caltrain.models.spec import zone_ranges
from caltrain.presets import PRESETS, Preset
from caltrain.project import DEFAULT_PARTIES
from caltrain.training.batches import augment, normalise
from caltrain.training.seeds import Draws, RunSeeds
from caltrain.training.zone import At, Zone

BATCHES = 20
DRAWS = 20
Numbers = NDArray[np.int64]


class Found(NamedTuple):
    """What one tensor tells of the labels: shares of the records, 0 to 1."""

    purity: float
    floor: float
    named_by_1: float
    named_by_5: float


def crossings(
    preset: Preset, pixels: Tensor, labels: Tensor, *, seed: bytes
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """What crosses in each of the first steps, and the labels of its records, which do not."""
    seeds = RunSeeds.from_run_seed(seed)
    front, center, head = (
        Zone(preset.model, layers, input_shape=preset.data.shape, training=preset.training, seed=key)
        for layers, key in zip(
            zone_ranges(preset.model, preset.partition), (seeds.front, seeds.center, seeds.head), strict=True
        )
    )
    batch, last = preset.training.batch, preset.training.channels_last
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for step in range(min(BATCHES, len(labels) // batch)):
        rows, at = order[step * batch : (step + 1) * batch], At(0, step, len(labels) // batch)
        x = augment(pixels[rows], preset.training.augment, Draws(seeds.augment, 0, step), size=preset.model.size)
        ir = front.forward([normalise(x, preset.data, channels_last=last)], at=at, needs_input_grad=False)
        out = center.forward(ir, at=at, needs_input_grad=True)
        head.forward(out, at=at, needs_input_grad=True)
        grad, _ = head.backward_from_labels(labels[rows], at=at)
        yield {"ir": ir[0], "center-out": out[0], "center-grad": grad[0]}, labels[rows]
        front.backward(center.backward(grad, at=at), at=at)


def purity(clusters: Numbers, labels: Numbers) -> float:
    """Share of the records that have their cluster's most frequent label."""
    return sum(int(np.bincount(labels[clusters == c]).max()) for c in np.unique(clusters)) / len(labels)


def named(clusters: Numbers, labels: Numbers, *, known: int, rng: np.random.Generator) -> float:
    """Share of the other records named rightly by `known` records of each class, drawn at random."""
    given = np.concatenate([rng.choice(np.flatnonzero(labels == c), known, replace=False) for c in np.unique(labels)])
    names = np.full(clusters.max() + 1, -1)
    for cluster in np.unique(clusters[given]):
        names[cluster] = np.bincount(labels[given][clusters[given] == cluster]).argmax()
    rest = np.setdiff1d(np.arange(len(labels)), given)
    return float(np.mean(names[clusters[rest]] == labels[rest]))


def look(rows: Tensor, labels: Numbers) -> Found:
    """Cluster rows (N, ...) and compare with the labels (N,)."""
    classes, rng = len(np.unique(labels)), np.random.default_rng(0)
    unit = F.normalize(rows.reshape(len(rows), -1), dim=1).numpy()
    clusters = KMeans(classes, n_init=10, random_state=0).fit_predict(unit).astype(np.int64)
    return Found(
        purity(clusters, labels),
        float(np.mean([purity(rng.permutation(clusters), labels) for _ in range(DRAWS)])),
        *(float(np.mean([named(clusters, labels, known=k, rng=rng) for _ in range(DRAWS)])) for k in (1, 5)),
    )


def measure(preset: Preset, pixels: Tensor, labels: Tensor, *, seed: bytes = bytes(32)) -> dict[str, Found]:
    """By role, what the tensors of the first batches tell."""
    steps = list(crossings(preset, pixels, labels, seed=seed))
    truth = torch.cat([own for _, own in steps]).numpy()
    return {role: look(torch.cat([tensors[role] for tensors, _ in steps]), truth) for role in steps[0][0]}


def table(found: dict[str, Found]) -> str:
    """For people."""
    lines = [f"{'tensor':12} {'purity':>7} {'floor':>7} {'by 1':>7} {'by 5':>7}"]
    lines += [f"{role:12} " + " ".join(f"{value:7.3f}" for value in values) for role, values in found.items()]
    return "\n".join(lines)


def main(data: str, data_dir: Path | None) -> None:
    """Print the table for one of the demo's data sets."""
    scenario = build_scenario(data, parties=DEFAULT_PARTIES, data_dir=data_dir, download=False, seed=0)
    pixels = torch.from_numpy(np.concatenate([h.images for h in scenario.holdings]))
    labels = torch.from_numpy(np.concatenate([h.labels for h in scenario.holdings]))
    print(f"{data}, {BATCHES} batches")
    print(table(measure(PRESETS[data], pixels, labels)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits", Path(sys.argv[2]) if len(sys.argv) > 2 else None)
