"""The data schema of a plan and the canonical bytes of a record."""

from __future__ import annotations

import math
import struct
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.crypto.digests import canonical_json, digest
from caltrain.errors import DataError

MAX_RECORD_BYTES = 4 << 20
_LARGEST = 1e30
_MAGIC = b"CTR1"
_DTYPES: dict[str, tuple[int, np.dtype[np.generic]]] = {
    "u8": (1, np.dtype("u1")),
    "f32": (2, np.dtype("<f4")),
}

Dimension = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._/-]*\Z")]


class DataSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a record is: an array of `shape` (channels, height, width) and one label out of `classes`."""

    shape: tuple[Dimension, Dimension, Dimension]
    dtype: Literal["u8", "f32"] = "u8"
    classes: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=10_000)]
    mean: Annotated[tuple[float, ...], msgspec.Meta(min_length=1, max_length=4096)] = (0.5,)
    std: Annotated[tuple[float, ...], msgspec.Meta(min_length=1, max_length=4096)] = (0.5,)

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """Little-endian element type."""
        return _DTYPES[self.dtype][1]

    @property
    def record_bytes(self) -> int:
        """Length of the canonical bytes of one record: the same for every record of a schema."""
        return len(_head(self, 0)) + math.prod(self.shape) * self.numpy_dtype.itemsize

    def digest(self) -> str:
        """Digest of what decides the canonical bytes: shape, element type and classes."""
        return digest("schema/v1", canonical_json([self.shape, self.dtype, self.classes]))


def check_schema(schema: DataSchema) -> None:
    """Raise DataError when a schema cannot describe records: too large, or a bad mean or std."""
    if schema.record_bytes > MAX_RECORD_BYTES:
        raise _unfit("schema.too-large", f"a record would take {schema.record_bytes} bytes")
    if len(set(schema.classes)) != len(schema.classes):
        raise _unfit("schema.duplicate-class", "two classes have the same name")
    channels = schema.shape[0]
    for name, values in (("mean", schema.mean), ("std", schema.std)):
        # As the float32 that they are used as: larger ones would be infinite, smaller ones zero.
        if len(values) not in {1, channels} or not all(abs(v) <= _LARGEST for v in values):
            raise _unfit("schema.normalisation", f"{name} needs 1 or {channels} finite numbers")
    if min(schema.std) < 1 / _LARGEST:
        raise _unfit("schema.normalisation", "std must be above 0")


def _head(schema: DataSchema, label: int) -> bytes:
    code = _DTYPES[schema.dtype][0]
    return _MAGIC + struct.pack("<BB3II", code, 3, *schema.shape, label)


def _unfit(code: str, what: str, *, step: str = "check schema") -> DataError:
    return DataError(code, what, step=step, fix="Compare the record with [data] of the plan and correct it.")


def encode_record(schema: DataSchema, pixels: NDArray[np.generic], label: int) -> bytes:
    """Canonical bytes: magic, element type, shape, label, little-endian row-major data.

    `pixels` is (C, H, W) of the schema's element type. Raises DataError when the record does not fit.
    """
    if pixels.shape != schema.shape:
        raise _unfit("record.shape", f"shape {pixels.shape} instead of {schema.shape}", step="encode record")
    if pixels.dtype != schema.numpy_dtype:
        raise _unfit("record.dtype", f"elements of {pixels.dtype}, not {schema.dtype}", step="encode record")
    data = np.ascontiguousarray(pixels)
    _check_values(schema, data, label, step="encode record")
    return _head(schema, label) + data.tobytes()


def decode_record(schema: DataSchema, raw: bytes) -> tuple[NDArray[np.generic], int]:
    """Inverse of `encode_record`: ((C, H, W) array, label). Raises DataError when the bytes do not fit."""
    head_len = len(_head(schema, 0))
    if len(raw) != schema.record_bytes:
        raise _unfit("record.length", f"{len(raw)} bytes, not {schema.record_bytes}", step="decode record")
    label = int.from_bytes(raw[head_len - 4 : head_len], "little")
    if raw[:head_len] != _head(schema, label):
        raise _unfit("record.shape", "the record's head names another shape or element type", step="decode record")
    data = np.frombuffer(raw, dtype=schema.numpy_dtype, offset=head_len).reshape(schema.shape)
    _check_values(schema, data, label, step="decode record")
    return data, label


def _check_values(schema: DataSchema, data: NDArray[np.generic], label: int, *, step: str) -> None:
    if not 0 <= label < len(schema.classes):
        raise _unfit("record.label", f"label {label} is outside 0..{len(schema.classes) - 1}", step=step)
    if (
        schema.dtype == "f32"  # equivalent: bytes are always finite; this saves a pass over them
        and not np.isfinite(data).all()
    ):
        raise _unfit("record.not-finite", "a record holds NaN or infinity", step=step)
