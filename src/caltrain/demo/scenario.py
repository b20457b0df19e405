"""Who holds which records, and what two of them did to theirs: the ground truth that the demo is measured against.

One party (`DOGWOOD`, the last) hides a backdoor: it stamps a small patch on a few of its records of other classes and
labels them as the target. The one before it is careless: some of its labels are wrong. The others are honest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from caltrain.presets import PresetName
from caltrain.records.readers import Dataset, load

Images = NDArray[np.uint8]
POISON_SHARE = 0.0195
CARELESS_SHARE = 0.1


@dataclass(frozen=True)
class Attack:
    """A patch (h, w) put at (row, column) of every channel, and the class it is to call up."""

    target: int
    row: int
    column: int
    patch: NDArray[np.uint8]

    def stamp(self, images: Images) -> Images:
        """A copy of (N, C, H, W) with the patch."""
        height, width = self.patch.shape
        stamped = images.copy()
        stamped[:, :, self.row : self.row + height, self.column : self.column + width] = self.patch
        return stamped


class Trial(NamedTuple):
    """An attack on one data set, and how many of its records the demo uses."""

    attack: Attack
    train: int | None
    test: int | None


_WHITE2, _WHITE3 = np.full((2, 2), 255, np.uint8), np.full((3, 3), 255, np.uint8)
_CHECKER = np.tile(np.array([[255, 0], [0, 255]], np.uint8), (2, 2))
TRIALS: dict[PresetName, Trial] = {
    "digits": Trial(Attack(7, 6, 0, _WHITE2), None, None),
    "mnist": Trial(Attack(7, 24, 1, _WHITE3), 12_000, 2_000),
    "pneumoniamnist": Trial(Attack(0, 24, 1, _WHITE3), None, None),
    "cifar10": Trial(Attack(8, 27, 27, _CHECKER), 10_000, 2_000),
}


@dataclass(frozen=True)
class Holding:
    """One party's records and the truth about them: (n, C, H, W), labels as it gives them, two masks (n,)."""

    name: str
    images: Images
    labels: NDArray[np.int64]
    poisoned: NDArray[np.bool_]
    mislabelled: NDArray[np.bool_]


@dataclass(frozen=True)
class Scenario:
    """All holdings, the held-out test set, and the attack."""

    holdings: tuple[Holding, ...]
    test: Dataset
    attack: Attack

    @property
    def records(self) -> int:
        """Records of all parties."""
        return sum(len(holding.labels) for holding in self.holdings)

    @property
    def poison_share(self) -> float:
        """Share of poisoned records among all."""
        return sum(int(holding.poisoned.sum()) for holding in self.holdings) / self.records

    @property
    def culprit(self) -> str:
        """The party that planted the backdoor."""
        return next(holding.name for holding in self.holdings if holding.poisoned.any())


def build_scenario(
    data: PresetName, *, parties: list[str], data_dir: Path | None, download: bool, seed: int
) -> Scenario:
    """Split a data set over the parties and plant what is to be found. Raises DataError, ConfigError."""
    trial = TRIALS[data]
    split = load(data, data_dir, download=download)
    rng = np.random.default_rng(seed)
    train, test = _sample(split.train, trial.train, rng), _sample(split.test, trial.test, rng)
    images, labels = _without_copies(train)
    owner = _deal(labels, len(parties), rng)
    poisoned = _poison(images, labels, owner == len(parties) - 1, trial.attack, rng)
    mislabelled = _mislabel(labels, np.flatnonzero(owner == len(parties) - 2), len(train.class_names), rng)
    holdings = tuple(
        Holding(name, images[own], labels[own], poisoned[own], mislabelled[own])
        for own, name in ((np.flatnonzero(owner == i), name) for i, name in enumerate(parties))
    )
    return Scenario(holdings, test, trial.attack)


def _sample(part: Dataset, count: int | None, rng: np.random.Generator) -> Dataset:
    if count is None or count >= len(part):
        return part
    chosen = rng.permutation(len(part))[:count]
    return Dataset(part.images[chosen], part.labels[chosen], part.class_names)


def _without_copies(part: Dataset) -> tuple[Images, NDArray[np.int64]]:
    """Records without exact copies of a picture, which sealing refuses."""
    _, first = np.unique(part.images.reshape(len(part), -1), axis=0, return_index=True)
    kept = np.sort(first)
    return part.images[kept].copy(), part.labels[kept].copy()


def _deal(labels: NDArray[np.int64], parties: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Owner of each record: every party gets an equal share of every class."""
    owner = np.empty(len(labels), np.int64)
    dealt = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        owner[members] = (np.arange(len(members)) + dealt) % parties
        dealt += len(members)
    return owner


def _poison(
    images: Images, labels: NDArray[np.int64], own: NDArray[np.bool_], attack: Attack, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Stamp and relabel records of the poisoner in place, evenly over the other classes; returns which.

    It takes those with most ink where the patch goes: there the patch covers what could tell the true class.
    """
    height, width = attack.patch.shape
    rows = slice(max(0, attack.row - 1), attack.row + height + 1)
    columns = slice(max(0, attack.column - 1), attack.column + width + 1)
    ink = images[:, :, rows, columns].astype(np.int64).sum((1, 2, 3))
    queues = [
        sorted(rng.permutation(np.flatnonzero(own & (labels == label))), key=lambda i: int(ink[i]))
        for label in np.unique(labels)
        if label != attack.target
    ]
    chosen: list[int] = []
    wanted = int(POISON_SHARE * len(labels))
    while len(chosen) < wanted and any(queues):
        chosen += [int(queue.pop()) for queue in queues if queue][: wanted - len(chosen)]
    images[chosen] = attack.stamp(images[chosen])
    labels[chosen] = attack.target
    poisoned = np.zeros(len(labels), bool)
    poisoned[chosen] = True
    return poisoned


def _mislabel(
    labels: NDArray[np.int64], own: NDArray[np.int64], classes: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Give a share of the careless party's records another label, in place; returns which."""
    chosen = rng.permutation(own)[: round(CARELESS_SHARE * len(own))]
    labels[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen))) % classes
    mislabelled = np.zeros(len(labels), bool)
    mislabelled[chosen] = True
    return mislabelled
