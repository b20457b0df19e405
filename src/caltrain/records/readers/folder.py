"""A folder of pictures per class: `train/<class>/*.png` and `test/<class>/*.png`, or just `<class>/*.png`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records.readers import bounds
from caltrain.records.readers.dataset import Split, build_split
from caltrain.records.readers.faults import class_names_differ, not_found, too_large
from caltrain.records.readers.files import read_bounded, readable
from caltrain.records.readers.pictures import decode_images

_STEP = "read image folder"
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_TEST_SHARE = 5  # without test/, one picture of five of each class is kept for testing

Files = list[tuple[str, Path]]  # (class, picture), sorted


def read_folder(root: Path) -> Split:
    """Read JPEG and PNG pictures; a class is called what its folder is called, numbered in sorted order.

    Without `train/` and `test/`, the split goes by a hash of class and file name: it is the same on every
    machine. Symbolic links are refused, hidden entries and other files ignored. Raises DataError.
    """
    entries = _entries(root)
    if {"train", "test"} <= entries.keys():
        train, test = (_pictures(root / part) for part in ("train", "test"))
    else:
        train, test = _split(_pictures(root))
    names = tuple(sorted({name for name, _ in train}))
    strange = {name for name, _ in test} - set(names)
    if strange:
        what = f"{root}: classes to test that are not trained: {sorted(strange)[:5]}"
        raise class_names_differ(what, step=_STEP)
    return build_split(_read(train, names), _read(test, names), class_names=names)


def _entries(folder: Path) -> dict[str, os.DirEntry[str]]:
    """Entries by name, sorted, without hidden ones; a symbolic link is an error, for it may lead anywhere."""
    with readable(folder, step=_STEP), os.scandir(folder) as scan:
        found: list[os.DirEntry[str]] = []
        for entry in scan:
            if len(found) >= bounds.MAX_RECORDS:
                raise too_large(f"{folder} has over {bounds.MAX_RECORDS} entries", step=_STEP)
            found.append(entry)
    link = next((entry for entry in found if entry.is_symlink()), None)
    if link is not None:
        raise DataError(
            "reader.symlink",
            f"{link.path} is a symbolic link, which is not followed",
            step=_STEP,
            fix="Put the picture or the folder itself there, or remove the link.",
        )
    return {entry.name: entry for entry in sorted(found, key=lambda e: e.name) if not entry.name.startswith(".")}


def _pictures(root: Path) -> Files:
    classes = [name for name, entry in _entries(root).items() if entry.is_dir()]
    if len(classes) > bounds.MAX_CLASSES:
        raise too_large(f"{root} has {len(classes)} folders", step=_STEP)
    files = [(name, path) for name in classes for path in _class_files(root / name)]
    if not files:
        raise not_found(
            f"{root} has no folder with pictures",
            step=_STEP,
            fix="Put the JPEG or PNG files of each class into a folder of their own: ROOT/[train|test/]CLASS/NAME.png",
        )
    return files


def _class_files(folder: Path) -> Iterator[Path]:
    for name, entry in _entries(folder).items():
        if entry.is_dir():  # its pictures would be left out without a word
            raise DataError(
                "reader.nested-folder",
                f"{entry.path} is a folder inside the folder of a class",
                step=_STEP,
                fix="A class has all its pictures in one folder, and no other folder in it.",
            )
        if entry.is_file() and Path(name).suffix.lower() in _SUFFIXES:
            yield folder / name


def _split(files: Files) -> tuple[Files, Files]:
    """One of `_TEST_SHARE` of each class, at least one where a class has two, by the hash of its name."""
    test: set[Path] = set()
    for _, group in groupby(files, key=itemgetter(0)):
        paths = [path for _, path in sorted(group, key=_hash)]
        test.update(paths[: max(len(paths) // _TEST_SHARE, min(1, len(paths) - 1))])
    return [f for f in files if f[1] not in test], [f for f in files if f[1] in test]


def _hash(file: tuple[str, Path]) -> bytes:
    return hashlib.sha256(os.fsencode(f"{file[0]}/{file[1].name}")).digest()


def _read(files: Files, names: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
    index = {name: label for label, name in enumerate(names)}
    labels = np.array([index[name] for name, _ in files], dtype=np.int64)
    blobs = ((str(path), read_bounded(path, bounds.MAX_ENCODED_BYTES, step=_STEP)) for _, path in files)
    return decode_images(blobs, len(files)), labels
