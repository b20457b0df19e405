"""A package's folder: written whole, and opened only if every part is the one that the manifest names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from caltrain.crypto.digests import same, to_text
from caltrain.crypto.dsse import Envelope
from caltrain.errors import IntegrityError
from caltrain.files import read_bounded, write_whole
from caltrain.models.spec import MAX_WHEEL_BYTES
from caltrain.serving.package import (
    CENTER,
    INSIDE,
    MANIFEST,
    MAX_CENTER_BYTES,
    MAX_INSIDE_BYTES,
    MAX_MANIFEST_BYTES,
    WHEEL,
    Package,
    open_package,
    read_manifest,
)


@dataclass(frozen=True)
class PackageFolder:
    """A package whose parts were checked when it was opened; they are read again by who uses them."""

    folder: Path
    envelope: Envelope
    package: Package

    def inside(self) -> bytes:
        """The sealed part. Raises IntegrityError `package.other-part`."""
        return _part(self.folder / INSIDE, self.package.inside, MAX_INSIDE_BYTES)

    def center(self) -> bytes:
        """The CenterNet's weights as safetensors. Raises IntegrityError `package.other-part`."""
        return _part(self.folder / CENTER, self.package.center_weights, MAX_CENTER_BYTES)

    def wheel(self) -> bytes:
        """The wheel of stages; empty where the model has none. Raises IntegrityError `package.other-part`."""
        named = self.package.spec.wheel
        return _part(self.folder / WHEEL, named.sha256, MAX_WHEEL_BYTES) if named else b""


def open_folder(folder: Path, owner: str | None = None) -> PackageFolder:
    """Open a package of `owner`; without it, of whoever signed it.

    Raises ConfigError `file.unreadable`, `package.*`, IntegrityError `signature.invalid`, `package.other-part`.
    """
    envelope = read_manifest(read_bounded(folder / MANIFEST, limit=MAX_MANIFEST_BYTES))
    opened = PackageFolder(folder, envelope, open_package(envelope, owner))
    for read in (opened.inside, opened.center, opened.wheel):
        read()
    return opened


def write_folder(folder: Path, envelope: Envelope, *, inside: bytes, center: bytes, wheel: bytes = b"") -> None:
    """Write a package; its manifest last: with it the package is whole. Raises EnvironmentFault `file.not-written`."""
    write_whole(folder / INSIDE, inside)
    write_whole(folder / CENTER, center)
    if wheel:
        write_whole(folder / WHEEL, wheel)
    write_whole(folder / MANIFEST, msgspec.json.encode(envelope))


def part_digest(raw: bytes | memoryview) -> str:
    """How a manifest names a part: its plain SHA-256."""
    return to_text(hashlib.sha256(raw).digest())


def _part(path: Path, expected: str, limit: int) -> bytes:
    raw = read_bounded(path, limit=limit)
    if not same(found := part_digest(raw), expected):
        raise IntegrityError(
            "package.other-part",
            f"{path.name} is {found}, the manifest names {expected}",
            step="open package",
            fix="Get the package anew from its owner: a part was changed.",
        )
    return raw
