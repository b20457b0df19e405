"""Seal a data set into shards, on the contributor's side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltrain.errors import DataError, IntegrityError
from caltrain.participant.files import whole_file
from caltrain.participant.identity import Identity
from caltrain.plan import MAX_SHARDS, ManifestShard
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES
from caltrain.records.readers import Dataset
from caltrain.records.schema import DataSchema, decode_record, encode_record

DEFAULT_SHARD_RECORDS = 8192


@dataclass(frozen=True)
class SealedData:
    """What sealing left: headers in order, and which input rows each shard holds (leaf i is row `rows[i]`)."""

    headers: tuple[shards.ShardHeader, ...]
    rows: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]


def seal_records(
    identity: Identity,
    schema: DataSchema,
    images: NDArray[np.generic],
    labels: NDArray[np.int64],
    *,
    drop_duplicates: bool = False,
    shard_records: int = DEFAULT_SHARD_RECORDS,
    held_out: bool = False,
) -> SealedData:
    """Write shards of (N, C, H, W) images and (N,) integer labels into the party's folder: all of them, or none.

    Records that are `held_out` are not trained on: the enclave measures the model on them after each epoch.

    Raises DataError before anything is written, EnvironmentFault.
    """
    if len(images) != len(labels):
        raise DataError(
            "seal.lengths", f"{len(images)} images, {len(labels)} labels", step="seal", fix="Give one label an image."
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            "seal.labels",
            f"labels of {labels.shape} {labels.dtype}, not one integer a record",
            step="seal",
            fix="Give labels as numbers of classes.",
        )
    encoded = [encode_record(schema, image, int(label)) for image, label in zip(images, labels, strict=True)]
    kept, dropped = _distinct(encoded, _sealed_keys(identity, schema), drop=drop_duplicates)
    groups = [tuple(kept[i : i + shard_records]) for i in range(0, len(kept), shard_records)]
    if not groups or len(groups) > MAX_SHARDS:
        raise DataError(
            "seal.count", f"{len(kept)} records make {len(groups)} shards", step="seal", fix=f"Make 1 to {MAX_SHARDS}."
        )
    named = [(os.urandom(16).hex(), group) for group in groups]
    try:
        headers = tuple(
            _write(_place(identity, name, held_out=held_out), identity, schema, [encoded[row] for row in group])
            for name, group in named
        )
    except BaseException:  # Ctrl-C as well: a part of the records must not be taken for all of them
        for name, _ in named:
            with suppress(OSError):
                shard_path(identity, name).unlink()
        raise
    return SealedData(headers, tuple(groups), tuple(dropped))


def plan_labels(part: Dataset, schema: DataSchema) -> NDArray[np.int64]:
    """Labels (N,) of a data set in the plan's numbering: by class name, or as they are where classes have no names.

    A party's own numbering means nothing to the others. Raises DataError `seal.unknown-class`.
    """
    numbered = part.class_names == tuple(str(i) for i in range(len(part.class_names)))
    unknown = sorted(set(part.class_names) - set(schema.classes))
    if unknown and numbered and len(part.class_names) <= len(schema.classes):
        return part.labels
    if unknown:
        raise DataError(
            "seal.unknown-class",
            f"the data have classes that the plan does not: {unknown[:5]}",
            step="seal",
            fix="Rename the classes, or agree on a plan that has them.",
        )
    table = np.array([schema.classes.index(name) for name in part.class_names], np.int64)
    return table[part.labels]


def _sealed_keys(identity: Identity, schema: DataSchema) -> dict[bytes, int]:
    """Keys of the records that this party has sealed before: the enclave takes each of a party's records once."""
    seen: dict[bytes, int] = {}
    for path, _ in _shard_files(identity):
        header, step = read_own_header(identity, path), f"read {path.name}"
        if header.schema != schema.digest():
            continue
        with path.open("rb") as file:
            shards.read_header(file, step=step)
            chunks = shards.read_chunks(file)
            frames = shards.open_frames(header, identity.data_key, chunks, schema=schema, step=step)
            seen |= {shards.record_key(record): -1 for _, _, record in frames}
    return seen


