"""Sealing a data set: everything is checked first, and all shards appear or none does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from caltrain.errors import CaltrainError, DataError, EnvironmentFault, IntegrityError
from caltrain.participant import seal
from caltrain.participant.identity import Identity, create_identity
from caltrain.participant.seal import own_labels, own_records, own_shards, plan_labels, seal_records, shard_path
from caltrain.plan import ManifestShard
from caltrain.records import shard as shards
from caltrain.records.readers import Dataset
from caltrain.records.schema import DataSchema, decode_record
from support.disk import files_end_at, tree
from support.samples import refused

BYTES = DataSchema(shape=(1, 2, 3), classes=("cat", "dog", "owl"))
FLOATS = msgspec.structs.replace(BYTES, dtype="f32")
LABELS = np.array([0, 1, 2, 0, 1, 2, 0])


@pytest.fixture
def alpha(tmp_path: Path) -> Identity:
    """A party that has sealed nothing."""
    return create_identity(tmp_path / "alpha", "alpha")


def images(count: int = 7, schema: DataSchema = BYTES) -> NDArray[Any]:
    """Distinct images."""
    values = np.arange(count * 6).reshape(count, *schema.shape)
    return values.astype(schema.numpy_dtype)


def sealed(alpha: Identity, header: shards.ShardHeader) -> list[tuple[NDArray[np.generic], int]]:
    """The records of a shard, opened."""
    with shard_path(alpha, header.shard).open("rb") as file:
        shards.read_header(file, step="test")
        frames = shards.open_frames(header, alpha.data_key, [file.read()], schema=BYTES, step="test")
        return [decode_record(BYTES, record) for _, _, record in frames]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_every_record_is_in_the_shard_and_leaf_that_is_said(alpha: Identity, size: int) -> None:
    data = images()
    done = seal_records(alpha, BYTES, data, LABELS, shard_records=size)
    assert [row for rows in done.rows for row in rows] == list(range(7))
    assert done.dropped == ()
    for header, rows in zip(done.headers, done.rows, strict=True):
        assert header.records == len(rows) <= size
        for (pixels, label), row in zip(sealed(alpha, header), rows, strict=True):
            assert np.array_equal(pixels, data[row])
            assert label == LABELS[row]
    listed = {ManifestShard(shard=h.shard, root=h.root, records=h.records) for h in done.headers}
    assert set(own_shards(alpha)) == listed
    assert list(own_shards(alpha)) == sorted(listed, key=lambda shard: shard.shard)


def test_the_same_records_are_not_sealed_twice(alpha: Identity) -> None:
    seal_records(alpha, BYTES, images(5), LABELS[:5])
    before = tree(alpha.folder)
    with refused(DataError, "seal.duplicate-record"):
        seal_records(alpha, BYTES, images(), LABELS)
    assert tree(alpha.folder) == before
    more = seal_records(alpha, BYTES, images(), LABELS, drop_duplicates=True)
    assert (more.rows, more.dropped) == (((5, 6),), (0, 1, 2, 3, 4))
    assert sum(shard.records for shard in own_shards(alpha)) == 7


def test_what_was_sealed_for_another_schema_is_no_copy(alpha: Identity) -> None:
    seal_records(alpha, FLOATS, images(schema=FLOATS), LABELS)
    assert seal_records(alpha, BYTES, images(), LABELS).dropped == ()


def test_the_same_records_of_another_party_make_other_shards(alpha: Identity, tmp_path: Path) -> None:
    one = seal_records(alpha, BYTES, images(), LABELS).headers[0]
    other = seal_records(create_identity(tmp_path / "beta", "beta"), BYTES, images(), LABELS).headers[0]
    assert one.shard != other.shard
    assert one.root != other.root


def test_shards_are_for_their_owner_alone(alpha: Identity) -> None:
    header = seal_records(alpha, BYTES, images(), LABELS).headers[0]
    assert shard_path(alpha, header.shard).stat().st_mode & 0o077 == 0


def with_nan() -> NDArray[Any]:
    """Images of which one holds a value that is none."""
    data = images(schema=FLOATS)
    data[5, 0, 1, 1] = np.nan
    return data


REFUSED: dict[str, tuple[DataSchema, NDArray[Any], NDArray[Any], str]] = {
    "a label outside": (BYTES, images(), np.array([0, 1, 2, 0, 1, 2, 3]), "record.label"),
    "a label below": (BYTES, images(), np.array([0, 1, 2, 0, 1, 2, -1]), "record.label"),
    "labels that are no numbers of classes": (BYTES, images(), LABELS.astype(np.float64), "seal.labels"),
    "labels that are true or false": (BYTES, images(), LABELS.astype(bool), "seal.labels"),
    "labels as columns": (BYTES, images(), LABELS[:, None], "seal.labels"),
    "not a number": (FLOATS, with_nan(), LABELS, "record.not-finite"),
    "elements of another type": (BYTES, images(schema=FLOATS), LABELS, "record.dtype"),
    "images of another shape": (BYTES, images().reshape(7, 1, 3, 2), LABELS, "record.shape"),
    "images without channels": (BYTES, images().reshape(7, 2, 3), LABELS, "record.shape"),
    "fewer labels": (BYTES, images(), LABELS[:6], "seal.lengths"),
    "more labels": (BYTES, images(6), LABELS, "seal.lengths"),
    "no labels": (BYTES, images(), LABELS[:0], "seal.lengths"),
    "nothing": (BYTES, images(0), LABELS[:0], "seal.count"),
    "a copy": (BYTES, images()[[0, 1, 2, 3, 4, 5, 0]], LABELS[[0, 1, 2, 3, 4, 5, 0]], "seal.duplicate-record"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_records_that_do_not_fit_seal_nothing(alpha: Identity, what: str) -> None:
    schema, data, labels, code = REFUSED[what]
    before = tree(alpha.folder)
    with refused(DataError, code):
        seal_records(alpha, schema, data, labels, shard_records=2)
    assert tree(alpha.folder) == before


def test_copies_are_left_out_where_that_is_asked_for(alpha: Identity) -> None:
    rows = [0, 1, 0, 2, 1]
    done = seal_records(alpha, BYTES, images()[rows], LABELS[rows], drop_duplicates=True)
    assert done.rows == ((0, 1, 3),)
    assert done.dropped == (2, 4)
    assert done.headers[0].records == 3


def test_the_same_image_under_two_labels_is_no_copy(alpha: Identity) -> None:
    done = seal_records(alpha, BYTES, images()[[0, 0]], np.array([0, 1]))
    assert done.headers[0].records == 2


def test_more_shards_than_a_manifest_lists_are_not_made(alpha: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "MAX_SHARDS", 3)
    before = tree(alpha.folder)
    with refused(DataError, "seal.count"):
        seal_records(alpha, BYTES, images(), LABELS, shard_records=2)
    assert tree(alpha.folder) == before
    assert len(seal_records(alpha, BYTES, images(6), LABELS[:6], shard_records=2).headers) == 3


def broken_after(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealing fails in the middle of a shard, after `count` whole ones."""
    left = [count]
    write = shards.write_shard

    def fails(out: Any, **given: Any) -> shards.ShardHeader:
        if left[0] == 0:
            out.write(b"half a header")
            out.flush()
            raise error
        left[0] -= 1
        return write(out, **given)

    monkeypatch.setattr(shards, "write_shard", fails)


