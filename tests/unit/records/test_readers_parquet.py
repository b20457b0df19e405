"""The Parquet reader, on tables such as data hubs publish."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from caltrain.errors import ConfigError, DataError
from caltrain.records.readers import bounds, read_parquet
from caltrain.records.readers.parquet import is_parquet_folder

pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
pq = pytest.importorskip("pyarrow.parquet")

PIXELS: NDArray[np.uint8] = np.random.default_rng(2).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


BLOBS: list[bytes | None] = [encode(pixels) for pixels in PIXELS]


def table(
    *,
    blobs: list[bytes | None] = BLOBS,
    labels: Any = (0, 1, 2, 0, 1, 2),
    image: str = "img",
    label: str = "label",
    classes: bytes | None = b"cat,dog,frog",
    struct: bool = True,
) -> Any:
    cells = [blob and {"bytes": blob, "path": "somewhere.png"} for blob in blobs] if struct else blobs
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    made = pa.table({image: pa.array(cells, type=kind), label: pa.array(labels)})
    return made if classes is None else made.replace_schema_metadata({b"classes": classes})


def write(folder: Path, train: Any = None, test: Any = None) -> Path:
    for part, rows in (("train", train), ("test", test)):
        pq.write_table(rows if rows is not None else table(), folder / f"{part}.parquet", row_group_size=4)
    return folder


def refuse(folder: Path, code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: "):
        read_parquet(folder)


def test_reads_structs_of_encoded_images_with_class_names(tmp_path: Path) -> None:
    split = read_parquet(write(tmp_path, test=table(blobs=BLOBS[:2], labels=[2, 1])))
    assert np.array_equal(split.train.images, PIXELS.transpose(0, 3, 1, 2))
    assert split.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert split.test.labels.tolist() == [2, 1]
    assert split.train.class_names == ("cat", "dog", "frog")


def test_reads_plain_columns_under_the_other_names(tmp_path: Path) -> None:
    rows = table(struct=False, image="image", label="labels", classes=None)
    split = read_parquet(write(tmp_path, rows, rows))
    assert np.array_equal(split.test.images, PIXELS.transpose(0, 3, 1, 2))
    assert split.train.class_names == ("0", "1", "2")
    assert read_parquet(tmp_path, class_names=("a", "b", "c")).train.class_names == ("a", "b", "c")


def test_shards_are_read_in_the_order_of_their_names_and_all_must_be_there(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train.parquet").unlink()
    assert not is_parquet_folder(tmp_path)
    for i, rows in enumerate((slice(4, 6), slice(0, 4))):
        shard = table(blobs=BLOBS[rows], labels=[0, 1, 2, 0, 1, 2][rows])
        pq.write_table(shard, tmp_path / f"train-{i:05}-of-00002.parquet")
    assert is_parquet_folder(tmp_path)
    assert read_parquet(tmp_path).train.labels.tolist() == [1, 2, 0, 1, 2, 0]
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    refuse(tmp_path, "reader.not-found")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"image": "picture"}, "reader.missing-part"),
        ({"label": "class"}, "reader.missing-part"),
        ({"labels": [0.0] * 6}, "reader.kind"),
        ({"labels": ["cat"] * 6}, "reader.kind"),
        ({"labels": [0, 1, 2, 0, 1, None]}, "reader.malformed"),
        ({"labels": [0, 1, 2, 0, 1, 3]}, "reader.label-range"),
        ({"labels": [0, 1, 2, 0, 1, -1]}, "reader.label-range"),
        ({"blobs": [*BLOBS[:5], None]}, "reader.malformed"),
        ({"blobs": [*BLOBS[:5], None], "struct": False}, "reader.malformed"),
        ({"blobs": [*BLOBS[:5], b"no picture"]}, "reader.undecodable"),
        ({"blobs": [*BLOBS[:5], encode(PIXELS[0, :3])]}, "reader.mixed-shapes"),
        ({"blobs": [], "labels": pa.array([], pa.int64())}, "reader.empty"),
        ({"classes": b"cat,dog"}, "reader.class-names-differ"),
        ({"classes": b"dog,cat,frog"}, "reader.class-names-differ"),
        ({"classes": b"\xff,b,c"}, "reader.malformed"),
    ],
)
def test_tables_that_hold_no_labelled_images_are_refused(tmp_path: Path, options: dict[str, Any], code: str) -> None:
    refuse(write(tmp_path, train=table(**options)), code)


def test_columns_of_other_types_and_ambiguous_ones_are_refused(tmp_path: Path) -> None:
    text = pa.table({"img": ["a.png"] * 2, "label": [0, 1]})
    refuse(write(tmp_path, train=text), "reader.kind")
    refuse(write(tmp_path, train=table().append_column("image", pa.array(BLOBS))), "reader.missing-part")


def test_class_names_that_contradict_the_caller_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^reader\.class-names-differ: "):
        read_parquet(write(tmp_path), class_names=("dog", "cat", "frog"))


@pytest.mark.parametrize(("bound", "value"), [("MAX_RECORDS", 5), ("MAX_ARRAY_BYTES", 100)])
def test_tables_over_the_bounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(bounds, bound, value)
    refuse(write(tmp_path), "reader.too-large")


def test_a_crowd_of_shards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_PARTS", 1)
    for name in ("train-a", "train-b", "test"):
        pq.write_table(table(), tmp_path / f"{name}.parquet")
    refuse(tmp_path, "reader.too-large")


def test_truncated_files_and_other_files_are_malformed(tmp_path: Path) -> None:
    raw = (write(tmp_path) / "train.parquet").read_bytes()
    for cut in range(0, len(raw), 97):
        (tmp_path / "train.parquet").write_bytes(raw[:cut])
        refuse(tmp_path, "reader.malformed")


def test_a_damaged_page_is_malformed_or_undecodable(tmp_path: Path) -> None:
    raw = bytearray((write(tmp_path) / "train.parquet").read_bytes())
    raw[4:400] = b"\xff" * 396  # the first row group's pages
    (tmp_path / "train.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"^reader\.(malformed|undecodable): "):
        read_parquet(tmp_path)


def test_an_absent_part_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"^reader\.not-found: .*test\.parquet"):
        read_parquet(tmp_path)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"^reader\.extra-missing: .*pip install 'caltrain\[parquet\]'"):
        read_parquet(tmp_path)
