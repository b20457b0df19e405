"""Data sets by name, or by the path of whatever a person has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from caltrain.errors import ConfigError, DataError
from caltrain.records.readers.cifar import CIFAR10_CLASSES, read_cifar_archive
from caltrain.records.readers.dataset import Split
from caltrain.records.readers.digits import read_digits
from caltrain.records.readers.faults import not_found
from caltrain.records.readers.files import readable
from caltrain.records.readers.folder import read_folder
from caltrain.records.readers.idx import is_idx_folder, read_idx
from caltrain.records.readers.npz import read_npz
from caltrain.records.readers.parquet import is_parquet_folder, read_parquet

if TYPE_CHECKING:
    import httpx

_STEP = "find data set"
_FORMS = (
    "an .npz file, cifar-10-binary.tar.gz, a folder with the four idx files, "
    "a folder with train and test .parquet, or a folder with pictures in one folder per class"
)

Reader = Callable[..., Split]


@dataclass(frozen=True)
class _Known:
    """What a named set must look like, whatever form it comes in."""

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    files: tuple[str, ...]


_KNOWN = {
    "mnist": _Known((1, 28, 28), tuple("0123456789"), ("mnist.npz",)),
    "cifar10": _Known((3, 32, 32), CIFAR10_CLASSES, ("cifar-10-binary.tar.gz",)),
    "pneumoniamnist": _Known((1, 28, 28), ("normal", "pneumonia"), ("pneumoniamnist.npz",)),
}
NAMES = ("digits", *_KNOWN, "folder")


def load(name: str, data_dir: Path | None, *, download: bool, client: httpx.Client | None = None) -> Split:
    """One of `NAMES`.

    `digits` needs no file. `folder` takes `data_dir` as a folder of pictures per class. The others are
    looked for at `data_dir` (a file, or a folder that holds them directly or in a folder called `name`),
    or, without it, in the cache. With `download`, what is not there is first brought there.
    Raises ConfigError (unknown name, nothing to download, no pyarrow), DataError (not found, not
    readable, not this set) and what `download.fetch` raises.
    """
    if name == "digits":
        return read_digits()
    if name == "folder":
        return read_folder(_given(data_dir))
    known = _KNOWN.get(name)
    if known is None:
        raise ConfigError(
            "reader.unknown-name",
            f"there is no data set called {name!r:.60}",
            step=_STEP,
            fix=f"Choose one of {', '.join(NAMES)}.",
        )
    read = _locate(name, data_dir, download=download, client=client)
    return _checked(read(class_names=known.class_names), name, known)


def open_path(path: Path) -> Split:
    """Whatever lies at `path`: npz, CIFAR-10's archive, idx, Parquet or a folder of pictures per class.

    Raises DataError, and ConfigError where pyarrow is needed and absent.
    """
    with readable(path, step=_STEP):
        path.stat()
        read = _recognise(path)
    if read is not None:
        return read()
    if path.is_dir():
        return read_folder(path)
    raise DataError(
        "reader.unrecognised", f"{path} is in no form that is known here", step=_STEP, fix=f"Give {_FORMS}."
    )


def _given(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise ConfigError(
            "reader.no-data-dir",
            "the data set `folder` needs a folder",
            step=_STEP,
            fix="Name it with --data-dir.",
        )
    return data_dir


def _locate(name: str, data_dir: Path | None, *, download: bool, client: httpx.Client | None) -> Reader:
    if data_dir is None or download:
        # Here, because whoever reads a local file should not have to start an HTTP client for it.
        from caltrain.records.readers.download import cache_dir, fetch  # noqa: PLC0415

        root = cache_dir(os.environ) if data_dir is None else data_dir
        if download and _search(root, name) is None:
            fetch(name, root / name, client=client)
    else:
        root = data_dir
    read = _search(root, name)
    if read is None:
        fix = f"Name the folder that holds it with --data-dir, or add --download. It may be {_FORMS}."
        raise not_found(f"{name} is not in {root}", step=_STEP, fix=fix)
    return read


def _search(root: Path, name: str) -> Reader | None:
    """The first place at `root` that holds the set, as a reader that is still to be called."""
    places = (folder / file for folder in (root / name, root) for file in (*_KNOWN[name].files, ""))
    with readable(root, step=_STEP):
        return next((read for place in places if (read := _recognise(place)) is not None), None)


def _recognise(path: Path) -> Reader | None:
    if path.is_file() and path.suffix == ".npz":
        return partial(read_npz, path)
    if path.is_file() and path.name.endswith(".tar.gz"):
        return partial(read_cifar_archive, path)
    if is_parquet_folder(path):
        return partial(read_parquet, path)
    return partial(read_idx, path) if is_idx_folder(path) else None


def _checked(split: Split, name: str, known: _Known) -> Split:
    """Raises DataError when a file under a set's name holds another set."""
    shape = split.train.images.shape[1:]
    if shape != known.shape:
        raise DataError(
            "reader.another-set",
            f"{name} has images {known.shape} (channels, height, width); these are {shape}",
            step=_STEP,
            fix="Give the folder of the right set, or give the path itself in place of a name.",
        )
    return split
