"""CIFAR-10's official archive in the binary version, which holds no pickles: read in memory, not extracted.

Format: `cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin`, up to 10,000 rows of one label byte and
3,072 bytes of pixels in (3, 32, 32) order (https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version").
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltrain.records.readers.dataset import Split, build_split
from caltrain.records.readers.faults import malformed, missing_part, too_large, wrong_length
from caltrain.records.readers.files import readable

_STEP = "read CIFAR archive"
_FOLDER = "cifar-10-batches-bin"
_TRAIN = tuple(f"{_FOLDER}/data_batch_{i}.bin" for i in range(1, 6))
_TEST = f"{_FOLDER}/test_batch.bin"
_ROW = 1 + 3 * 32 * 32
_MAX_ROWS = 10_000  # of one batch
_MAX_UNPACKED = 256 << 20  # the real one unpacks to 184 MB
_MAX_MEMBERS = 64

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar_archive(path: Path, *, class_names: tuple[str, ...] | None = CIFAR10_CLASSES) -> Split:
    """Read `cifar-10-binary.tar.gz`: images (N, 3, 32, 32). Raises DataError."""
    with readable(path, step=_STEP), path.open("rb") as file:
        try:
            batches = _batches(gzip.GzipFile(fileobj=file), path)
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError) as error:
            raise malformed(f"{path} is not a sound tar.gz: {error}", step=_STEP) from error
    missing = {*_TRAIN, _TEST} - batches.keys()
    if missing:
        fix = "Get cifar-10-binary.tar.gz (not the Python or the Matlab version)."
        raise missing_part(f"{path} has no {', '.join(sorted(missing))}", step=_STEP, fix=fix)
    train = np.concatenate([batches[name] for name in _TRAIN])
    return build_split(_records(train), _records(batches[_TEST]), class_names=class_names)


class _Bounded(io.RawIOBase):
    """The unpacked stream, up to a bound: what tarfile skips or takes for a header counts too."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream, self._path, self._left = stream, path, _MAX_UNPACKED

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise too_large(f"{self._path} unpacks to more than {_MAX_UNPACKED} bytes", step=_STEP)
        return data


def _batches(stream: gzip.GzipFile, path: Path) -> dict[str, NDArray[np.uint8]]:
    """The wanted members by name, each (rows, 3073). No member is written anywhere, so no path is trusted."""
    batches: dict[str, NDArray[np.uint8]] = {}
    with tarfile.open(fileobj=_Bounded(stream, path), mode="r|") as archive:
        for count, member in enumerate(archive, start=1):
            if count > _MAX_MEMBERS:
                raise too_large(f"{path} has more than {_MAX_MEMBERS} members", step=_STEP)
            if member.name not in {*_TRAIN, _TEST}:
                continue
            if member.name in batches:
                raise malformed(f"{path} has {member.name} twice", step=_STEP)
            batches[member.name] = _batch(archive, member)
    return batches


def _batch(archive: tarfile.TarFile, member: tarfile.TarInfo) -> NDArray[np.uint8]:
    stream = archive.extractfile(member) if member.type in {tarfile.REGTYPE, tarfile.AREGTYPE} else None
    if stream is None:  # a link, a device or a sparse file under the name of a batch
        raise malformed(f"{member.name} is not a regular file", step=_STEP)
    if member.size > _MAX_ROWS * _ROW:
        raise too_large(f"{member.name} has {member.size} bytes", step=_STEP)
    data = stream.read(member.size)
    if len(data) != member.size or not data or len(data) % _ROW:
        raise wrong_length(f"{member.name} has {len(data)} bytes, not whole rows of {_ROW}", step=_STEP)
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, _ROW)


def _records(rows: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
