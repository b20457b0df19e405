"""What took long to compute, kept in a folder: tensors as safetensors, and beside them what they are, as JSON."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from caltrain.files import write_whole

Plain = str | int | float | bool | None


class _Card(msgspec.Struct, frozen=True):
    """What a kept file is: its description, SHA-256 of the tensors' file, and figures that go with them."""

    of: dict[str, Plain]
    sha256: str
    figures: dict[str, float | None]


class Kept(msgspec.Struct, frozen=True):
    """Tensors and figures that were kept together."""

    tensors: dict[str, Tensor]
    figures: dict[str, float | None]


def default_folder() -> Path:
    """`caltrain/accountability` in the user's cache (XDG Base Directory Specification 0.8)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "caltrain" / "accountability"


class Cache:
    """A folder of results, each found by its description. What is damaged or was cut short counts as not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, of: Mapping[str, Plain]) -> Kept | None:
        """What was kept under this description, if it is there and whole."""
        path = self._path(of)
        try:
            card = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=_Card)
            raw = path.read_bytes()
            if card.of != dict(of) or card.sha256 != hashlib.sha256(raw).hexdigest():
                return None
            return Kept(from_bytes(raw), card.figures)
        except (OSError, msgspec.MsgspecError, SafetensorError):
            return None

    def put(self, of: Mapping[str, Plain], tensors: Mapping[str, Tensor], figures: Mapping[str, float | None]) -> None:
        """Keep; the card comes last, so that what has a card is whole. Raises EnvironmentFault `file.not-written`."""
        path = self._path(of)
        raw = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_whole(path, raw)
        card = _Card(dict(of), hashlib.sha256(raw).hexdigest(), dict(figures))
        write_whole(path.with_suffix(".json"), msgspec.json.encode(card))

    def _path(self, of: Mapping[str, Plain]) -> Path:
        key = hashlib.sha256(msgspec.json.encode(dict(of), order="sorted")).hexdigest()
        return self.folder / f"{key[:32]}.safetensors"
