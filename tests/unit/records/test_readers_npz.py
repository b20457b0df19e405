"""The npz reader, against files of numpy's own writer and against hostile ones."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records.readers import bounds, read_npz
from caltrain.records.readers.npz import read_arrays

IMAGES: NDArray[np.uint8] = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)
KERAS = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:2], "y_test": LABELS[:2]}


def save(folder: Path, **arrays: NDArray[Any]) -> Path:
    path = folder / "set.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


def npy(array: NDArray[Any], **header: object) -> bytes:
    """The array as numpy saves it, with parts of its header replaced by lies."""
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    text = repr(described).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes()


def pack(
    folder: Path, *, compression: int = zipfile.ZIP_DEFLATED, members: Mapping[str, bytes] = MappingProxyType({})
) -> Path:
    """A zip with the sound members, some of them replaced."""
    path = folder / "set.npz"
    sound = {key: npy(np.ascontiguousarray(array)) for key, array in KERAS.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, raw in (sound | dict(members)).items():
            archive.writestr(f"{key}.npy", raw)
    return path


def refuse(path: Path, code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        read_npz(path)


def test_keras_names_grey(tmp_path: Path) -> None:
    split = read_npz(save(tmp_path, **KERAS))
    assert np.array_equal(split.train.images, IMAGES[:, np.newaxis])
    assert np.array_equal(split.test.labels, LABELS[:2])
    assert split.train.class_names == ("0", "1", "2")


def test_medmnist_names_colour_with_a_label_column_and_a_validation_part(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    arrays = {f"{part}_images": colour for part in ("train", "val", "test")}
    arrays |= {f"{part}_labels": LABELS[:, np.newaxis] for part in ("train", "val", "test")}
    split = read_npz(save(tmp_path, **arrays), class_names=("a", "b", "c"))
    assert np.array_equal(split.train.images, colour.transpose(0, 3, 1, 2))
    assert len(split.train) == len(split.test) == 6
    assert split.test.class_names == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["u1", "<i8", "<f4", "<f8"])
def test_named_arrays_are_read_as_they_are_stored(kind: str, tmp_path: Path) -> None:
    one, other = np.arange(6).astype(kind).reshape(2, 3), np.arange(4).astype(kind)
    found = read_arrays(save(tmp_path, one=one, other=other, more=one), ("other", "one"))
    assert [array.dtype for array in found] == [np.dtype(kind)] * 2
    assert np.array_equal(found[0], other)
    assert np.array_equal(found[1], one)
    with pytest.raises(DataError, match=r"^reader.missing-part: "):
        read_arrays(save(tmp_path, one=one), ("one", "other"))


def test_floats_are_no_pictures_and_objects_are_no_arrays(tmp_path: Path) -> None:
    refuse(save(tmp_path, **KERAS | {"x_train": IMAGES.astype(np.float32)}), "reader.kind")
    np.savez(tmp_path / "objects.npz", one=np.array([object()], dtype=object))
    with pytest.raises(DataError, match=r"^reader.kind: "):
        read_arrays(tmp_path / "objects.npz", ("one",))


@settings(max_examples=40, deadline=None)
@given(
    images=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)),
    column_major=st.booleans(),
    compressed=st.booleans(),
)
def test_reads_what_numpy_writes(images: NDArray[np.uint8], *, column_major: bool, compressed: bool) -> None:
    stored = np.asfortranarray(images) if column_major else images
    labels = np.zeros(len(images), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        writer = np.savez_compressed if compressed else np.savez
        writer(path, x_train=stored, y_train=labels, x_test=stored, y_test=labels)
        assert np.array_equal(read_npz(path).train.images[:, 0], images)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_an_object_array_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    target = tmp_path / "sprung"
    trap = np.empty(6, dtype=object)
    trap[:] = [Trap(target)] * 6
    buffer = io.BytesIO()
    np.save(buffer, trap, allow_pickle=True)
    refuse(pack(tmp_path, members={"y_train": buffer.getvalue()}), "reader.kind")
    assert not target.exists()
    buffer.seek(0)
    np.load(buffer, allow_pickle=True)  # the trap works: only the reader kept it shut
    assert target.is_dir()


@pytest.mark.parametrize(
    ("member", "code"),
    [
        ({"x_train": npy(IMAGES.astype(np.float32))}, "reader.kind"),
        ({"x_train": npy(IMAGES.astype(np.uint16))}, "reader.kind"),
        ({"y_train": npy(LABELS.astype(np.float64))}, "reader.kind"),
        ({"y_train": npy(np.array(["a"] * 6))}, "reader.kind"),
        ({"x_train": npy(IMAGES.reshape(6, 20))}, "reader.shape"),
        ({"x_train": npy(np.zeros((6, 3, 4, 5), np.uint8))}, "reader.shape"),  # channels first
        ({"x_train": npy(np.zeros((6, 0, 5), np.uint8))}, "reader.shape"),
        ({"x_train": npy(IMAGES[:5])}, "reader.shape"),
        ({"x_train": npy(IMAGES[:0]), "y_train": npy(LABELS[:0])}, "reader.empty"),
        ({"y_train": npy(LABELS.astype(np.int64) - 1)}, "reader.label-range"),
        ({"x_train": npy(IMAGES, shape=(7, 4, 5))}, "reader.length"),
        ({"x_train": npy(IMAGES, shape=(5, 4, 5))}, "reader.length"),
        ({"x_train": npy(IMAGES, descr="|u2")}, "reader.length"),
        ({"x_train": npy(IMAGES, shape=(2**40, 4, 5))}, "reader.too-large"),
        ({"x_train": npy(IMAGES, shape=(1, 2**32, 2**32))}, "reader.too-large"),
        ({"x_train": npy(IMAGES, shape=())}, "reader.malformed"),
        ({"x_train": npy(IMAGES, shape=(-6, 4, 5))}, "reader.malformed"),
        ({"x_train": npy(IMAGES, descr=[("a", "u1")])}, "reader.malformed"),
        ({"x_train": npy(IMAGES, more=1)}, "reader.malformed"),
        ({"x_train": npy(IMAGES)[:9]}, "reader.malformed"),
        ({"x_train": b""}, "reader.malformed"),
        ({"x_train": b"\x93NUMPY\x09\x00" + npy(IMAGES)[8:]}, "reader.malformed"),
        ({"x_train": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"("}, "reader.too-large"),
    ],
)
def test_members_that_are_not_plain_images_and_labels_are_refused(
    tmp_path: Path, member: dict[str, bytes], code: str
) -> None:
    refuse(pack(tmp_path, members=member), code)


def test_labels_outside_the_named_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^reader\.label-range: "):
        read_npz(save(tmp_path, **KERAS), class_names=("a", "b"))


def test_missing_arrays_and_files_are_named(tmp_path: Path) -> None:
    refuse(save(tmp_path, x_train=IMAGES, y_train=LABELS), "reader.missing-part")
    refuse(tmp_path / "absent.npz", "reader.not-found")
    refuse(tmp_path, "reader.unreadable")
    (tmp_path / "text.npz").write_text("not a zip archive")
    refuse(tmp_path / "text.npz", "reader.malformed")


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, **KERAS)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x_train.npy", npy(IMAGES))
    refuse(path, "reader.malformed")


def test_other_compressions_and_encryption_are_refused(tmp_path: Path) -> None:
    refuse(pack(tmp_path, compression=zipfile.ZIP_LZMA), "reader.malformed")
    raw = bytearray(pack(tmp_path).read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption, in the central directory
    (tmp_path / "set.npz").write_bytes(raw)
    refuse(tmp_path / "set.npz", "reader.malformed")


def test_a_crowd_of_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_PARTS", 3)
    refuse(pack(tmp_path), "reader.too-large")


def test_a_directory_that_lies_before_the_file_is_refused(tmp_path: Path) -> None:
    raw = bytearray(pack(tmp_path).read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x05\x06") + 12, 2**31)  # the size of the central directory
    (tmp_path / "set.npz").write_bytes(raw)
    refuse(tmp_path / "set.npz", "reader.malformed")


def announce(path: Path, size: int) -> Path:
    """Change the unpacked size of the first member in the central directory."""
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, size)
    path.write_bytes(raw)
    return path


def test_a_bomb_is_refused_by_its_announced_size(tmp_path: Path) -> None:
    refuse(announce(pack(tmp_path), 2**32 - 2), "reader.too-large")


def test_what_is_announced_but_not_there_is_not_allocated(tmp_path: Path) -> None:
    shape = (1_000, 1_000, 1_000)  # within the bounds, and a lie
    member = npy(IMAGES, shape=shape)
    path = announce(pack(tmp_path, members={"x_train": member}), len(member) - IMAGES.nbytes + 10**9)
    tracemalloc.start()
    refuse(path, "reader.length")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_member_longer_than_it_announces_is_refused(tmp_path: Path) -> None:
    member = npy(np.zeros((1_000, 100, 100), np.uint8), shape=(6, 4, 5))
    head = len(member) - 10**7
    tracemalloc.start()
    refuse(
        announce(pack(tmp_path, members={"x_train": member}), head + 120), "reader.malformed"
    )  # the CRC does not fit
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_a_set_or_a_named_error(data: st.DataObject) -> None:
    """Any cut raises; any changed byte raises or leaves a set (zip does not protect every byte)."""
    with tempfile.TemporaryDirectory() as folder:
        raw = bytearray(save(Path(folder), **KERAS).read_bytes())
        path = Path(folder) / "damaged.npz"
        position = data.draw(st.integers(0, len(raw) - 1))
        path.write_bytes(raw[:position])
        with pytest.raises(DataError, match=r"^reader\."):
            read_npz(path)
        raw[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        try:
            assert read_npz(path).train.images.shape == (6, 1, 4, 5)
        except DataError as error:
            assert error.code.startswith("reader.")  # noqa: PT017  # either outcome is right
