"""Parquet tables of encoded images, as data hubs publish them. Needs the extra `parquet`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caltrain.errors import ConfigError
from caltrain.records.readers import bounds
from caltrain.records.readers.dataset import Split, build_split
from caltrain.records.readers.faults import (
    class_names_differ,
    malformed,
    missing_part,
    not_found,
    too_large,
    wrong_kind,
)
from caltrain.records.readers.files import readable
from caltrain.records.readers.pictures import decode_images

_STEP = "read parquet"
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels")
_BATCH = 256  # rows in memory at a time, still encoded
_OF = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.parquet")


@dataclass(frozen=True)
class _Table:
    """One open file, with the columns that matter."""

    path: Path
    file: Any
    image: str
    packed: bool  # the image column is a struct with a field `bytes`
    label: str
    class_names: tuple[str, ...] | None


def is_parquet_folder(folder: Path) -> bool:
    """Whether both parts are there, each as one file or in shards."""
    return all(_shards(folder, part) for part in ("train", "test"))


def read_parquet(folder: Path, *, class_names: tuple[str, ...] | None = None) -> Split:
    """Read `train.parquet` and `test.parquet`, or shards `train-*.parquet` and `test-*.parquet`.

    Images are JPEG or PNG in a column `image` or `img`, binary or a struct with `bytes`; labels are
    integers in `label` or `labels`; the schema's metadata may name the `classes`, comma separated.
    Raises ConfigError without pyarrow, DataError for anything else.
    """
    pyarrow, parquet = _libraries()
    with _arrow_errors(pyarrow, folder):
        train, test = ([_open(p, pyarrow, parquet) for p in _whole(folder, part)] for part in ("train", "test"))
        names = _one_naming([table.class_names for table in train + test], class_names, folder)
        return build_split(_read(train), _read(test), class_names=names)


def _libraries() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "reader.extra-missing",
            "Parquet files need pyarrow, which is not installed",
            step=_STEP,
            fix="Run: pip install 'caltrain[parquet]'",
        ) from error


@contextmanager
def _arrow_errors(pyarrow: Any, folder: Path) -> Iterator[None]:
    with readable(folder, step=_STEP):
        try:
            yield
        except (pyarrow.ArrowException, ValueError) as error:
            raise malformed(f"{folder} holds no sound Parquet: {str(error)[:300]}", step=_STEP) from error


def _shards(folder: Path, part: str) -> list[Path]:
    single = folder / f"{part}.parquet"
    return [single] if single.is_file() else sorted(folder.glob(f"{part}-*.parquet"))


def _whole(folder: Path, part: str) -> list[Path]:
    paths = _shards(folder, part)
    if not paths:
        raise not_found(f"{folder} has no {part}.parquet and no {part}-*.parquet", step=_STEP)
    if len(paths) > bounds.MAX_PARTS:
        raise too_large(f"{folder} has {len(paths)} shards of {part}", step=_STEP)
    announced = {int(match[2]) for path in paths if (match := _OF.search(path.name))}
    if announced and announced != {len(paths)}:  # else a download that stopped would pass as a smaller set
        raise not_found(f"{folder} has {len(paths)} shards of {part}, not all", step=_STEP, fix="Get the others.")
    return paths


def _open(path: Path, pyarrow: Any, parquet: Any) -> _Table:
    file = parquet.ParquetFile(path)
    groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    if file.metadata.num_rows > bounds.MAX_RECORDS or max(groups, default=0) > bounds.MAX_ARRAY_BYTES:
        raise too_large(f"{path} has {file.metadata.num_rows} rows, groups of {groups[:4]} bytes", step=_STEP)
    schema = file.schema_arrow
    image, label = (_column(schema, names, path) for names in (_IMAGE_COLUMNS, _LABEL_COLUMNS))
    if not pyarrow.types.is_integer(schema.field(label).type):
        raise wrong_kind(f"{path}: column {label} is {schema.field(label).type}", step=_STEP)
    kind = schema.field(image).type
    packed = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    content = kind.field("bytes").type if packed else kind
    if not (pyarrow.types.is_binary(content) or pyarrow.types.is_large_binary(content)):
        raise wrong_kind(f"{path}: column {image} is {kind}, not encoded images", step=_STEP)
    return _Table(path, file, image, packed, label, _class_names(schema.metadata, path))


def _column(schema: Any, names: tuple[str, ...], path: Path) -> str:
    found = [name for name in names if schema.get_field_index(name) >= 0]
    if len(found) != 1:
        what = f"{path} has the columns {schema.names[:12]}"
        raise missing_part(what, step=_STEP, fix=f"Exactly one must be called {' or '.join(names)}.")
    return found[0]


def _class_names(metadata: dict[bytes, bytes] | None, path: Path) -> tuple[str, ...] | None:
    raw = (metadata or {}).get(b"classes")
    if raw is None:
        return None
    try:
        return tuple(raw.decode().split(","))
    except UnicodeDecodeError as error:
        raise malformed(f"{path}: the class names are not UTF-8", step=_STEP) from error


def _one_naming(
    stated: list[tuple[str, ...] | None], given: tuple[str, ...] | None, folder: Path
) -> tuple[str, ...] | None:
    """The class names that all files, and the caller, agree on."""
    namings = {names for names in (*stated, given) if names is not None}
    if len(namings) > 1:
        what = f"{folder}: the files name different classes, or not those of the set that was asked for"
        raise class_names_differ(what, step=_STEP)
    return next(iter(namings), None)


def _read(tables: list[_Table]) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
    count = sum(table.file.metadata.num_rows for table in tables)
    labels = np.concatenate([_labels(table) for table in tables])
    return decode_images((blob for table in tables for blob in _blobs(table)), count), labels


def _labels(table: _Table) -> NDArray[np.generic]:
    column = table.file.read(columns=[table.label]).column(0)
    if column.null_count:
        raise malformed(f"{table.path}: {column.null_count} rows without a label", step=_STEP)
    labels: NDArray[np.generic] = column.to_numpy()
    return labels


def _blobs(table: _Table) -> Iterator[tuple[str, bytes]]:
    wanted = f"{table.image}.bytes" if table.packed else table.image
    row = 0
    for batch in table.file.iter_batches(batch_size=_BATCH, columns=[wanted]):
        column = batch.column(0)
        for blob in (column.field("bytes") if table.packed else column).to_pylist():
            if blob is None:
                raise malformed(f"{table.path}: row {row} has no image", step=_STEP)
            yield f"{table.path}, row {row}", blob
            row += 1
