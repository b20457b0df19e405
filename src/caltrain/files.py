"""Files that people give and keep: read up to a bound, written whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from caltrain.errors import ConfigError, EnvironmentFault


def read_bounded(path: Path, *, limit: int) -> bytes:
    """A whole file of at most `limit` bytes. Raises ConfigError `file.unreadable`, `file.too-large`."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(
            "file.unreadable", f"cannot read {path}: {error.strerror}", step="read file", fix="Check the path."
        ) from None
    if len(raw) > limit:
        raise ConfigError(
            "file.too-large", f"{path} has more than {limit} bytes", step="read file", fix="Check the path."
        )
    return raw


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it; it gets its name once it is complete.

    Raises EnvironmentFault `file.not-written`.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.rename(path)
    except OSError as error:
        raise EnvironmentFault(
            "file.not-written",
            f"cannot write {path}: {error.strerror}",
            step="write file",
            fix="Free space, look at the folder's rights, or choose another path.",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
