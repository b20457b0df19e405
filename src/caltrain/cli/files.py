"""Reading and writing the files that people give to commands, with named errors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.verify import Policy
from caltrain.errors import ConfigError, DataError, EnvironmentFault
from caltrain.plan import Plan, parse_plan, parse_toml

MAX_INPUT_BYTES = 2 << 30


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises ConfigError `file.unreadable`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "file.unreadable", f"cannot read {path}: {error.strerror}", step="read file", fix="Check the path."
        ) from None


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all. Raises EnvironmentFault `file.not-written`."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(value))
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(
            "file.not-written",
            f"cannot write {path}: {error.strerror}",
            step="write file",
            fix="Free space, or choose another path.",
        ) from None


def read_plan(path: Path) -> Plan:
    """A plan from TOML."""
    return parse_plan(read_bytes(path))


def read_policy(path: Path) -> Policy:
    """An attestation policy from TOML."""
    return parse_toml(read_bytes(path), Policy, what="policy")


def read_inputs(path: Path, plan: Plan) -> NDArray[np.generic]:
    """Inputs (N, C, H, W) or one (C, H, W) from a .npy file of the plan's element type. Raises DataError."""
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise ValueError("larger than 2 GiB")
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            "input.unreadable",
            f"cannot read {path} as an array: {error}",
            step="read inputs",
            fix=f"Save the inputs with numpy.save as {plan.data.dtype} of shape (N, C, H, W) = (N, *{plan.data.shape}).",
        ) from None
    if not isinstance(array, np.ndarray):
        raise DataError("input.unreadable", f"{path} is an archive", step="read inputs", fix="Give one .npy file.")
    return array[None] if array.ndim == 3 else array
