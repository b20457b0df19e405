"""Reading of files whose size is not trusted."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from caltrain.errors import DataError
from caltrain.records.readers.faults import malformed, not_found, too_large

_CHUNK = 1 << 20


class Stream(Protocol):
    """What is read from: a file, or the unpacked side of a compressed one."""

    def read(self, size: int, /) -> bytes: ...


@contextmanager
def readable(path: Path, *, step: str) -> Iterator[None]:
    """Turn an OSError while `path` is read into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise not_found(f"{path} does not exist", step=step) from error
    except OSError as error:
        if error.errno in {None, errno.EINVAL}:  # not the system's: a decoder's, or a seek to where a header led
            raise malformed(f"{path} is damaged: {error}", step=step) from error
        raise DataError(
            "reader.unreadable",
            f"{path} cannot be read: {error.strerror or error}",
            step=step,
            fix="Check that it is a regular file or a folder that you may read.",
        ) from error


def read_up_to(stream: Stream, size: int) -> bytearray:
    """At most `size` bytes. Grows with what is there: a `read` of an announced size may allocate all of it."""
    data = bytearray()
    while chunk := stream.read(min(_CHUNK, size - len(data))):
        data += chunk
    return data


def read_bounded(path: Path, limit: int, *, step: str) -> bytes:
    """All bytes of a file of at most `limit` bytes. Raises DataError."""
    with readable(path, step=step), path.open("rb") as file:
        raw = bytes(read_up_to(file, limit + 1))
    if len(raw) > limit:
        raise too_large(f"{path} has more than {limit} bytes", step=step)
    return raw