@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "broken"), DataError("a.b", "c", step="d", fix="e")])
def test_whatever_interrupts_sealing_leaves_no_shard(
    alpha: Identity, monkeypatch: pytest.MonkeyPatch, whole: int, error: BaseException
) -> None:
    before = tree(alpha.folder)
    broken_after(whole, error, monkeypatch)
    with pytest.raises((KeyboardInterrupt, CaltrainError)):
        seal_records(alpha, BYTES, images(), LABELS, shard_records=2)
    assert tree(alpha.folder) == before
    with refused(DataError, "seal.nothing"):
        own_shards(alpha)


def test_a_disk_that_runs_full_leaves_the_shards_that_were_there(alpha: Identity) -> None:
    seal_records(alpha, BYTES, images(), LABELS)
    before = tree(alpha.folder)
    with files_end_at(300), refused(EnvironmentFault, "party.not-written"):
        seal_records(alpha, BYTES, images() + 100, LABELS)
    assert tree(alpha.folder) == before


def test_a_folder_that_cannot_hold_shards_is_named(alpha: Identity) -> None:
    (alpha.folder / "shards").write_bytes(b"")
    with refused(EnvironmentFault, "party.not-written"):
        seal_records(alpha, BYTES, images(), LABELS)


def test_a_party_without_shards_is_told_so(alpha: Identity) -> None:
    with refused(DataError, "seal.nothing"):
        own_shards(alpha)


