"""What a model user learns who asks traces about records that they know: was this one trained on?

    python scripts/membership.py digits
    python scripts/membership.py mnist DIR

Half of a set is trained on (members), as many others of the same distribution are not. The attacker has a record, or a
near copy of it (shifted by a pixel; with noise), asks a trace of it and of eight noisy copies of what it has, and
scores membership by what the traces tell. Six ways to score are tried, and the best of them counts, for AUC and for
the true positive rate at 1 % false positives each, which favours the attacker. `no limits` tells exact distances;
`step` are distances rounded, `floor` the share of clean queries (here records, each without itself) among which a
shorter distance hides. `predictions` needs no trace: the model's confidence. `ranks by` are which records are named and
in which order, without any distance, scored by how alike the answers to noisy copies are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import normalize

from caltrain.accountability import attribution
from caltrain.accountability.attribution import Attribution, Fingerprints, GradientDot, Trak
from caltrain.accountability.planes import stored
from caltrain.accountability.reference import Reference, in_steps
from caltrain.enclave.opinion import RIDGE
from caltrain.models.network import Network, last_features
from caltrain.presets import PRESETS, Preset, PresetName
from caltrain.records.readers.named import load
from caltrain.training.batches import center_crop, normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

EXACT = 1e-9
LIMITS = {
    "no limits": (EXACT, 0.0),
    **{f"step {step:g}": (step, 0.0) for step in (0.001, 0.01, 0.05, 0.1)},
    **{f"step 0.01, floor {floor:g}": (0.01, floor) for floor in (0.25, 0.5, 0.9)},
    "step 0.1, floor 0.5": (0.1, 0.5),
}
NEIGHBOURS, COPIES, MEMBERS, ASKED = 9, 8, 4000, 800
NOISE = 8
Column = NDArray[np.float64]


class Seen(NamedTuple):
    """What traces tell, exactly, of each query: places and distances (N, K) of the neighbours, the predicted class."""

    places: Tensor
    distances: Tensor
    labels: Tensor
    confidence: Tensor
    named: dict[str, Tensor]
    """By method the places (N, K) of the records that it names; -1 beyond them."""


class Linked(NamedTuple):
    """A linked model."""

    preset: Preset
    model: Network
    fingerprints: Tensor
    labels: Tensor
    methods: dict[str, Attribution]

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class probabilities."""
        found = []
        with torch.inference_mode():
            for part in torch.split(pixels, 256):
                x = normalise(center_crop(part, self.preset.model.size), self.preset.data, channels_last=True)
                features, logits = last_features(self.model, self.preset.model, x)
                found.append((features, logits.softmax(1)))
        features, chances = zip(*found, strict=True)
        return torch.cat(features), torch.cat(chances)

    def trace(self, pixels: Tensor) -> Seen:
        """The neighbours of each input inside its predicted class."""
        raw, chances = self.embed(pixels)
        features, labels = normalize(raw, dim=1), chances.argmax(1)
        named = {
            way: self._named(method, attribution.Seen(raw, chances, labels)) for way, method in self.methods.items()
        }
        places = torch.empty((len(pixels), NEIGHBOURS), dtype=torch.int64)
        distances = torch.empty((len(pixels), NEIGHBOURS), dtype=torch.float64)
        for label in labels.unique().tolist():
            rows, own = (labels == label).nonzero()[:, 0], (self.labels == label).nonzero()[:, 0]
            far = torch.cdist(
                features[rows].double(), self.fingerprints[own], compute_mode="donot_use_mm_for_euclid_dist"
            )
            near = far.topk(NEIGHBOURS, largest=False)
            places[rows], distances[rows] = own[near.indices], near.values
        return Seen(places, distances, labels, chances.max(1).values, named)

    def _named(self, method: Attribution, asked: attribution.Seen) -> Tensor:
        scores = method.scores(asked)
        speaks = (asked.labels[:, None] == self.labels) & ((scores > 0) | isinstance(method, Fingerprints))
        best = scores.masked_fill(~speaks, -torch.inf).topk(NEIGHBOURS)
        return best.indices.masked_fill(best.values.isinf(), -1)

    def references(self, step: float) -> dict[int, Reference]:
        """Leave-one-out, as the enclave keeps them where no records are held out."""
        found = {}
        for label in range(len(self.preset.data.classes)):
            own = self.fingerprints[self.labels == label]
            far = torch.cdist(own[:1000], own, compute_mode="donot_use_mm_for_euclid_dist")
            far[torch.arange(len(far)), torch.arange(len(far))] = torch.inf
            near = far.topk(NEIGHBOURS, largest=False).values
            found[label] = Reference.of("leave-one-out", near.tolist(), step=step)
        return found


