"""The demo's figures over many runs: how sure it is that any one of them reaches what is promised.

    python scripts/demo_figures.py --data digits --runs 30

The randomness of a demo's training comes from the operating system, so no two demos have the same figures. This trains
the demo's model on the demo's records with the plain loop (whose weights equal the protected ones bit for bit), once
for each run seed, links and traces as the enclave does, and prints each run's figures, then the least and the mean.
Run seeds are hashes of 0, 1, 2, ...: the same in every call. The exit status is 1 if a run misses a figure of `LEAST`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caltrain.accountability.neighbours import label_disagreement, nearest_in_class
from caltrain.demo import evaluate
from caltrain.demo.evaluate import Lineage
from caltrain.demo.scenario import Scenario, build_scenario
from caltrain.demo.story import MAX_TRACED
from caltrain.models.network import features_and_logits
from caltrain.plan import TraceSpec
from caltrain.presets import PRESETS, Preset
from caltrain.project import DEFAULT_PARTIES
from caltrain.records.commitment import RecordRef
from caltrain.training.batches import normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

_SHARD = "0" * 32


@dataclass(frozen=True)
class Figures:
    """What one run reached, shares from 0 to 1."""

    accuracy: float
    attack_success: float
    trace_precision: float
    contributor_accuracy: float
    mislabel_auroc: float


LEAST = {
    "digits": Figures(0.95, 0.9, 0.95, 0.99, 0.9),
    "mnist": Figures(0.97, 0.9, 0.95, 0.99, 0.9),
}
_NOTHING = Figures(0, 0, 0, 0, 0)


class Linked:
    """A model trained on a scenario, with the fingerprints of all records."""

    def __init__(self, scenario: Scenario, preset: Preset, *, seed: bytes) -> None:
        self.preset, self.trace = preset, TraceSpec()
        self.rows = {RecordRef(h.name, _SHARD, i): (h, i) for h in scenario.holdings for i in range(len(h.labels))}
        self.references = list(self.rows)
        pixels = torch.from_numpy(np.concatenate([h.images for h in scenario.holdings]))
        self.labels = torch.from_numpy(np.concatenate([h.labels for h in scenario.holdings]))
        self.model = train_plain(
            preset.model,
            preset.partition,
            preset.data,
            preset.training,
            pixels=pixels,
            labels=self.labels,
            seeds=RunSeeds.from_run_seed(seed),
        )
        self.fingerprints, _ = self.look(pixels)

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Fingerprints (N, D) and classes (N,) of pictures (N, C, H, W)."""
        found = []
        with torch.inference_mode():
            for part in torch.split(pixels, 256):
                x = normalise(part, self.preset.data, channels_last=self.preset.training.channels_last)
                found.append(features_and_logits(self.model, self.preset.model, x))
        return torch.cat([f for f, _ in found]), torch.cat([logits for _, logits in found]).argmax(1)

    def nearest(self, fingerprint: Tensor, label: int) -> list[RecordRef]:
        """What a trace names."""
        near, _ = nearest_in_class(
            fingerprint, label=label, fingerprints=self.fingerprints, labels=self.labels, k=self.trace.neighbours
        )
        return [self.references[n] for n in near]

    def suspicion(self) -> dict[RecordRef, float]:
        """What the link pass reports to the parties, all together."""
        scores = label_disagreement(self.fingerprints, self.labels, k=self.trace.suspicion_neighbours)
        return dict(zip(self.references, scores.tolist(), strict=True))


def run(scenario: Scenario, preset: Preset, *, seed: bytes) -> Figures:
    """Train, link and trace once."""
    linked = Linked(scenario, preset, seed=seed)
    lineage, test = Lineage(linked.rows), scenario.test.images
    predicted = linked.look(torch.from_numpy(test))[1].numpy()
    fingerprints, classes = linked.look(torch.from_numpy(scenario.attack.stamp(test)))
    rows = evaluate.triggered_inputs(scenario, predicted)[:MAX_TRACED]
    traced = [linked.nearest(fingerprints[row], int(classes[row])) for row in rows]
    return Figures(
        evaluate.accuracy(scenario, predicted),
        evaluate.attack_success(scenario, classes.numpy()),
        evaluate.trace_precision(traced, lineage),
        evaluate.trace_contributor_accuracy(traced, scenario.culprit),
        evaluate.mislabel_auroc(linked.suspicion(), lineage),
    )


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=sorted(PRESETS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--vary-scenario", action="store_true", help="deal and plant anew in each run")
    options = parser.parse_args()
    preset, least = PRESETS[options.data], LEAST.get(options.data, _NOTHING)
    names = [field.name for field in fields(Figures)]
    print("run seconds " + " ".join(f"{name:>20}" for name in names))
    found = []
    for number in range(options.first, options.first + options.runs):
        began = time.monotonic()
        scenario = build_scenario(
            options.data,
            parties=DEFAULT_PARTIES,
            data_dir=options.data_dir,
            download=False,
            seed=number if options.vary_scenario else 0,
        )
        found.append(run(scenario, preset, seed=hashlib.sha256(str(number).encode()).digest()))
        seconds = time.monotonic() - began
        print(f"{number:3} {seconds:7.1f} " + _line(asdict(found[-1]).values()), flush=True)
    table = {name: [getattr(figures, name) for figures in found] for name in names}
    print("least       " + _line(min(values) for values in table.values()))
    print("mean        " + _line(float(np.mean(values)) for values in table.values()))
    missed = {name: sum(v < getattr(least, name) for v in values) for name, values in table.items()}
    print(f"of {len(found)} runs, below the promise: " + ", ".join(f"{name} {n}" for name, n in missed.items()))
    return int(any(missed.values()))


def _line(values: Iterable[float]) -> str:
    return " ".join(f"{value:20.4f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
