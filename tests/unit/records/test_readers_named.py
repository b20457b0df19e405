"""Data sets by name and by path, and the real ones where they are."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from caltrain.errors import ConfigError, DataError, EnvironmentFault
from caltrain.records.readers import CIFAR10_CLASSES, NAMES, Split, load, open_path, read_npz
from caltrain.records.readers.download import SOURCES, Remote
from caltrain.records.readers.idx import IDX_NAMES

GREY: NDArray[np.uint8] = np.arange(4 * 28 * 28, dtype=np.uint64).astype(np.uint8).reshape(4, 28, 28)
LABELS = np.array([0, 1, 1, 0], dtype=np.uint8)


def npz(path: Path, images: NDArray[np.uint8] = GREY, labels: NDArray[np.uint8] = LABELS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def idx(name: str) -> bytes:
    array = GREY if "images" in name else LABELS
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in IDX_NAMES:
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(name)))
    return folder


def picture_folder(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(GREY[0]).save(folder / name / f"{i}.png")
    return folder


def cifar_archive(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = 3_073
            archive.addfile(info, io.BytesIO(bytes(3_073)))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "caltrain" / "data"


def unplugged(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("Name or service not known", request=request)


def offline() -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(unplugged))


def test_digits_are_always_the_same_stratified_split() -> None:
    split = load("digits", None, download=False)
    assert split.train.images.shape == (1_347, 1, 8, 8)
    assert split.test.images.shape == (450, 1, 8, 8)
    assert (int(split.train.images.max()), int(split.train.images.min())) == (240, 0)
    assert not (split.train.images % 15).any()
    whole = np.bincount(split.train.labels) + np.bincount(split.test.labels)
    assert np.abs(np.bincount(split.test.labels) - whole / 4).max() < 1
    pixels = split.test.images.tobytes() + split.test.labels.tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "5faf89b912a648d7"


@pytest.mark.parametrize("place", ["mnist/mnist.npz", "mnist.npz"])
def test_a_named_set_is_found_under_the_folder(tmp_path: Path, place: str) -> None:
    npz(tmp_path / place)
    split = load("mnist", tmp_path, download=False)
    assert np.array_equal(split.train.images[:, 0], GREY)
    assert split.train.class_names == tuple("0123456789")


def test_a_named_set_may_be_the_file_itself_or_its_own_folder(tmp_path: Path) -> None:
    path = npz(tmp_path / "anything.npz")
    assert load("pneumoniamnist", path, download=False).test.class_names == ("normal", "pneumonia")
    idx_folder(tmp_path / "raw")
    assert len(load("mnist", tmp_path / "raw", download=False).train) == 4
    archive = cifar_archive(tmp_path / "cifar10" / "cifar-10-binary.tar.gz")
    for place in (tmp_path, archive.parent, archive):
        assert load("cifar10", place, download=False).train.class_names == CIFAR10_CLASSES


def test_the_folder_with_the_sets_name_goes_first(tmp_path: Path) -> None:
    npz(tmp_path / "mnist" / "mnist.npz", images=255 - GREY)
    idx_folder(tmp_path)
    assert np.array_equal(load("mnist", tmp_path, download=False).train.images[:, 0], 255 - GREY)


def test_another_set_under_a_known_name_is_refused(tmp_path: Path) -> None:
    npz(tmp_path / "small" / "mnist.npz", images=GREY[:, :8, :8].copy())
    with pytest.raises(DataError, match=r"^reader\.another-set: "):
        load("mnist", tmp_path / "small", download=False)
    npz(tmp_path / "pneumoniamnist.npz", labels=LABELS + 1)
    with pytest.raises(DataError, match=r"^reader\.label-range: "):
        load("pneumoniamnist", tmp_path, download=False)


def test_what_is_not_there_is_named_with_the_ways_to_get_it(tmp_path: Path, cache: Path) -> None:
    for folder in (tmp_path, None):
        with pytest.raises(DataError, match=r"^reader\.not-found: mnist .*--download"):
            load("mnist", folder, download=False)
    assert not cache.exists()


def test_unknown_names_and_a_folder_without_a_path() -> None:
    with pytest.raises(ConfigError, match=r"^reader\.unknown-name: .*digits, mnist, cifar10, pneumoniamnist, folder"):
        load("imagenet", None, download=True)
    with pytest.raises(ConfigError, match=r"^reader\.no-data-dir: "):
        load("folder", None, download=False)


def test_download_brings_a_set_into_the_cache_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {f"https://example.test/{name}.gz": gzip.compress(idx(name)) for name in IDX_NAMES}
    remotes = tuple(
        Remote(url, len(body), hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest())  # noqa: S324
        for url, body in bodies.items()
    )
    monkeypatch.setitem(SOURCES, "mnist", remotes)

    def serve(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=iter([bodies[str(request.url)]]))

    with httpx.Client(transport=httpx.MockTransport(serve)) as client:
        assert len(load("mnist", None, download=True, client=client).train) == 4
    assert {path.name for path in (cache / "mnist").iterdir()} == {f"{name}.gz" for name in IDX_NAMES}
    with offline() as client:
        assert len(load("mnist", None, download=True, client=client).train) == 4
    assert len(load("mnist", None, download=False).train) == 4


def test_a_local_copy_is_preferred_to_a_download(tmp_path: Path, cache: Path) -> None:
    npz(tmp_path / "mnist.npz")
    with offline() as client:
        assert len(load("mnist", tmp_path, download=True, client=client).train) == 4
    assert not cache.exists()


def test_a_download_that_cannot_happen(tmp_path: Path, cache: Path) -> None:
    with offline() as client:
        with pytest.raises(EnvironmentFault, match=r"^download\.unreachable: "):
            load("cifar10", None, download=True, client=client)
        with pytest.raises(ConfigError, match=r"^download\.not-offered: "):
            load("pneumoniamnist", tmp_path, download=True, client=client)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_path_is_recognised_by_what_lies_there(tmp_path: Path) -> None:
    assert open_path(npz(tmp_path / "a.npz")).train.class_names == ("0", "1")
    assert len(open_path(idx_folder(tmp_path / "idx")).train) == 4
    assert len(open_path(cifar_archive(tmp_path / "my.tar.gz")).train) == 5
    root = picture_folder(tmp_path / "pictures")
    for split in (open_path(root), load("folder", root, download=False)):
        assert (len(split.train), len(split.test)) == (8, 2)
        assert split.train.class_names == ("cat", "dog")


def test_paths_that_are_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("label,pixels")
    os.mkfifo(tmp_path / "pipe.npz")  # would block if it were opened
    for name, code in (("set.csv", "unrecognised"), ("pipe.npz", "unrecognised"), ("absent", "not-found")):
        with pytest.raises(DataError, match=rf"^reader\.{code}: "):
            open_path(tmp_path / name)


def test_a_path_that_the_system_refuses() -> None:
    path = Path("x" * 5_000)
    with pytest.raises(DataError, match=r"^reader\.unreadable: .*too long"):
        open_path(path)
    with pytest.raises(DataError, match=r"^reader\.unreadable: .*too long"):
        load("mnist", path, download=False)


def test_the_readers_start_without_torch_and_without_an_http_client() -> None:
    lines = (
        "import sys, caltrain.records.readers",
        "print(sorted({'torch', 'httpx', 'pyarrow', 'sklearn'} & set(sys.modules)))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def real(name: str) -> Split:
    default = Path(__file__).parents[3].parent / "shared" / "data"
    root = Path(os.environ.get("CALTRAIN_DATA", default))
    if not (root / name).is_dir():
        pytest.skip(f"{name} is not in {root}; set CALTRAIN_DATA")
    if name == "cifar10":
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    return load(name, root, download=False)


@pytest.mark.data
def test_real_mnist() -> None:
    split = real("mnist")
    assert split.train.images.shape == (60_000, 1, 28, 28)
    assert split.test.images.shape == (10_000, 1, 28, 28)
    assert np.bincount(split.train.labels)[:3].tolist() == [5_923, 6_742, 5_958]
    # Digests of the unpacked official files, after their idx headers were taken off.
    raw = b"\0\0\x08\3" + struct.pack(">3I", 60_000, 28, 28) + split.train.images.tobytes()
    assert hashlib.sha256(raw).hexdigest() == "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"


@pytest.mark.data
def test_real_cifar10() -> None:
    split = real("cifar10")
    assert split.train.images.shape == (50_000, 3, 32, 32)
    assert split.train.class_names == CIFAR10_CLASSES
    assert np.bincount(split.test.labels).tolist() == [1_000] * 10
    assert split.train.labels[:5].tolist() == [6, 9, 9, 4, 1]  # the original order: frog, truck, truck, ...
    assert split.train.images.mean() == pytest.approx(120.7, abs=1)


@pytest.mark.data
def test_real_pneumoniamnist() -> None:
    split = real("pneumoniamnist")
    assert split.train.images.shape == (4_708, 1, 28, 28)
    assert np.bincount(split.test.labels).tolist() == [234, 390]
    assert split.test.class_names == ("normal", "pneumonia")


@pytest.mark.data
def test_real_arrays_are_those_that_numpy_reads() -> None:
    split = real("mnist")
    default = Path(__file__).parents[3].parent / "shared" / "data"
    path = Path(os.environ.get("CALTRAIN_DATA", default)) / "mnist" / "mnist.npz"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    with np.load(path, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["x_test"], split.test.images[:, 0])
        assert np.array_equal(arrays["y_train"], read_npz(path).train.labels)


def test_the_names_are_what_the_interface_offers() -> None:
    assert NAMES == ("digits", "mnist", "cifar10", "pneumoniamnist", "folder")
