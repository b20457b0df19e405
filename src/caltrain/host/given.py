"""Files that the plan names by their digest and the operator gives.

A wheel of stages, public weights to start from, the list of records that a repair leaves out.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from caltrain.crypto.digests import same, to_text
from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.host.store import Store
from caltrain.plan import Plan

What = Literal["wheel", "initial", "quarantine"]
Given = Mapping[What, Path]
_STEP = "take the operator's files"


def check_given(plan: Plan, given: Given, *, kept: Path | None = None) -> None:
    """Check that exactly the files that the plan names are there; with `kept`, in that folder if not given anew.

    Raises ConfigError `given.not-named`, `given.missing` or `given.other-digest`, EnvironmentFault `given.unreadable`.
    """
    initial, wheel = plan.training.initial, plan.model.wheel
    named: dict[What, str | None] = {
        "wheel": wheel.sha256 if wheel else None,
        "initial": initial.sha256 if initial else None,
        "quarantine": plan.repair.quarantine if plan.repair else None,
    }
    for what, digest in named.items():
        path = given.get(what) or (kept / what if kept else None)
        if digest is None:
            if what in given:
                raise _refused("given.not-named", f"the plan names no {what}", f"Leave out --{what}.")
        elif path is None or not path.is_file():
            raise _refused("given.missing", f"the plan names the {what} {digest}", f"Give its file with --{what}.")
        elif not same(found := _digest(path), digest):
            raise _refused(
                "given.other-digest",
                f"{path} is {found}, the plan names {digest}",
                "Give the file that the plan names.",
            )


def keep_given(store: Store, given: Given) -> None:
    """Store the files for the enclave to read, under the names by which it asks for them."""
    for what, path in given.items():
        with path.open("rb") as source, store.incoming() as file:
            shutil.copyfileobj(source, file)
            store.publish(file, what)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return to_text(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise EnvironmentFault(
            "given.unreadable", f"cannot read {path}: {error.strerror}", step=_STEP, fix="Look at the file's rights."
        ) from error


def _refused(code: str, what: str, fix: str) -> ConfigError:
    return ConfigError(code, what, step=_STEP, fix=fix)
