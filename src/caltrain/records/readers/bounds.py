"""What a reader accepts at most. Every size that a file announces is held against these before use."""

from __future__ import annotations

import math

from caltrain.records.readers.faults import too_large, wrong_shape

MAX_RECORDS = 2_000_000
MAX_ARRAY_BYTES = 2 << 30  # of one array of images or labels, decoded
MAX_SIDE = 4096  # pixels; so one picture has at most 16.8 million of them
MAX_ENCODED_BYTES = 32 << 20  # of one JPEG or PNG
MAX_CLASSES = 10_000
MAX_PARTS = 1_000  # shards of a set, members of an archive


def check_room(shape: tuple[int, ...], *, itemsize: int, what: str, step: str) -> int:
    """Bytes that an array of `shape` takes; raises DataError when a dimension is 0 or over a bound.

    The first dimension counts records. Python integers do not overflow, so no product wraps around.
    """
    records, *sides = shape
    size = math.prod(shape) * itemsize
    if records > MAX_RECORDS or any(side > MAX_SIDE for side in sides) or size > MAX_ARRAY_BYTES:
        raise too_large(f"{what} would be {shape}, {size} bytes", step=step)
    if any(side < 1 for side in sides):
        raise wrong_shape(f"{what} would be {shape}: pictures without pixels", step=step)
    return size
