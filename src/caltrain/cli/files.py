"""Reading and writing the files that people give to commands, with named errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.verify import Policy
from caltrain.errors import UNDECODABLE, ConfigError, DataError
from caltrain.files import read_bounded, write_whole
from caltrain.participant.identity import PublicIdentity
from caltrain.plan import MAX_PLAN_BYTES, Plan, parse_plan, parse_toml
from caltrain.records.readers.bounds import MAX_ENCODED_BYTES
from caltrain.records.readers.pictures import decode_images

MAX_INPUT_BYTES = 2 << 30
_MAX_HEADER = 4096
_MAX_IDENTITY = 1 << 16
_PICTURES = (".png", ".jpg", ".jpeg")


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all. Raises EnvironmentFault `file.not-written`."""
    write_whole(path, msgspec.json.encode(value))


def read_plan(path: Path) -> Plan:
    """A plan from TOML."""
    return parse_plan(read_bounded(path, limit=MAX_PLAN_BYTES))


def read_policy(path: Path) -> Policy:
    """An attestation policy from TOML."""
    return parse_toml(read_bounded(path, limit=MAX_PLAN_BYTES), Policy, what="policy")


def read_key(text: str) -> str:
    """A public key as it is written, or out of an identity.json. Raises ConfigError `identity.not-public`."""
    return text if text.startswith("ed25519:") else read_public(Path(text)).public_key


def read_public(path: Path) -> PublicIdentity:
    """An identity.json: somebody's name and public key. Raises ConfigError `identity.not-public`, `file.unreadable`."""
    try:
        return msgspec.json.decode(read_bounded(path, limit=_MAX_IDENTITY), type=PublicIdentity)
    except UNDECODABLE as error:
        raise ConfigError(
            "identity.not-public",
            f"{path} holds no public key: {str(error)[:200]}",
            step="read identity",
            fix="Give the identity.json that `caltrain party keygen` wrote, or for a key alone ed25519:....",
        ) from None


def read_inputs(paths: Sequence[Path]) -> NDArray[np.generic]:
    """Inputs (N, C, H, W) from .npy files of (N, C, H, W) or (C, H, W), or from PNG and JPEG pictures, in order.

    Raises DataError `input.unreadable`, `input.mixed`, `reader.*`. Whether shape and element type are those that the
    model takes, those who use the inputs check.
    """
    if any(path.suffix.lower() in _PICTURES for path in paths):
        return decode_images(((path.name, read_bounded(path, limit=MAX_ENCODED_BYTES)) for path in paths), len(paths))
    return _joined([_array(path) for path in paths])


def read_named(paths: Sequence[Path]) -> tuple[NDArray[np.generic], list[str]]:
    """Inputs as `read_inputs` has them, and for each the file (and row) that it is of. A folder stands for its files.

    Raises DataError `input.none` and what `read_inputs` does.
    """
    files = [file for path in paths for file in (_files(path) if path.is_dir() else [path])]
    arrays = [read_inputs([file]) for file in files]
    names = [
        str(file) if len(array) == 1 else f"{file}:{row}"
        for file, array in zip(files, arrays, strict=True)
        for row in range(len(array))
    ]
    return _joined(arrays), names


def _files(folder: Path) -> list[Path]:
    """What can be read as inputs in a folder, by name."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in {*_PICTURES, ".npy"})
    if not found:
        raise DataError(
            "input.none",
            f"{folder} holds neither .npy files nor PNG or JPEG pictures",
            step="read inputs",
            fix="Name a folder with inputs in it, or the files.",
        )
    return found


def _joined(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    if len({(array.shape[1:], array.dtype) for array in arrays}) != 1:
        raise DataError(
            "input.mixed",
            "the files hold arrays of different shapes or element types",
            step="read inputs",
            fix="Ask about them one by one, or convert them to what the model takes.",
        )
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _array(path: Path) -> NDArray[np.generic]:
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise ValueError("larger than 2 GiB")
        # Mapped: a header that announces more than there is allocates nothing, and Python objects are refused.
        array = np.lib.format.open_memmap(path, mode="r", max_header_size=_MAX_HEADER)
        if not array.ndim:
            raise ValueError("it holds a single number")
    except Exception as error:  # noqa: BLE001  # numpy evaluates the header: a hostile one can raise nearly anything
        raise DataError(
            "input.unreadable",
            f"cannot read {path} as an array: {error}",
            step="read inputs",
            fix="Save them with numpy.save as an array (N, C, H, W) of u8 or f32, as the model takes them.",
        ) from None
    return array[None] if array.ndim == 3 else array