def _distinct(encoded: list[bytes], seen: dict[bytes, int], *, drop: bool) -> tuple[list[int], list[int]]:
    kept: list[int] = []
    dropped: list[int] = []
    for row, record in enumerate(encoded):
        first = seen.setdefault(shards.record_key(record), row)
        (kept if first == row else dropped).append(row)
    if dropped and not drop:
        raise DataError(
            "seal.duplicate-record",
            f"{len(dropped)} records repeat others, or are sealed already; the first is row {dropped[0]}",
            step="seal",
            fix="Remove them, or seal with --drop-duplicates.",
        )
    return kept, dropped


def _write(path: Path, identity: Identity, schema: DataSchema, records: list[bytes]) -> shards.ShardHeader:
    with whole_file(path) as out:
        return shards.write_shard(
            out,
            signer=identity.signer,
            data_key=identity.data_key,
            contributor=identity.name,
            shard_id=path.stem,
            schema=schema,
            records=records,
            salts=(os.urandom(SALT_BYTES) for _ in records),
        )


def shard_path(identity: Identity, shard_id: str) -> Path:
    """Where the party keeps a sealed shard."""
    held_out = _place(identity, shard_id, held_out=True)
    return held_out if held_out.is_file() else _place(identity, shard_id, held_out=False)


def _place(identity: Identity, shard_id: str, *, held_out: bool) -> Path:
    # The folder says which it is, so that a shard cannot be there and be taken for the other kind.
    return identity.folder / ("held-out" if held_out else "shards") / f"{shard_id}.shard"


def _shard_files(identity: Identity) -> list[tuple[Path, bool]]:
    """All shard files in a fixed order, those to train on first, and whether each is held out."""
    folders = ((identity.folder / "shards", False), (identity.folder / "held-out", True))
    return [(path, held_out) for folder, held_out in folders for path in sorted(folder.glob("*.shard"))]


def own_shards(identity: Identity) -> tuple[ManifestShard, ...]:
    """The party's sealed shards in a fixed order, each header verified. Raises DataError when there are none."""
    found = []
    for path, held_out in _shard_files(identity):
        header = read_own_header(identity, path)
        entry = ManifestShard(shard=header.shard, root=header.root, records=header.records, held_out=held_out)
        found.append(entry)
    if all(entry.held_out for entry in found):
        raise DataError(
            "seal.nothing",
            f"{identity.name} has sealed nothing to train on yet",
            step="list shards",
            fix="Run `caltrain party seal`.",
        )
    return tuple(found)


def own_records(identity: Identity, schema: DataSchema) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """Elements (N, C, H, W) and labels (N,) of all that the party has sealed to train on. Raises IntegrityError."""
    elements, labels = [], []
    for path in (path for path, held_out in _shard_files(identity) if not held_out):
        for pixels, label in _opened(identity, schema, path):
            elements.append(pixels)
            labels.append(label)
    return np.array(elements, schema.numpy_dtype).reshape(-1, *schema.shape), np.array(labels, np.int64)


def own_labels(identity: Identity, schema: DataSchema, names: Iterable[str]) -> dict[str, NDArray[np.int64]]:
    """By shard the labels (n,) of its records, by leaf; nothing of a shard that the party does not keep any more.

    Raises IntegrityError for one that is damaged, or of another schema.
    """
    paths = {name: shard_path(identity, name) for name in names}
    return {
        name: np.array([label for _, label in _opened(identity, schema, path)], np.int64)
        for name, path in paths.items()
        if path.is_file()
    }


def _opened(identity: Identity, schema: DataSchema, path: Path) -> Iterator[tuple[NDArray[np.generic], int]]:
    """The records of one of our shards, by leaf: elements (C, H, W) and label."""
    header, step = read_own_header(identity, path), f"read {path.name}"
    with path.open("rb") as file:
        shards.read_header(file, step=step)
        frames = shards.open_frames(header, identity.data_key, shards.read_chunks(file), schema=schema, step=step)
        for _, _, record in frames:
            yield decode_record(schema, record)


def read_own_header(identity: Identity, path: Path) -> shards.ShardHeader:
    """Verified header of one of our shard files. Raises IntegrityError."""
    step = f"read {path.name}"
    with path.open("rb") as file:
        envelope, _ = shards.read_header(file, step=step)
    header = shards.open_header(envelope, contributor=identity.name, public_key=identity.signer.public, step=step)
    if header.shard != path.stem:
        raise IntegrityError(
            "seal.misnamed", f"{path} holds the shard {header.shard}", step=step, fix="Give it that name, or remove it."
        )
    return header
