"""How well the host can group records by label from what leaves the enclave in ternary training.

Runs the first batches of the demo's training without processes, takes the gradient that HeadNet sends to CenterNet,
clusters its rows (k-means, as many clusters as classes) and prints the purity of the clusters, and the accuracy of
naming each cluster by N labels a class that a colluding party knows. `python scripts/label_groups.py [DATA [DIR]]`
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans

from caltrain.demo.scenario import build_scenario
from caltrain.models.network import zone_ranges
from caltrain.presets import PRESETS
from caltrain.project import DEFAULT_PARTIES
from caltrain.training.batches import normalise
from caltrain.training.zone import Zone

BATCHES = 20
KNOWN = 5


def main(data: str, data_dir: Path | None) -> None:
    """Print purity and accuracy."""
    preset = PRESETS[data]
    scenario = build_scenario(data, parties=DEFAULT_PARTIES, data_dir=data_dir, download=False, seed=0)
    pixels = torch.from_numpy(np.concatenate([h.images for h in scenario.holdings]))
    labels = torch.from_numpy(np.concatenate([h.labels for h in scenario.holdings]))
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    seeds = (b"front" * 6, b"center" * 5, b"head!!" * 5)
    front, center, head = (
        Zone(preset.model, layers, input_shape=preset.data.shape, training=preset.training, seed=seed)
        for layers, seed in zip(zone_ranges(preset.model, preset.partition), seeds, strict=True)
    )
    batch, seen, truth = preset.training.batch, [], []
    steps = len(labels) // batch
    for step in range(min(BATCHES, steps)):
        rows = order[step * batch : (step + 1) * batch]
        place = {"epoch": 0, "step": step}
        x = normalise(pixels[rows], preset.data, channels_last=preset.training.channels_last)
        ir = front.forward(x, **place, needs_input_grad=False)
        out = center.forward(ir, **place, needs_input_grad=True)
        head.forward(out, **place, needs_input_grad=True)
        grad, _ = head.backward_from_labels(labels[rows], **place, steps=steps)
        if grad is None:
            raise SystemExit("the head gave no gradient")
        seen.append(torch.nn.functional.normalize(grad, dim=1))
        truth.append(labels[rows])
        back = center.backward(grad, **place, steps=steps)
        if back is not None:
            front.backward(back, **place, steps=steps)
    rows_seen, true = torch.cat(seen).numpy(), torch.cat(truth).numpy()
    classes = len(preset.data.classes)
    clusters = KMeans(classes, n_init=10, random_state=0).fit_predict(rows_seen)
    purity = sum(np.bincount(true[clusters == c]).max() for c in range(classes) if (clusters == c).any()) / len(true)
    known = np.concatenate([np.flatnonzero(true == label)[:KNOWN] for label in range(classes)])
    names = {c: np.bincount(true[known][clusters[known] == c], minlength=1).argmax() for c in range(classes)}
    named = np.mean([names[c] == label for c, label in zip(clusters, true, strict=True)])
    print(
        f"{data}: {len(true)} records in {BATCHES} batches, purity {purity:.3f}, named by {KNOWN} a class {named:.3f}"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits", Path(sys.argv[2]) if len(sys.argv) > 2 else None)
