"""What a party remembers of its runs, so that no approval serves twice and no run is turned back unseen.

`journal.json`: for each plan digest the manifest that was countersigned. It is written before the signature leaves,
so a crash can only make the party refuse too much. `heads.json`: for each run the newest head of its chain that the
party has verified; see `heads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from caltrain.crypto.digests import Digest
from caltrain.crypto.dsse import PublicKey
from caltrain.errors import UNDECODABLE, ConfigError, ProvisioningError
from caltrain.participant.files import alone, write_whole


def remember_manifest(folder: Path, *, plan: str, manifest: str, allow_second: bool) -> None:
    """Note that `manifest` will be countersigned for `plan`; on return the note is on the disk.

    Raises ProvisioningError `manifest.second` when another one was, unless `allow_second`; ConfigError
    `journal.unreadable`, EnvironmentFault.
    """
    path = folder / "journal.json"
    with alone(folder):
        entries = _read(path)
        _check(entries.get(plan), manifest, allow_second=allow_second)
        write_whole(path, msgspec.json.encode(entries | {plan: manifest}))


def refuse_second(folder: Path, *, plan: str) -> None:
    """Raise ProvisioningError `manifest.second` when a manifest of this plan was countersigned before.

    Asked before anything leaves, so that a second enclave of the same plan does not get the data key either.
    """
    before = _read(folder / "journal.json").get(plan)
    if before is not None:
        raise _second(f"the manifest {before} of this plan is signed already", step="join")


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, *UNDECODABLE) as error:
        raise ConfigError(
            "journal.unreadable", f"{path} is damaged: {error}", step="read journal", fix="Restore it from a copy."
        ) from None


def _check(before: str | None, manifest: str, *, allow_second: bool) -> None:
    if before not in {None, manifest} and not allow_second:
        raise _second(f"this plan already has the manifest {before}; the host shows {manifest}", step="countersign")


def _second(what: str, *, step: str) -> ProvisioningError:
    return ProvisioningError(
        "manifest.second",
        what,
        step=step,
        fix="Refuse: somebody runs your plan a second time. If the parties agreed to that, allow it explicitly.",
    )


class KeptRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a party keeps of a run that it countersigned: whose it is, and how much of its chain it has verified."""

    plan: Digest
    manifest: Digest
    signing_key: PublicKey
    head: Digest
    events: Annotated[int, msgspec.Meta(ge=0)] = 0


def keep_run(folder: Path, run: str, kept: KeptRun) -> None:
    """Note a run, or the newest head of its chain; on return the note is on the disk.

    Of two notes the one with more events stays, so that processes of one party do not undo each other's.
    """
    path = folder / "heads.json"
    with alone(folder):
        runs = _read_runs(path)
        before = runs.get(run)
        if before is None or before.events < kept.events:
            write_whole(path, msgspec.json.encode(runs | {run: kept}))


def kept_run(folder: Path, run: str) -> KeptRun | None:
    """What was kept of that run. Raises ConfigError `journal.heads-unreadable`."""
    return _read_runs(folder / "heads.json").get(run)


def _read_runs(path: Path) -> dict[str, KeptRun]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, KeptRun])
    except FileNotFoundError:
        return {}
    except (OSError, *UNDECODABLE) as error:
        raise ConfigError(
            "journal.heads-unreadable",
            f"{path} is damaged: {error}",
            step="read journal",
            fix="Restore it from a copy.",
        ) from None
