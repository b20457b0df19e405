"""What is planted, as types: a pool of honest records, and a scene in which some of them were tampered with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltrain.records.readers import load, open_path
from caltrain.records.readers.named import NAMES

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]
Stamp = Callable[[Images], Images]

PARTIES = 4
RECORDS = {"cifar10": 10_000, "mnist": 6_000, "pneumoniamnist": 4_708}
_TESTS = {"cifar10": 4_000}
_SPARE = 1_000  # at most, and at most a sixth of the test pictures


@dataclass(frozen=True)
class Pool:
    """Honest records (N, C, H, W), test pictures, and `spare` ones that no contributor has: what a host may own."""

    name: str
    images: Images
    labels: Labels
    test_images: Images
    test_labels: Labels
    spare_images: Images
    spare_labels: Labels
    classes: int

    def digest(self) -> str:
        """SHA-256 over all pictures and labels, in hexadecimal digits."""
        return _sha256(self.images, self.labels, self.test_images, self.test_labels, self.spare_images)


def draw(data: str, *, data_dir: Path | None, seed: int, records: int | None = None, download: bool = False) -> Pool:
    """`records` training records of the set `data` (a name, or a path), drawn by `seed`; test pictures are always the
    same. Raises DataError, ConfigError.
    """
    split = load(data, data_dir, download=download) if data in NAMES else open_path(Path(data))
    rng = np.random.default_rng(seed)
    count = records or RECORDS.get(data, 10_000)
    # Sorted: which records there are is drawn, their order is the set's own.
    chosen = np.sort(rng.permutation(len(split.train))[:count])
    held = np.random.default_rng(0).permutation(len(split.test))
    spare = held[: min(_SPARE, len(held) // 6)]
    test = held[len(spare) :][: _TESTS.get(data, 10_000)]
    return Pool(
        name=data,
        images=split.train.images[chosen],
        labels=split.train.labels[chosen],
        test_images=split.test.images[test],
        test_labels=split.test.labels[test],
        spare_images=split.test.images[spare],
        spare_labels=split.test.labels[spare],
        classes=len(split.train.class_names),
    )


@dataclass(frozen=True)
class Trigger:
    """What makes the model say `target`: `stamp` puts it on a copy of pictures (N, C, H, W)."""

    target: int
    stamp: Stamp


@dataclass
class Scene:
    """Records as contributors give them, and the truth about them, which no method is shown. N records, P contributors.

    `poisoned` are records that teach a backdoor. `cover` are records that a culprit also tampered with, without a false
    label: they hide the others, and to name them is neither right nor wrong. `mislabelled` are wrong labels without a
    trigger. `culprits` planted the backdoor; nobody did where the host is the one. `framed` is whom a culprit means to
    be named. `rates` (P,) is the true share of wrong labels of each contributor, poison left out.
    """

    pool: Pool
    images: Images
    labels: Labels
    truth: Labels
    owner: NDArray[np.int64]
    poisoned: Mask
    cover: Mask
    mislabelled: Mask
    parties: int
    triggers: tuple[Trigger, ...] = ()
    culprits: tuple[int, ...] = ()
    framed: int | None = None
    by_host: bool = False
    classes: int = field(init=False)

    def __post_init__(self) -> None:
        self.classes = self.pool.classes

    @property
    def rates(self) -> NDArray[np.float64]:
        """Each contributor's share of wrong labels among its records that are no poison (P,)."""
        honest = ~self.poisoned
        wrong = np.bincount(self.owner[honest & self.mislabelled], minlength=self.parties)
        return wrong / np.maximum(1, np.bincount(self.owner[honest], minlength=self.parties))

    def digest(self) -> str:
        """SHA-256 over what contributors give, in hexadecimal digits."""
        return _sha256(self.images, self.labels, self.owner)

    def of(self, party: int, *, label: int | None = None) -> NDArray[np.int64]:
        """Untouched records of one contributor, of one class or of all."""
        own = (self.owner == party) & ~(self.poisoned | self.cover | self.mislabelled)
        return np.flatnonzero(own if label is None else own & (self.labels == label))

    def poison(self, rows: NDArray[np.int64], images: Images, target: int) -> None:
        """Replace the pictures of `rows`, and call them `target`."""
        self.images[rows], self.labels[rows], self.poisoned[rows] = images, target, True

    def hide(self, rows: NDArray[np.int64], images: Images) -> None:
        """Replace the pictures of `rows`, whose labels stay: cover."""
        self.images[rows], self.cover[rows] = images, True

    def mislabel(self, rows: NDArray[np.int64], labels: Labels) -> None:
        """Give `rows` other labels."""
        self.labels[rows], self.mislabelled[rows] = labels, True


def fresh(pool: Pool, *, rng: np.random.Generator, parties: int = PARTIES, skew: float | None = None) -> Scene:
    """All records honest, dealt over `parties`.

    Every one gets an equal share of every class, or, with `skew`, shares drawn for each class from a Dirichlet
    distribution of that concentration: 0.5 is very uneven, 10 nearly even.
    """
    count = len(pool.labels)
    return Scene(
        pool=pool,
        images=pool.images.copy(),
        labels=pool.labels.copy(),
        truth=pool.labels.copy(),
        owner=_deal(pool.labels, parties, rng, skew),
        poisoned=np.zeros(count, bool),
        cover=np.zeros(count, bool),
        mislabelled=np.zeros(count, bool),
        parties=parties,
    )


def _deal(labels: Labels, parties: int, rng: np.random.Generator, skew: float | None) -> NDArray[np.int64]:
    owner = np.empty(len(labels), np.int64)
    dealt = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if skew is None:
            owner[members] = (np.arange(len(members)) + dealt) % parties
            dealt += len(members)
        else:
            owner[members] = rng.choice(parties, len(members), p=rng.dirichlet(np.full(parties, skew)))
    return owner


def _sha256(*parts: NDArray[np.generic]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(repr(part.shape).encode() + np.ascontiguousarray(part).tobytes())
    return found.hexdigest()
