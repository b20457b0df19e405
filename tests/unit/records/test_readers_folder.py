"""The reader of a folder of pictures per class."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caltrain.errors import DataError
from caltrain.records.readers import Split, bounds, read_folder


def picture(path: Path, value: int, *, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def make(root: Path, *parts: str, count: int = 10) -> Path:
    """Classes `cat` and `dog` under each part; the pixels of a picture say which one it is."""
    for part in parts or ("",):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(root / part / name / f"{i:03}.png", 100 * label + i)
    return root


def values(split: Split) -> tuple[list[int], list[int]]:
    train, test = ([int(image[0, 0, 0]) for image in part.images] for part in (split.train, split.test))
    return train, test


def refuse(root: Path, code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        read_folder(root)


def test_train_and_test_are_read_in_sorted_order(tmp_path: Path) -> None:
    split = read_folder(make(tmp_path, "train", "test", count=2))
    assert values(split) == ([0, 1, 100, 101], [0, 1, 100, 101])
    assert split.train.labels.tolist() == [0, 0, 1, 1]
    assert split.train.class_names == ("cat", "dog")
    assert split.train.images.shape == (4, 3, 4, 3)


def test_without_parts_the_split_is_stratified_and_the_same_everywhere(tmp_path: Path) -> None:
    split = read_folder(make(tmp_path / "here"))
    train, test = values(split)
    assert sorted(train + test) == [*range(10), *range(100, 110)]
    assert split.test.labels.tolist() == [0, 0, 1, 1]
    assert test == [0, 8, 102, 108]  # by SHA-256 of "class/name": this may never change
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert values(read_folder(tmp_path / "there")) == (train, test)


def test_a_class_of_two_is_split_and_a_class_of_one_is_for_training(tmp_path: Path) -> None:
    make(tmp_path, count=2)
    picture(tmp_path / "eel" / "only.png", 200)
    split = read_folder(tmp_path)
    assert split.test.labels.tolist() == [0, 1]
    assert split.train.labels.tolist() == [0, 1, 2]


def test_other_files_and_hidden_entries_are_ignored_and_jpeg_is_read(tmp_path: Path) -> None:
    root = make(tmp_path, "train", "test", count=1)
    picture(root / "train" / "dog" / "photo.JPG", 50)
    (root / "train" / "dog" / "notes.txt").write_text("not a picture")
    picture(root / "train" / ".thumbnails" / "x.png", 0)
    picture(root / "train" / "loose.png", 0)
    assert len(read_folder(root).train) == 3


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/link.png"])
def test_symbolic_links_are_refused_not_followed(tmp_path: Path, place: str) -> None:
    root = make(tmp_path / "root", "train", "test", count=2)
    outside = make(tmp_path / "outside", "train")
    link = root / place
    if link.is_dir():
        shutil.rmtree(link)
    target = outside / place
    link.symlink_to(target if target.exists() else outside / "train" / "cat" / "000.png")
    refuse(root, "reader.symlink")


def test_a_folder_inside_a_class_is_refused(tmp_path: Path) -> None:
    picture(make(tmp_path) / "cat" / "more" / "x.png", 0)
    refuse(tmp_path, "reader.nested-folder")


def test_folders_without_pictures(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "reader.not-found")
    refuse(tmp_path, "reader.not-found")
    (tmp_path / "cat").mkdir()
    refuse(tmp_path, "reader.not-found")
    picture(tmp_path / "cat" / "a.png", 0)
    refuse(tmp_path, "reader.empty")  # one picture: nothing is left to test on
    refuse(tmp_path / "cat" / "a.png", "reader.unreadable")


def test_a_class_that_is_only_tested_is_refused(tmp_path: Path) -> None:
    picture(make(tmp_path, "train", "test", count=1) / "test" / "cats" / "0.png", 0)
    refuse(tmp_path, "reader.class-names-differ")


def test_pictures_of_two_sizes_are_refused(tmp_path: Path) -> None:
    picture(make(tmp_path) / "dog" / "000.png", 0, size=(5, 3))
    refuse(tmp_path, "reader.mixed-shapes")


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (make(tmp_path) / "dog" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"^reader\.undecodable: .*dog/000\.png"):
        read_folder(tmp_path)


def test_a_class_name_that_no_plan_can_carry_is_refused(tmp_path: Path) -> None:
    (make(tmp_path) / "dog").rename(tmp_path / "d\x1bog")
    refuse(tmp_path, "reader.class-names")


@pytest.mark.parametrize(
    ("bound", "value"),
    [("MAX_RECORDS", 9), ("MAX_CLASSES", 1), ("MAX_ENCODED_BYTES", 20), ("MAX_ARRAY_BYTES", 100)],
)
def test_folders_over_the_bounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(bounds, bound, value)
    refuse(make(tmp_path), "reader.too-large")
