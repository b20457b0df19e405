"""What every reader returns: labelled images in memory, split in two."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records.readers import bounds
from caltrain.records.readers.faults import empty, too_large, wrong_kind, wrong_shape

_STEP = "check records"
# What a plan's schema can carry as a class name; refused here, where the file can still be named.
_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/-]{0,59}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images. Checked when it is built; raises DataError when the parts do not fit together.

    images: (N, C, H, W) uint8, contiguous, N at least 1; labels: (N,) int64, each in
    0..len(class_names) - 1; class_names: distinct, in label order.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_arrays(self.images, self.labels)
        _check_class_names(self.class_names)
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest >= len(self.class_names):
            raise _label_range(lowest, highest, len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test records of one data set: same picture shape, same classes. Raises DataError."""

    train: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        shapes = self.train.images.shape[1:], self.test.images.shape[1:]
        names = self.train.class_names, self.test.class_names
        if shapes[0] != shapes[1] or names[0] != names[1]:
            raise DataError(
                "reader.split-mismatch",
                f"train has images {shapes[0]} in {len(names[0])} classes, test {shapes[1]} in {len(names[1])}",
                step=_STEP,
                fix="Both parts need the same picture shape and the same class names in the same order.",
            )


def build_split(
    train: tuple[NDArray[np.uint8], NDArray[np.generic]],
    test: tuple[NDArray[np.uint8], NDArray[np.generic]],
    *,
    class_names: tuple[str, ...] | None,
) -> Split:
    """A Split from (images (N, C, H, W), labels (N,) or (N, 1) of any integer type) pairs.

    Without `class_names` the classes are called "0", "1", ... up to the highest label. Raises DataError.
    """
    labels = [_as_labels(part[1]) for part in (train, test)]
    names = class_names or _numbered(labels)
    parts = [
        Dataset(np.require(images, requirements=["C", "W"]), column, names)
        for (images, _), column in zip((train, test), labels, strict=True)
    ]
    return Split(*parts)


def _as_labels(raw: NDArray[np.generic]) -> NDArray[np.int64]:
    if raw.dtype.kind not in "iu":
        raise wrong_kind(f"labels are {raw.dtype}", step=_STEP)
    column = raw[:, 0] if raw.ndim == 2 and raw.shape[1] == 1 else raw
    if column.size and int(column.max()) > np.iinfo(np.int64).max:  # uint64: would wrap around to below 0
        raise _label_range(int(column.min()), int(column.max()), bounds.MAX_CLASSES)
    return column.astype(np.int64)


def _numbered(labels: list[NDArray[np.int64]]) -> tuple[str, ...]:
    highest = max((int(column.max()) for column in labels if column.size), default=0)
    if highest >= bounds.MAX_CLASSES:
        raise _label_range(0, highest, bounds.MAX_CLASSES)
    return tuple(str(label) for label in range(highest + 1))


def _check_arrays(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    if images.dtype != np.uint8 or labels.dtype != np.int64:
        raise wrong_kind(f"images are {images.dtype}, labels {labels.dtype}", step=_STEP)
    fits = images.ndim == 4 and labels.shape == images.shape[:1] and images.flags.c_contiguous
    if not fits:
        raise wrong_shape(f"images {images.shape} and labels {labels.shape} do not fit together", step=_STEP)
    if not len(images):
        raise empty("a data set has no record", step=_STEP)
    bounds.check_room(images.shape, itemsize=1, what="images", step=_STEP)


def _check_class_names(names: tuple[str, ...]) -> None:
    if len(names) > bounds.MAX_CLASSES:
        raise too_large(f"{len(names)} classes", step=_STEP)
    bad = next((name for name in names if not _CLASS_NAME.fullmatch(name)), None)
    if not names or bad is not None or len(set(names)) != len(names):
        raise DataError(
            "reader.class-names",
            f"not usable as a class name: {bad!r:.80}" if bad is not None else "class names missing or double",
            step=_STEP,
            fix="Use distinct names of at most 60 letters, digits, spaces, dots, dashes, slashes, underscores.",
        )


def _label_range(lowest: int, highest: int, classes: int) -> DataError:
    return DataError(
        "reader.label-range",
        f"labels go from {lowest} to {highest}, there are {classes} classes",
        step=_STEP,
        fix="Number the classes from 0 without gaps, and name all of them.",
    )