def test_own_records_are_those_to_train_on(alpha: Identity) -> None:
    seal_records(alpha, BYTES, images(), LABELS, shard_records=3)
    seal_records(alpha, BYTES, images() + 100, LABELS, held_out=True)
    elements, labels = own_records(alpha, BYTES)
    found = {(pixels.tobytes(), int(label)) for pixels, label in zip(elements, labels, strict=True)}
    assert found == {(pixels.tobytes(), label) for pixels, label in zip(images(), LABELS.tolist(), strict=True)}
    assert (elements.dtype.name, labels.dtype.name) == ("uint8", "int64")


def test_a_party_may_have_no_record_to_train_on(alpha: Identity) -> None:
    seal_records(alpha, BYTES, images(), LABELS, held_out=True)
    elements, labels = own_records(alpha, BYTES)
    assert (elements.shape, labels.shape) == ((0, 1, 2, 3), (0,))


def test_own_labels_are_by_shard_and_leaf_of_the_shards_that_are_kept(alpha: Identity) -> None:
    sealed = seal_records(alpha, BYTES, images(), LABELS, shard_records=3)
    first, second, third = (header.shard for header in sealed.headers)
    shard_path(alpha, second).unlink()
    found = own_labels(alpha, BYTES, [third, second, first])
    assert {name: labels.tolist() for name, labels in found.items()} == {first: [0, 1, 2], third: [0]}
    assert list(own_labels(alpha, BYTES, [first])) == [first]
    with refused(IntegrityError, "shard.damaged"):
        own_labels(alpha, FLOATS, [first])


def test_a_shard_under_another_name_is_refused(alpha: Identity) -> None:
    header = seal_records(alpha, BYTES, images(), LABELS).headers[0]
    path = shard_path(alpha, header.shard)
    path.with_name("copy.shard").write_bytes(path.read_bytes())
    with refused(IntegrityError, "seal.misnamed"):
        own_shards(alpha)


@pytest.mark.parametrize(("at", "code"), [(3, "shard.damaged"), (19, "shard.damaged"), (100, "signature.invalid")])
def test_a_damaged_shard_of_ours_is_not_offered(alpha: Identity, at: int, code: str) -> None:
    path = shard_path(alpha, seal_records(alpha, BYTES, images(), LABELS).headers[0].shard)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError) as caught:
        own_shards(alpha)
    assert caught.value.code in {code, "envelope.malformed"}


def test_a_shard_of_another_party_is_not_offered(alpha: Identity, tmp_path: Path) -> None:
    beta = create_identity(tmp_path / "beta", "beta")
    header = seal_records(beta, BYTES, images(), LABELS).headers[0]
    (alpha.folder / "shards").mkdir()
    shard_path(alpha, header.shard).write_bytes(shard_path(beta, header.shard).read_bytes())
    with refused(IntegrityError, "signature.invalid"):
        own_shards(alpha)


def test_what_is_half_written_is_not_taken_for_a_shard(alpha: Identity) -> None:
    (alpha.folder / "shards").mkdir()
    (alpha.folder / "shards" / f".{os.urandom(16).hex()}.shard.part").write_bytes(b"half")
    with refused(DataError, "seal.nothing"):
        own_shards(alpha)


def dataset(names: tuple[str, ...], labels: list[int]) -> Dataset:
    """A data set with these class names."""
    return Dataset(images=images(len(labels)), labels=np.array(labels), class_names=names)


@pytest.mark.parametrize(
    ("names", "labels", "classes", "expected"),
    [
        (("owl", "cat"), [0, 1, 0], ("cat", "dog", "owl"), [2, 0, 2]),
        (("0", "1", "2"), [2, 0], ("cat", "dog", "owl"), [2, 0]),
        (("0", "1"), [1, 0], ("1", "0"), [0, 1]),
        (("cat", "dog", "owl"), [1], ("cat", "dog", "owl"), [1]),
    ],
)
def test_labels_take_the_plans_numbers(
    names: tuple[str, ...], labels: list[int], classes: tuple[str, ...], expected: list[int]
) -> None:
    schema = msgspec.structs.replace(BYTES, classes=classes)
    assert plan_labels(dataset(names, labels), schema).tolist() == expected


@pytest.mark.parametrize("names", [("cat", "emu"), ("0", "1", "2", "3"), ("0", "2")])
def test_a_class_that_the_plan_does_not_have_is_refused(names: tuple[str, ...]) -> None:
    with refused(DataError, "seal.unknown-class"):
        plan_labels(dataset(names, [0]), BYTES)