def linked(name: PresetName, folder: Path | None) -> tuple[Linked, Tensor, Tensor]:
    """A model trained on half of the records; some of these, and as many others."""
    preset = PRESETS[name]
    part = load(name, folder, download=False).train
    order = np.random.default_rng(0).permutation(len(part.labels))
    count = min(MEMBERS, len(order) // 2)
    inside, outside = order[:count], order[count : 2 * count]
    pixels = torch.from_numpy(np.ascontiguousarray(part.images[inside]))
    labels = torch.from_numpy(part.labels[inside].astype(np.int64))
    model = train_plain(
        preset.model, preset.partition, preset.data, preset.training,
        pixels=pixels, labels=labels, seeds=RunSeeds.from_run_seed(bytes(32)),
    )  # fmt: skip
    found = Linked(preset, model, torch.empty(0), labels, {})
    features, chances = found.embed(pixels)
    others = torch.from_numpy(np.ascontiguousarray(part.images[outside[:ASKED]]))
    right = float((found.embed(others)[1].argmax(1).numpy() == part.labels[outside[:ASKED]]).mean())
    own = float((chances.argmax(1) == labels).double().mean())
    print(f"{name}: {count} members, {features.shape[1]} dimensions, accuracy {own:.3f}, of others {right:.3f}")
    records = attribution.Seen(features, chances, labels)
    methods = {
        "fingerprints": Fingerprints(records),
        "gradient": GradientDot(records),
        "trak": Trak(records, ridge=RIDGE),
        "trak with a ridge of 0.001": Trak(records, ridge=0.001),
    }
    fingerprints = stored(normalize(features, dim=1)).double()
    return found._replace(fingerprints=fingerprints, methods=methods), pixels[:ASKED], others


def shifted(pixels: Tensor) -> Tensor:
    """One pixel to the right."""
    return torch.roll(pixels, 1, dims=3)


def noisy(pixels: Tensor, *, seed: int = 0) -> Tensor:
    """With noise of a standard deviation of `NOISE` of 255."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, NOISE, pixels.shape))
    return (pixels + noise).round().clamp(0, 255).to(torch.uint8)


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {"the record": lambda x: x, "with noise": noisy, "shifted": shifted}


def told(seen: Seen, step: float, floor: float, references: dict[int, Reference]) -> Column:
    """Distances in steps, as a trace tells them (N, K)."""
    most = in_steps(2, step)
    rows = zip(seen.labels.tolist(), seen.distances.tolist(), strict=True)
    return np.array(
        [
            [references[label].told(r, in_steps(d, step), floor=floor, most=most) for r, d in enumerate(row, 1)]
            for label, row in rows
        ],
        np.float64,
    )


def scores(
    first: Seen, copies: list[Seen], step: float, floor: float, references: dict[int, Reference]
) -> dict[str, Column]:
    """By way to score, what each input's traces say for membership: more is more likely."""
    rounded = told(first, step, floor, references)
    others = np.array([told(seen, step, floor, references)[:, 0] for seen in copies])
    pairs = zip(first.labels.tolist(), rounded[:, 0].tolist(), strict=True)
    unusual = np.array([references[label].unusual(1, int(steps)) for label, steps in pairs], np.float64)
    same = np.mean([(seen.places[:, 0] == first.places[:, 0]).numpy() for seen in copies], axis=0)
    scale = 1 / max(float(rounded.max()), 1)
    return {
        "distance": -rounded[:, 0],
        "unusual": -unusual,
        "gap": rounded[:, 1] - rounded[:, 0],
        "relative": -(rounded[:, 0] + 1e-6) / (rounded[:, 1] + 1e-3),
        "stable": same - scale * rounded[:, 0],
        "grows": others.mean(axis=0) - rounded[:, 0] - scale * rounded[:, 0],
    }


def alike(first: Tensor, copies: list[Tensor]) -> dict[str, Column]:
    """By way to score, what the records that were named for an input and its copies (N, K) say for membership."""
    same = np.mean([(other[:, 0] == first[:, 0]).double().numpy() for other in copies], axis=0)
    shared = [((other[:, :, None] == first[:, None]) & (first >= 0)[:, None]).sum((1, 2)).double() for other in copies]
    overlap = np.mean([each.numpy() for each in shared], axis=0)
    count = (first >= 0).sum(1).double().numpy()
    ways = {"stable": same + overlap / 1000, "overlap": overlap, "named": count}
    return ways | {f"not {way}": -column for way, column in ways.items()}


def strength(inside: Column, outside: Column) -> tuple[float, float]:
    """AUC, and the true positive rate at 1 % false positives (between thresholds, by chance)."""
    truth, both = np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside]
    false, true, _ = roc_curve(truth, both, drop_intermediate=False)
    return float(roc_auc_score(truth, both)), float(np.interp(0.01, false, true))


def row(known: str, limits: str, got: dict[str, tuple[float, float]]) -> str:
    """The best way to score, for AUC and for the true positive rate."""
    best = max(got, key=lambda way: got[way][0]), max(got, key=lambda way: got[way][1])
    cost = 1 + COPIES if {way.removeprefix("not ") for way in best} & {"stable", "grows", "overlap"} else 1
    ways = ", ".join(dict.fromkeys(best))
    return f"| {known} | {limits} | {got[best[0]][0]:.3f} | {got[best[1]][1]:.3f} | {ways} | {cost} |"


def main(name: PresetName, folder: Path | None) -> None:
    """Print the table."""
    found, members, others = linked(name, folder)
    references = {step: found.references(step) for step, _ in LIMITS.values()}
    for way, places in found.trace(others).named.items():
        print(f"by {way}: {len(others)} new inputs name {len(places[places >= 0].unique())} records in all")
    print("| the attacker has | is told | AUC | TPR at 1 % FPR | by | questions a record |")
    print("|---|---|---|---|---|---|")
    for known, make in KNOWN.items():
        sets = [make(members), make(others)]
        seen = [(found.trace(x), [found.trace(noisy(x, seed=1 + i)) for i in range(COPIES)]) for x in sets]
        auc, rate = strength(*(first.confidence.double().numpy() for first, _ in seen))
        print(f"| {known} | predictions | {auc:.3f} | {rate:.3f} | confidence | 1 |")
        for way in found.methods:
            inside, outside = (alike(first.named[way], [c.named[way] for c in copies]) for first, copies in seen)
            print(row(known, f"ranks by {way}", {score: strength(inside[score], outside[score]) for score in inside}))
        for limits, (step, floor) in LIMITS.items():
            inside, outside = (scores(first, copies, step, floor, references[step]) for first, copies in seen)
            print(row(known, limits, {way: strength(inside[way], outside[way]) for way in inside}))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)  # type: ignore[arg-type]
