"""Elements of the Open Inference Protocol's tensors: JSON numbers and texts, or little-endian bytes.

In binary an element of BYTES is its length (4 bytes, little endian) and its bytes; in JSON it is a text.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.crypto.decoders import json_decoder
from caltrain.errors import UNDECODABLE, DataError

MAX_RANK = 8
NUMBERS: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "INT8": np.dtype("i1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The data types of numbers. BYTES is the only other one."""
Values = NDArray[Any] | tuple[bytes, ...]
_LENGTH = struct.Struct("<I")
_JSON_TYPES = {"b": bool, "u": int, "i": int, "f": float}
_OPENING = re.compile(rb"(?:[ \t\r\n]*\[){1,%d}" % (MAX_RANK + 1))


def from_json(datatype: str, shape: tuple[int, ...], raw: msgspec.Raw) -> Values:
    """Elements out of a JSON list: flat, or nested like the shape. Raises DataError `oip.*`."""
    text = datatype == "BYTES"
    listed, depth = _decode(raw, str if text else _JSON_TYPES[_number(datatype).kind], rank=len(shape))
    try:
        # Python's floats may be too large for FP32: then they are infinite, as they are in binary.
        with np.errstate(over="ignore"):
            values = np.array(listed, dtype=object if text else _number(datatype))
    except (ValueError, OverflowError):
        raise malformed("a tensor's data are ragged, or a number is too large for its datatype") from None
    if values.shape != ((math.prod(shape),) if depth == 1 else shape):
        raise mismatch("a tensor has another number of elements than its shape")
    return tuple(element.encode() for element in values.flat) if text else values.reshape(shape)


def from_binary(datatype: str, shape: tuple[int, ...], raw: memoryview) -> Values:
    """Elements out of their bytes; an array is a read-only view of them. Raises DataError `oip.*`."""
    if datatype == "BYTES":
        return _split(raw, math.prod(shape))
    dtype = _number(datatype)
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise mismatch("a tensor has another number of bytes than its shape and datatype")
    if dtype.kind == "b" and np.frombuffer(raw, np.uint8).max() > 1:
        raise malformed("a BOOL is neither 0 nor 1")
    return np.frombuffer(raw, dtype).reshape(shape)


def to_json(datatype: str, values: Values) -> list[Any]:
    """A flat JSON list. Raises DataError `oip.malformed` for BYTES that are no text."""
    if isinstance(values, tuple):
        try:
            return [element.decode() for element in values]
        except UnicodeDecodeError:
            raise malformed("BYTES that are no text can only be sent in binary") from None
    return values.astype(_number(datatype), copy=False).ravel().tolist()


def to_binary(datatype: str, values: Values) -> bytes:
    """Little-endian bytes in row-major order."""
    if isinstance(values, tuple):
        return b"".join(part for element in values for part in (_LENGTH.pack(len(element)), element))
    return values.astype(_number(datatype), copy=False).tobytes()


def _number(datatype: str) -> np.dtype[Any]:
    if datatype not in NUMBERS:
        raise DataError(
            "oip.datatype",
            "a tensor has a datatype that is not served",
            step="read tensors",
            fix=f"Send one of {', '.join((*NUMBERS, 'BYTES'))}.",
        )
    return NUMBERS[datatype]


def _decode(raw: msgspec.Raw, element: type, *, rank: int) -> tuple[Any, int]:
    """The list, and how deep it is nested."""
    opening = _OPENING.match(raw)
    depth = opening[0].count(b"[") if opening else 0
    if depth not in {1, rank}:
        raise malformed("a tensor has no data, or they are nested otherwise than its shape")
    try:
        return json_decoder(_nested(element, depth)).decode(raw), depth
    except UNDECODABLE:
        raise malformed("a tensor's data are not what its datatype says") from None


def _nested(element: type, depth: int) -> Any:
    for _ in range(depth):
        element = list[element]  # type: ignore[valid-type]  # a type made at run time, for the decoder
    return element


def _split(raw: memoryview, count: int) -> tuple[bytes, ...]:
    found: list[bytes] = []
    at = 0
    while at + _LENGTH.size <= len(raw) and len(found) < count:
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > len(raw) - at:
            break
        found.append(bytes(raw[at : at + length]))
        at += length
    if at != len(raw) or len(found) != count:
        raise mismatch("the elements of BYTES do not fill what their tensor says")
    return tuple(found)


def malformed(what: str) -> DataError:
    """A body that is not of the protocol."""
    return DataError(
        "oip.malformed",
        f"an inference body was refused: {what}",
        step="read tensors",
        fix="Send what the Open Inference Protocol (v2) says, with a standard client.",
    )


def mismatch(what: str) -> DataError:
    """A body whose sizes contradict each other."""
    return DataError(
        "oip.size",
        f"an inference body was refused: {what}",
        step="read tensors",
        fix="Send shapes, sizes and bytes that belong together; a standard client does.",
    )
