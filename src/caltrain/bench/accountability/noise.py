"""Wrong labels, as they come about: by chance, by confusable class, by the difficulty of the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from caltrain.bench.accountability.scene import Labels, Scene

Rng = np.random.Generator
Rows = NDArray[np.int64]
Outlook = NDArray[np.float64]
"""Class probabilities (N, C) that a small model, which has not seen the record, gives each record."""
Noise = Callable[[Scene, Rows, Outlook, int, Rng], tuple[Rows, Labels]]
RATES = (0.0, 0.09, 0.17, 0.40)


def symmetric(scene: Scene, own: Rows, outlook: Outlook, count: int, rng: Rng) -> tuple[Rows, Labels]:
    """Any record, any other class."""
    rows = rng.permutation(own)[:count]
    return rows, (scene.truth[rows] + rng.integers(1, outlook.shape[1], len(rows))) % outlook.shape[1]


def confusable(scene: Scene, own: Rows, outlook: Outlook, count: int, rng: Rng) -> tuple[Rows, Labels]:
    """Any record, the class that its true class is most often taken for."""
    classes = outlook.shape[1]
    taken_for = np.stack([outlook[scene.truth == label].mean(0) for label in range(classes)])
    np.fill_diagonal(taken_for, -1)
    rows = rng.permutation(own)[:count]
    return rows, taken_for.argmax(1)[scene.truth[rows]]


def instance(scene: Scene, own: Rows, outlook: Outlook, count: int, rng: Rng) -> tuple[Rows, Labels]:
    """Records by the small model's doubt in the true class; the label is drawn by what else it thinks the record is.

    The chance of a record is in proportion to the doubt (drawn without replacement, Efraimidis and Spirakis 2006).
    """
    given = outlook[own].copy()
    doubt = np.maximum(1 - given[np.arange(len(own)), scene.truth[own]], 1e-6)
    chosen = np.argsort(-np.log(rng.uniform(size=len(own))) / doubt)[:count]
    given[np.arange(len(own)), scene.truth[own]] = -np.inf
    # The largest of log p plus Gumbel noise is a draw by p.
    drawn = np.log(np.maximum(given, 1e-12)) + rng.gumbel(size=given.shape)
    drawn[given < 0] = -np.inf
    return own[chosen], drawn.argmax(1)[chosen]


NOISES: dict[str, Noise] = {"symmetric": symmetric, "confusable": confusable, "instance": instance}


def spoil(scene: Scene, noise: Noise, outlook: Outlook, rng: Rng, *, rates: Sequence[float] = RATES) -> None:
    """Wrong labels at `rates`, one of each contributor, in an order that is drawn."""
    for party, rate in zip(rng.permutation(scene.parties), rates, strict=True):
        _spoil_one(scene, noise, outlook, rng, int(party), round(rate * len(scene.of(int(party)))))


def spoil_share(scene: Scene, noise: Noise, outlook: Outlook, rng: Rng, share: float) -> None:
    """One contributor, drawn, has as many wrong labels as `share` of all records; the others have none."""
    _spoil_one(scene, noise, outlook, rng, int(rng.integers(scene.parties)), round(share * len(scene.labels)))


def _spoil_one(scene: Scene, noise: Noise, outlook: Outlook, rng: Rng, party: int, count: int) -> None:
    if count:
        scene.mislabel(*noise(scene, scene.of(party), outlook, count, rng))
