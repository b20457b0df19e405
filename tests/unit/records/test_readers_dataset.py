"""What a Dataset and a Split accept."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records.readers import Dataset, Split, bounds
from caltrain.records.readers.dataset import build_split

IMAGES: NDArray[np.uint8] = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
LABELS = np.array([0, 1], dtype=np.int64)


def test_a_sound_dataset_keeps_what_it_was_given() -> None:
    data = Dataset(IMAGES, LABELS, ("cat", "dog"))
    assert len(data) == 2
    assert data.images is IMAGES
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.labels = LABELS  # type: ignore[misc]


@pytest.mark.parametrize(
    ("images", "labels", "names", "code"),
    [
        (IMAGES.astype(np.float32), LABELS, ("a", "b"), "reader.kind"),
        (IMAGES, LABELS.astype(np.int32), ("a", "b"), "reader.kind"),
        (IMAGES[0], LABELS, ("a", "b"), "reader.shape"),
        (IMAGES, LABELS[:1], ("a", "b"), "reader.shape"),
        (IMAGES, LABELS[:, np.newaxis], ("a", "b"), "reader.shape"),
        (IMAGES.transpose(0, 2, 3, 1), LABELS, ("a", "b"), "reader.shape"),  # not contiguous
        (IMAGES[:, :, :0].copy(), LABELS, ("a", "b"), "reader.shape"),
        (IMAGES[:0], LABELS[:0], ("a", "b"), "reader.empty"),
        (IMAGES, LABELS + 1, ("a", "b"), "reader.label-range"),
        (IMAGES, LABELS - 1, ("a", "b"), "reader.label-range"),
        (IMAGES, LABELS, (), "reader.class-names"),
        (IMAGES, LABELS, ("a", "a"), "reader.class-names"),
        (IMAGES, LABELS, ("a", ""), "reader.class-names"),
        (IMAGES, LABELS, ("a", "b\x1b[31m"), "reader.class-names"),
        (IMAGES, LABELS, ("a", "b\n"), "reader.class-names"),
        (IMAGES, LABELS, ("a", "b" * 61), "reader.class-names"),
        (IMAGES, LABELS, tuple(map(str, range(10_001))), "reader.too-large"),
    ],
)
def test_an_unsound_dataset_is_refused(images: Any, labels: Any, names: tuple[str, ...], code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        Dataset(images, labels, names)


def test_more_images_than_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_RECORDS", 1)
    with pytest.raises(DataError, match=r"^reader\.too-large: "):
        Dataset(IMAGES, LABELS, ("a", "b"))


def test_the_parts_of_a_split_must_agree() -> None:
    train = Dataset(IMAGES, LABELS, ("a", "b"))
    for test in (Dataset(IMAGES, LABELS, ("b", "a")), Dataset(IMAGES[:, :1].copy(), LABELS, ("a", "b"))):
        with pytest.raises(DataError, match=r"^reader\.split-mismatch: "):
            Split(train, test)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "<u8", "i8"])
def test_labels_of_any_integer_type_and_of_one_column_are_taken(dtype: str) -> None:
    column = np.array([[0], [2]], dtype=dtype)
    split = build_split((IMAGES, column), (IMAGES, column[:, 0]), class_names=None)
    assert split.train.labels.tolist() == split.test.labels.tolist() == [0, 2]
    assert split.train.labels.dtype == np.int64
    assert split.train.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        (np.array([0, 2**64 - 1], dtype=np.uint64), "reader.label-range"),  # would wrap around to -1
        (np.array([0, 2**62]), "reader.label-range"),  # would name 2**62 classes
        (np.array([0, -1]), "reader.label-range"),
        (np.array([0.0, 1.0]), "reader.kind"),
        (np.array([False, True]), "reader.kind"),
        (np.array([[0, 1], [1, 0]]), "reader.shape"),  # several labels an image
    ],
)
def test_labels_that_number_no_class_are_refused(labels: NDArray[Any], code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        build_split((IMAGES, labels), (IMAGES, LABELS), class_names=None)


def test_images_from_a_read_only_buffer_become_writable_and_contiguous() -> None:
    frozen = np.frombuffer(IMAGES.tobytes(), dtype=np.uint8).reshape(IMAGES.shape)
    split = build_split((frozen, LABELS), (frozen[:, ::-1], LABELS), class_names=None)
    for part in (split.train, split.test):
        assert part.images.flags.writeable
        assert part.images.flags.c_contiguous
    assert np.array_equal(split.test.images, IMAGES[:, ::-1])
