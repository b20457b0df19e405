"""The data schema and the canonical bytes of a record."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.records import schema as schemas
from caltrain.records.schema import DataSchema, check_schema, decode_record, encode_record
from support.samples import BYTES, FLOATS, flips, quick, refused

U8: NDArray[np.uint8] = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
F32: NDArray[np.float32] = np.array([0.0, -0.0, 1.5, 1e-45], dtype=np.float32).reshape(2, 1, 2)


def test_known_bytes_of_a_record() -> None:
    """Magic, element type, number of dimensions, shape, label (little endian), then the elements."""
    shape_and_label = "01000000" + "02000000" + "03000000" + "02000000"
    assert encode_record(BYTES, U8, 2).hex() == b"CTR1".hex() + "01" + "03" + shape_and_label + "000102030405"
    shape_and_label = "02000000" + "01000000" + "02000000" + "01000000"
    elements = "00000000" + "00000080" + "0000c03f" + "01000000"
    assert encode_record(FLOATS, F32, 1).hex() == b"CTR1".hex() + "02" + "03" + shape_and_label + elements


def test_known_digests_of_schemas() -> None:
    assert BYTES.digest() == "sha256:61c3d1e0af68703d70c067d389dc8b8feb7bb739a80e14843efc08345143cd94"
    assert FLOATS.digest() == "sha256:3c9ff29deb76db3ce290c3224e2c2dc6c3232516bf717d91407508071538d0bb"


def test_a_schema_digest_covers_what_decides_the_bytes() -> None:
    def other(**changes: Any) -> str:
        return msgspec.structs.replace(BYTES, **changes).digest()

    assert other(mean=(0.1,), std=(0.2,)) == BYTES.digest()
    changed = {other(shape=(1, 3, 2)), other(dtype="f32"), other(classes=("dog", "cat", "owl"))}
    assert len(changed | {BYTES.digest()}) == 4


@st.composite
def schema_and_record(draw: st.DrawFn) -> tuple[DataSchema, NDArray[np.generic], int]:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    classes = tuple(f"class {i}" for i in range(draw(st.integers(2, 5))))
    schema = DataSchema(shape=shape, dtype=draw(st.sampled_from(["u8", "f32"])), classes=classes)
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    elements = finite if schema.dtype == "f32" else None
    pixels = draw(hnp.arrays(schema.numpy_dtype, shape, elements=elements))
    return schema, pixels, draw(st.integers(0, len(classes) - 1))


@quick
@given(schema_and_record())
def test_round_trip(record: tuple[DataSchema, NDArray[np.generic], int]) -> None:
    schema, pixels, label = record
    raw = encode_record(schema, pixels, label)
    assert len(raw) == schema.record_bytes
    decoded, decoded_label = decode_record(schema, raw)
    assert decoded.dtype == schema.numpy_dtype
    assert (decoded.tobytes(), decoded.shape, decoded_label) == (pixels.tobytes(), schema.shape, label)
    assert encode_record(schema, decoded, decoded_label) == raw


def test_memory_layout_does_not_change_the_bytes() -> None:
    strided = np.repeat(U8, 2, axis=2)[:, :, ::2]
    assert not strided.flags.c_contiguous
    assert encode_record(BYTES, strided, 0) == encode_record(BYTES, U8, 0)
    assert encode_record(BYTES, np.asfortranarray(U8), 0) == encode_record(BYTES, U8, 0)


ENCODE: dict[str, tuple[DataSchema, NDArray[Any], int, str]] = {
    "transposed": (BYTES, U8.reshape(1, 3, 2), 0, "record.shape"),
    "a dimension less": (BYTES, U8[0], 0, "record.shape"),
    "empty": (BYTES, U8[:0], 0, "record.shape"),
    "signed bytes": (BYTES, U8.astype(np.int8), 0, "record.dtype"),
    "floats for bytes": (BYTES, U8.astype("<f4"), 0, "record.dtype"),
    "doubles": (FLOATS, F32.astype("<f8"), 0, "record.dtype"),
    "big endian": (FLOATS, F32.astype(">f4"), 0, "record.dtype"),
    "label below": (BYTES, U8, -1, "record.label"),
    "label at the number of classes": (BYTES, U8, 3, "record.label"),
    "label beyond 32 bits": (BYTES, U8, 1 << 40, "record.label"),
    "nan": (FLOATS, np.full_like(F32, np.nan), 0, "record.not-finite"),
    "infinity": (FLOATS, np.full_like(F32, -np.inf), 0, "record.not-finite"),
}


@pytest.mark.parametrize(("schema", "pixels", "label", "code"), ENCODE.values(), ids=ENCODE)
def test_a_record_outside_the_schema_is_not_encoded(
    schema: DataSchema, pixels: NDArray[Any], label: int, code: str
) -> None:
    with refused(DataError, code):
        encode_record(schema, pixels, label)


@pytest.mark.parametrize("schema", [BYTES, FLOATS], ids=["u8", "f32"])
def test_another_length_is_not_decoded(schema: DataSchema) -> None:
    raw = encode_record(schema, np.zeros(schema.shape, schema.numpy_dtype), 1)
    for wrong in (*(raw[:length] for length in range(len(raw))), raw + b"\0"):
        with refused(DataError, "record.length"):
            decode_record(schema, wrong)


HEAD = 4 + 2 + 12


def test_every_flipped_bit_of_the_head_is_refused() -> None:
    for changed in flips(encode_record(BYTES, U8, 2), 0, HEAD):
        with refused(DataError, "record.shape"):
            decode_record(BYTES, changed)


def test_a_record_of_another_schema_is_not_decoded() -> None:
    same_length = DataSchema(shape=(1, 3, 2), classes=BYTES.classes)
    with refused(DataError, "record.shape"):
        decode_record(same_length, encode_record(BYTES, U8, 2))
    bytes_as_floats = DataSchema(shape=(1, 2, 8), classes=BYTES.classes)
    floats = DataSchema(shape=(1, 2, 2), dtype="f32", classes=BYTES.classes)
    with refused(DataError, "record.shape"):
        decode_record(floats, encode_record(bytes_as_floats, np.zeros((1, 2, 8), np.uint8), 0))


@pytest.mark.parametrize("label", [3, 4, 255, (1 << 32) - 1])
def test_a_label_outside_the_classes_is_not_decoded(label: int) -> None:
    raw = encode_record(BYTES, U8, 2)
    with refused(DataError, "record.label"):
        decode_record(BYTES, raw[:HEAD] + struct.pack("<I", label) + raw[HEAD + 4 :])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_not_decoded(value: float) -> None:
    raw = encode_record(FLOATS, F32, 0)
    with refused(DataError, "record.not-finite"):
        decode_record(FLOATS, raw[:-4] + struct.pack("<f", value))


@quick
@given(st.binary(max_size=40))
def test_random_bytes_decode_to_themselves_or_are_refused(raw: bytes) -> None:
    try:
        pixels, label = decode_record(FLOATS, raw)
    except DataError:
        return
    assert encode_record(FLOATS, pixels, label) == raw


def schema(**changes: Any) -> DataSchema:
    fields: dict[str, Any] = {"shape": (3, 4, 5), "classes": ("a", "b")}
    return msgspec.convert(fields | changes, DataSchema)


GOOD: list[dict[str, Any]] = [
    {},
    {"mean": (0.1, 0.2, 0.3), "std": (1, 1e-9, 2)},
    {"mean": (-5.0,), "std": (0.1, 0.2, 0.3)},
    {"shape": (1, 1024, 1024), "dtype": "u8"},
]


@pytest.mark.parametrize("changes", GOOD, ids=repr)
def test_a_schema_of_records_is_accepted(changes: dict[str, Any]) -> None:
    check_schema(schema(**changes))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too large": ({"shape": (1024, 1024, 4)}, "schema.too-large"),
    "too large as floats": ({"shape": (1, 1024, 1024), "dtype": "f32"}, "schema.too-large"),
    "same class twice": ({"classes": ("a", "b", "a")}, "schema.duplicate-class"),
    "two means for three channels": ({"mean": (0.5, 0.5)}, "schema.normalisation"),
    "four stds for three channels": ({"std": (0.5,) * 4}, "schema.normalisation"),
    "mean not finite": ({"mean": (0.5, 0.5, float("nan"))}, "schema.normalisation"),
    "std infinite": ({"std": (float("inf"),)}, "schema.normalisation"),
    "std nan": ({"std": (float("nan"),)}, "schema.normalisation"),
    "std zero": ({"std": (0.5, 0.0, 0.5)}, "schema.normalisation"),
    "std negative": ({"std": (-1.0,)}, "schema.normalisation"),
}


@pytest.mark.parametrize(("changes", "code"), BAD.values(), ids=BAD)
def test_a_schema_that_cannot_describe_records_is_refused(changes: dict[str, Any], code: str) -> None:
    with refused(DataError, code):
        check_schema(schema(**changes))


def test_the_largest_record_is_accepted_and_one_byte_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "MAX_RECORD_BYTES", schema().record_bytes)
    check_schema(schema())
    monkeypatch.setattr(schemas, "MAX_RECORD_BYTES", schema().record_bytes - 1)
    with refused(DataError, "schema.too-large"):
        check_schema(schema())


MALFORMED: dict[str, dict[str, Any]] = {
    "two dimensions": {"shape": (4, 5)},
    "four dimensions": {"shape": (1, 3, 4, 5)},
    "no channels": {"shape": (0, 4, 5)},
    "a side of 4097": {"shape": (1, 1, 4097)},
    "another element type": {"dtype": "f64"},
    "one class": {"classes": ("a",)},
    "class without a name": {"classes": ("a", "")},
    "class with markup": {"classes": ("a", "[red]")},
    "class with a line end": {"classes": ("a", "b\n")},
    "class of 61 letters": {"classes": ("a", "b" * 61)},
    "no mean": {"mean": ()},
    "no std": {"std": ()},
    "unknown key": {"size": 4},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_schema_is_refused_when_read(changes: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        schema(**changes)
