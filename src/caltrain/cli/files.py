"""Reading and writing the files that people give to commands, with named errors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.verify import Policy
from caltrain.errors import DataError
from caltrain.files import read_bounded, write_whole
from caltrain.plan import MAX_PLAN_BYTES, Plan, parse_plan, parse_toml

MAX_INPUT_BYTES = 2 << 30
_MAX_HEADER = 4096


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all. Raises EnvironmentFault `file.not-written`."""
    write_whole(path, msgspec.json.encode(value))


def read_plan(path: Path) -> Plan:
    """A plan from TOML."""
    return parse_plan(read_bounded(path, limit=MAX_PLAN_BYTES))


def read_policy(path: Path) -> Policy:
    """An attestation policy from TOML."""
    return parse_toml(read_bounded(path, limit=MAX_PLAN_BYTES), Policy, what="policy")


def read_inputs(path: Path, plan: Plan) -> NDArray[np.generic]:
    """Inputs (N, C, H, W), or one (C, H, W), from a .npy file. Raises DataError `input.unreadable`.

    Whether shape and element type are the plan's, those who use the inputs check.
    """
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise ValueError("larger than 2 GiB")
        # Mapped: a header that announces more than there is allocates nothing, and Python objects are refused.
        array = np.lib.format.open_memmap(path, mode="r", max_header_size=_MAX_HEADER)
    except Exception as error:  # noqa: BLE001  # numpy evaluates the header: a hostile one can raise nearly anything
        raise DataError(
            "input.unreadable",
            f"cannot read {path} as an array: {error}",
            step="read inputs",
            fix=f"Save them with numpy.save as {plan.data.dtype} of shape (N, C, H, W) = (N, *{plan.data.shape}).",
        ) from None
    return array[None] if array.ndim == 3 else array
