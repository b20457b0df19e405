"""NumPy archives (`.npz`) of images and labels, with the key names of Keras' MNIST or of MedMNIST.

Read by hand instead of with `np.load`: the array header is matched, never evaluated, its sizes are held
against the archive's before a byte is unpacked, and an array of Python objects is refused, not unpickled.
Format: numpy.lib.format, versions 1 to 3.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltrain.records.readers import bounds
from caltrain.records.readers.dataset import Split, build_split
from caltrain.records.readers.faults import (
    malformed,
    missing_part,
    too_large,
    wrong_kind,
    wrong_length,
    wrong_shape,
)
from caltrain.records.readers.files import Stream, read_up_to, readable

_STEP = "read npz"
_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),  # Keras' mnist.npz
    ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST; its val_* are not read
)
_MAX_HEADER = 4096
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError)
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([^']{1,16})',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\(((?:\d{1,18},\s*)*(?:\d{1,18},?)?)\s*\),?\s*\}\s*"
)
_INTEGERS = re.compile(rb"[<>|=][iu][1248]")
_NUMBERS = re.compile(rb"[<>|=][iu][1248]|[<>=]f[48]")


def read_npz(path: Path, *, class_names: tuple[str, ...] | None = None) -> Split:
    """Read `x_train y_train x_test y_test` or `train_images train_labels test_images test_labels`.

    Images are uint8, (N, H, W) or channels last (N, H, W, C); labels are integers, (N,) or (N, 1).
    Raises DataError.
    """
    x_train, y_train, x_test, y_test = _read(path, _KEYS, kinds=_INTEGERS)
    return build_split(
        (_channels_first(x_train, path), y_train), (_channels_first(x_test, path), y_test), class_names=class_names
    )


def read_arrays(path: Path, names: tuple[str, ...]) -> list[NDArray[np.generic]]:
    """The arrays of these names as they are stored: integers or floats of any shape. Raises DataError."""
    return _read(path, (names,), kinds=_NUMBERS)


def _read(path: Path, keys: tuple[tuple[str, ...], ...], *, kinds: re.Pattern[bytes]) -> list[NDArray[np.generic]]:
    """The arrays of the first of these groups of names that is there."""
    with readable(path, step=_STEP), path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(archive, path)
                return [_array(archive, members[key], path, kinds=kinds) for key in _keys(members, path, keys)]
        except _ZIP_ERRORS as error:
            raise malformed(f"{path} is not a sound zip archive: {error}", step=_STEP) from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > bounds.MAX_PARTS:
        raise too_large(f"{path} has {len(infos)} members", step=_STEP)
    members = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(members) != len(infos):
        raise malformed(f"{path} has two members of one name", step=_STEP)
    return members


def _keys(members: dict[str, zipfile.ZipInfo], path: Path, groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    for keys in groups:
        if all(key in members for key in keys):
            return keys
    choices = " or ".join(", ".join(keys) for keys in groups)
    raise missing_part(
        f"{path} holds {sorted(members)[:12]}", step=_STEP, fix=f"Save the arrays under the names {choices}."
    )


def _array(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, *, kinds: re.Pattern[bytes]
) -> NDArray[np.generic]:
    what = f"{info.filename} of {path}"
    if info.flag_bits & 1 or info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise malformed(f"{what} is encrypted, or packed by other means than deflate", step=_STEP)
    if info.file_size > bounds.MAX_ARRAY_BYTES + _MAX_HEADER:
        raise too_large(f"{what} would be {info.file_size} bytes", step=_STEP)
    with archive.open(info) as stream:
        dtype, column_major, shape, head = _header(stream, what, kinds)
        size = bounds.check_room(shape, itemsize=dtype.itemsize, what=what, step=_STEP)
        if info.file_size != head + size:
            raise wrong_length(f"{what} has {info.file_size} bytes, its header says {head + size}", step=_STEP)
        data = read_up_to(stream, size)
    if len(data) != size:
        raise wrong_length(f"{what} ends after {len(data)} of {size} bytes", step=_STEP)
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if column_major else "C")


def _header(
    stream: Stream, what: str, kinds: re.Pattern[bytes]
) -> tuple[np.dtype[np.generic], bool, tuple[int, ...], int]:
    """(element type, column-major?, shape, bytes that the header takes)."""
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in {b"\x01\x00", b"\x02\x00", b"\x03\x00"}:
        raise malformed(f"{what} is not an array of numpy's format", step=_STEP)
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _MAX_HEADER:
        raise too_large(f"{what} has a header of {length} bytes", step=_STEP)
    match = _HEADER.fullmatch(stream.read(length))
    if match is None:
        raise malformed(f"{what} has a header that describes no plain array", step=_STEP)
    descr, order, dimensions = match.groups()
    if not kinds.fullmatch(descr):
        objects = ": Python objects, which are never unpickled" if b"O" in descr else ""
        raise wrong_kind(f"{what} has elements {descr.decode('latin-1')!r}{objects}", step=_STEP)
    shape = tuple(int(size) for size in dimensions.replace(b",", b" ").split())
    if not shape:
        raise malformed(f"{what} is a single number", step=_STEP)
    return np.dtype(descr.decode()), order == b"True", shape, 8 + width + length


def _channels_first(images: NDArray[np.generic], path: Path) -> NDArray[np.uint8]:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    if images.dtype != np.uint8:
        raise wrong_kind(f"images of {path} are {images.dtype}", step=_STEP)
    if images.ndim == 3:
        images = images[:, :, :, np.newaxis]
    if images.ndim != 4 or images.shape[3] not in {1, 3, 4}:
        raise wrong_shape(f"images of {path} have the shape {images.shape}", step=_STEP)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.uint8, copy=False)
