"""What a party remembers of its runs, so that no approval serves twice.

One file, `journal.json`: for each plan digest the manifest that was countersigned. It is written before the
signature leaves, so a crash can only make the party refuse too much.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from caltrain.errors import ConfigError, ProvisioningError


def remember_manifest(folder: Path, *, plan: str, manifest: str, allow_second: bool) -> None:
    """Note that `manifest` will be countersigned for `plan`.

    Raises ProvisioningError `manifest.second` when another one was, unless `allow_second`.
    """
    path = folder / "journal.json"
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
    except msgspec.MsgspecError as error:
        raise ConfigError(
            "journal.unreadable", f"{path} is damaged: {error}", step="read journal", fix="Restore it from a copy."
        ) from None
    before = entries.get(plan)
    if before not in {None, manifest} and not allow_second:
        raise ProvisioningError(
            "manifest.second",
            f"this plan already has the manifest {before}; the host shows {manifest}",
            step="countersign",
            fix="Refuse: somebody runs your plan a second time. If the parties agreed to that, allow it explicitly.",
        )
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(entries | {plan: manifest}))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
