"""The reader of CIFAR-10's official archive, on archives made here."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records.readers import CIFAR10_CLASSES, cifar, read_cifar_archive

FOLDER = "cifar-10-batches-bin"
NAMES = [*(f"{FOLDER}/data_batch_{i}.bin" for i in range(1, 6)), f"{FOLDER}/test_batch.bin"]


def rows(seed: int, count: int = 3) -> NDArray[np.uint8]:
    made = np.random.default_rng(seed).integers(0, 256, (count, 3_073), dtype=np.uint8)
    made[:, 0] %= 10
    return made


BATCHES = {name: rows(i) for i, name in enumerate(NAMES)}
Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def sound() -> list[Member]:
    """The members as the publisher packs them, a folder and two text files among them."""
    extra = [member(FOLDER, kind=tarfile.DIRTYPE), member(f"{FOLDER}/readme.html", b"<p>")]
    return [*extra, *(member(name, BATCHES[name].tobytes()) for name in reversed(NAMES))]


def pack(folder: Path, members: list[Member]) -> Path:
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def replaced(index: int, new: Member) -> list[Member]:
    return [new if info.name == NAMES[index] else (info, data) for info, data in sound()]


def refuse(path: Path, code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        read_cifar_archive(path)


def test_batches_are_read_in_their_order_whatever_the_order_of_the_archive(tmp_path: Path) -> None:
    split = read_cifar_archive(pack(tmp_path, sound()))
    train = np.concatenate([BATCHES[name] for name in NAMES[:5]])
    assert np.array_equal(split.train.images, train[:, 1:].reshape(-1, 3, 32, 32))
    assert split.train.labels.tolist() == train[:, 0].tolist()
    assert split.test.labels.tolist() == BATCHES[NAMES[5]][:, 0].tolist()
    assert split.train.class_names == CIFAR10_CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]  # nothing extracted


BAD_LABEL = BATCHES[NAMES[0]].copy()
BAD_LABEL[1, 0] = 10


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (member("elsewhere.bin"), "reader.missing-part"),
        (member(NAMES[0], b""), "reader.length"),
        (member(NAMES[0], rows(0).tobytes()[:-1]), "reader.length"),
        (member(NAMES[0], rows(0, count=10_001).tobytes()), "reader.too-large"),
        (member(NAMES[0], BAD_LABEL.tobytes()), "reader.label-range"),
        (member(NAMES[0], kind=tarfile.SYMTYPE, link="/etc/passwd"), "reader.malformed"),
        (member(NAMES[0], kind=tarfile.LNKTYPE, link=NAMES[1]), "reader.malformed"),
        (member(NAMES[0], kind=tarfile.FIFOTYPE), "reader.malformed"),
        (member(NAMES[0], kind=tarfile.DIRTYPE), "reader.malformed"),
        (member(NAMES[1], rows(0).tobytes()), "reader.malformed"),  # one batch twice
    ],
)
def test_members_that_are_not_batches_are_refused(tmp_path: Path, new: Member, code: str) -> None:
    refuse(pack(tmp_path, replaced(0, new)), code)


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    refuse(path, "reader.not-found")
    for raw in (b"", b"text", gzip.compress(b"text" * 500)):
        path.write_bytes(raw)
        refuse(path, "reader.malformed")


def test_a_bomb_in_a_member_that_is_skipped_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_MAX_UNPACKED", 20_000_000)
    path = pack(tmp_path, [member("bomb", bytes(60_000_000)), *sound()])
    tracemalloc.start()
    refuse(path, "reader.too-large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_bomb_in_an_extended_header_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_MAX_UNPACKED", 1_000_000)
    path = pack(tmp_path, [member("pax", b"0" * 5_000_000, kind=tarfile.XHDTYPE), *sound()])
    refuse(path, "reader.too-large")


def test_a_crowd_of_members_is_refused(tmp_path: Path) -> None:
    refuse(pack(tmp_path, [member(f"file {i}") for i in range(65)]), "reader.too-large")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_archives_raise(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pack(Path(folder), sound())
        raw = gzip.decompress(path.read_bytes()).rstrip(b"\0")
        path.write_bytes(gzip.compress(raw[: data.draw(st.integers(0, len(raw) - 600))], 1))
        with pytest.raises(DataError, match=r"^reader\."):
            read_cifar_archive(path)
        packed = bytearray(gzip.compress(raw + bytes(10_240), 1))
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(packed)
        try:
            assert len(read_cifar_archive(path).train) == 15
        except DataError as error:
            assert error.code.startswith("reader.")  # noqa: PT017  # either outcome is right
