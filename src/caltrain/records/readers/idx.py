"""The idx files of MNIST and the sets made after it, plain or gzipped.

Format: two zero bytes, 0x08 for unsigned bytes, the number of dimensions, each dimension as a big-endian
32-bit integer, then the elements (https://yann.lecun.com/exdb/mnist, section "the idx file format").
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltrain.records.readers import bounds
from caltrain.records.readers.dataset import Split, build_split
from caltrain.records.readers.faults import malformed, not_found, wrong_length
from caltrain.records.readers.files import Stream, read_up_to, readable

_STEP = "read idx"
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def is_idx_folder(folder: Path) -> bool:
    """Whether all four files are there, plain or with `.gz`."""
    return all(_find(folder, name) is not None for name in IDX_NAMES)


def read_idx(folder: Path, *, class_names: tuple[str, ...] | None = None) -> Split:
    """Read the four files `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`. Raises DataError."""
    images, labels, test_images, test_labels = (_part(folder, name) for name in IDX_NAMES)
    return build_split(
        (images[:, np.newaxis], labels), (test_images[:, np.newaxis], test_labels), class_names=class_names
    )


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _part(folder: Path, name: str) -> NDArray[np.uint8]:
    path = _find(folder, name)
    if path is None:
        raise not_found(f"{folder} has no {name} and no {name}.gz", step=_STEP)
    with readable(path, step=_STEP), path.open("rb") as file:
        try:
            stream: Stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            return _array(stream, dimensions=3 if "idx3" in name else 1, path=path)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise malformed(f"{path} is not a whole gzip file: {error}", step=_STEP) from error


def _array(stream: Stream, *, dimensions: int, path: Path) -> NDArray[np.uint8]:
    head = stream.read(4 + 4 * dimensions)
    if len(head) != 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
        raise malformed(f"{path} does not begin as idx with {dimensions} dimension(s) of bytes", step=_STEP)
    shape = struct.unpack_from(f">{dimensions}I", head, 4)
    size = bounds.check_room(shape, itemsize=1, what=str(path), step=_STEP)
    data = read_up_to(stream, size + 1)  # one more than announced: no decompression bomb gets further
    if len(data) != size:
        held = f"only {len(data)}" if len(data) < size else "more"
        raise wrong_length(f"{path} announces {size} bytes and holds {held}", step=_STEP)
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
