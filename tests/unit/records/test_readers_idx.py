"""The idx reader: plain and gzipped files, truncated, oversize, bombs."""

from __future__ import annotations

import gzip
import struct
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records.readers import read_idx
from caltrain.records.readers.idx import IDX_NAMES, is_idx_folder

IMAGES: NDArray[np.uint8] = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 1], dtype=np.uint8)
TRAIN_IMAGES = IDX_NAMES[0]


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder: Path, *, packed: bool = False, **parts: bytes) -> Path:
    for name in IDX_NAMES:
        raw = parts.get(name.replace("-", "_"), idx(IMAGES if "images" in name else LABELS))
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw)) if packed else (folder / name).write_bytes(raw)
    return folder


def refuse(folder: Path, code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        read_idx(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_reads_the_four_files(tmp_path: Path, *, packed: bool) -> None:
    assert not is_idx_folder(tmp_path)
    split = read_idx(write(tmp_path, packed=packed))
    assert is_idx_folder(tmp_path)
    assert np.array_equal(split.train.images, IMAGES[:, np.newaxis])
    assert np.array_equal(split.test.labels, LABELS)
    assert split.test.class_names == ("0", "1", "2")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / IDX_NAMES[3]).unlink()
    with pytest.raises(DataError, match=r"^reader\.not-found: .*t10k-labels-idx1-ubyte"):
        read_idx(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "reader.malformed"),
        (idx(IMAGES)[:15], "reader.malformed"),
        (b"\0\0\x0d\3" + idx(IMAGES)[4:], "reader.malformed"),  # floating point
        (idx(LABELS), "reader.malformed"),  # labels under the name of images
        (idx(IMAGES)[:-1], "reader.length"),
        (idx(IMAGES) + b"\0", "reader.length"),
        (idx(IMAGES[:0]), "reader.shape"),  # no images for three labels
        (idx(IMAGES[:, :0]), "reader.shape"),
        (b"\0\0\x08\3" + struct.pack(">3I", *[2**32 - 1] * 3), "reader.too-large"),
        (b"\0\0\x08\3" + struct.pack(">3I", 3, 4097, 1), "reader.too-large"),
        (b"\0\0\x08\3" + struct.pack(">3I", 2_000_000, 100, 100), "reader.too-large"),
    ],
)
def test_files_that_are_not_what_their_header_says(tmp_path: Path, raw: bytes, code: str, *, packed: bool) -> None:
    refuse(write(tmp_path, packed=packed, train_images_idx3_ubyte=raw), code)


def test_labels_and_images_must_be_as_many(tmp_path: Path) -> None:
    refuse(write(tmp_path, t10k_labels_idx1_ubyte=idx(LABELS[:2])), "reader.shape")


def test_labels_outside_the_named_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^reader\.label-range: "):
        read_idx(write(tmp_path), class_names=("a", "b"))


def test_a_decompression_bomb_gets_no_further_than_its_header(tmp_path: Path) -> None:
    bomb = gzip.compress(idx(IMAGES) + bytes(100_000_000), compresslevel=1)
    write(tmp_path, packed=True)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(bomb)
    tracemalloc.start()
    refuse(tmp_path, "reader.length")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_what_is_announced_but_not_there_is_not_allocated(tmp_path: Path) -> None:
    raw = b"\0\0\x08\3" + struct.pack(">3I", 1_000, 1_000, 1_000) + bytes(100)
    write(tmp_path, packed=True, train_images_idx3_ubyte=raw)
    tracemalloc.start()
    refuse(tmp_path, "reader.length")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_gzip_files_raise(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), packed=True)
        path = folder / f"{TRAIN_IMAGES}.gz"
        raw = bytearray(path.read_bytes())
        whole = read_idx(folder).train.images
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        with pytest.raises(DataError, match=r"^reader\."):
            read_idx(folder)
        # Flags, time and system are unprotected; from byte 10 on, the stream and its CRC are.
        raw[data.draw(st.integers(10, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        with suppress(DataError):
            # A bit of the padding behind the last block, which nothing reads, is no damage.
            assert np.array_equal(read_idx(folder).train.images, whole)
