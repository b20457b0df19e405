"""What a repair gains: attack success and accuracy before it, after it, and of models that never saw the poison.

    python scripts/repair_effect.py [DATA [DIR [SEEDS]]]

For each seed the demo's records with their planted backdoor, and plain training, whose bits are those of a protected
run. *after* leaves out what a model user's traces name: of test inputs with the trigger that the model takes for the
target, the nine nearest records of that class. *never* leaves out exactly the planted records. Same run seed for all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.accountability.planes import stored
from caltrain.demo.scenario import Scenario, build_scenario
from caltrain.exposure.subject import Subject, subject_of
from caltrain.models.network import features_and_logits
from caltrain.models.weights import state_of
from caltrain.participant.compare import Trials, compare, figures_of
from caltrain.presets import PRESETS, Preset, PresetName
from caltrain.project import DEFAULT_PARTIES
from caltrain.training.batches import normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

NEIGHBOURS = 9


class Records:
    """All records of a scenario in the order of its parties, and which of them are planted."""

    def __init__(self, scenario: Scenario) -> None:
        self.images = np.concatenate([holding.images for holding in scenario.holdings])
        self.labels = np.concatenate([holding.labels for holding in scenario.holdings])
        self.planted = np.concatenate([holding.poisoned for holding in scenario.holdings])


def trained(preset: Preset, records: Records, kept: NDArray[np.bool_], seed: int) -> Subject:
    """The model of the plain loop over the records that are kept."""
    module = train_plain(
        preset.model,
        preset.partition,
        preset.data,
        preset.training,
        pixels=torch.from_numpy(records.images[kept]),
        labels=torch.from_numpy(records.labels[kept]),
        seeds=RunSeeds.from_run_seed(bytes([seed]) * 32),
    )
    return subject_of(preset.model, preset.data, state_of(module))


def embedded(model: Subject, images: NDArray[np.generic]) -> tuple[torch.Tensor, torch.Tensor]:
    """Fingerprints as they are stored, and predicted classes."""
    with torch.inference_mode():
        x = normalise(torch.from_numpy(np.array(images)), model.data, channels_last=True)
        features, logits = features_and_logits(model.module, model.spec, x)
    return torch.as_tensor(stored(features)).double(), logits.argmax(1)


def traced(model: Subject, records: Records, triggered: NDArray[np.generic], target: int) -> NDArray[np.bool_]:
    """Records among the nearest of the target's class to an input with the trigger that is taken for it."""
    asked, predicted = embedded(model, triggered)
    known, _ = embedded(model, records.images)
    own = torch.from_numpy(np.flatnonzero(records.labels == target))
    near = torch.cdist(asked[predicted == target], known[own]).topk(NEIGHBOURS, largest=False).indices
    found = np.zeros(len(records.labels), bool)
    found[own[near.unique()].numpy()] = True
    return found


def main(data: PresetName = "digits", folder: str = "", seeds: str = "5") -> None:
    """Print one line a seed, and the means."""
    preset, figures = PRESETS[data], []
    for seed in range(int(seeds)):
        scenario = build_scenario(
            data, parties=DEFAULT_PARTIES, data_dir=Path(folder) if folder else None, download=False, seed=seed
        )
        records, test, attack = Records(scenario), scenario.test, scenario.attack
        trials = Trials(test.images, test.labels, attack.stamp(test.images))
        before = trained(preset, records, np.ones(len(records.labels), bool), seed)
        out = traced(before, records, trials.triggered[test.labels != attack.target], attack.target)
        after, never = (trained(preset, records, ~gone, seed) for gone in (out, records.planted))
        figures.append([figures_of(model, trials, target=attack.target) for model in (before, after, never)])
        right = int((out & records.planted).sum())
        print(
            f"seed {seed}: left out {out.sum()}, {right} of {records.planted.sum()} planted;",
            "; ".join(f"{f.attack_success:.4f} {f.accuracy:.4f}" for f in figures[-1]),
        )
    found = compare(*map(list, zip(*figures, strict=True)))
    for what in ("before", "after", "never"):
        print(what, getattr(found, what))
    print(f"attack success above never {found.attack_success_above_never:+.4f}")
    print(f"accuracy below never {found.accuracy_below_never:+.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
