"""What a party remembers of its runs, so that no approval serves twice and no run is turned back unseen.

`journal.json`: for each plan digest the manifest that was countersigned. It is written before the signature leaves,
so a crash can only make the party refuse too much. `heads.json`: for each run the newest head of its chain that the
party has verified; see `heads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from caltrain.crypto.digests import Digest, same
from caltrain.crypto.dsse import PublicKey
from caltrain.errors import UNDECODABLE, ConfigError, LineageError, ProvisioningError
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


def signed_before(folder: Path, *, plan: str) -> str | None:
    """Digest of the manifest of this plan that was countersigned. Raises ConfigError `journal.unreadable`.

    Asked before anything leaves, so that a second enclave of the same plan does not get the data key either.
    """
    return _read(folder / "journal.json").get(plan)


def second_manifest(before: str) -> ProvisioningError:
    """What a party says that has signed `before` and is shown no run of it."""
    return _second(f"the manifest {before} of this plan is signed already; the host runs another one", step="join")


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
    """What a party keeps of a run that it countersigned: whose it is, and how much of its chain it has verified.

    `words` counts how often it let the run go on from this very head, in another enclave each time.
    """

    plan: Digest
    manifest: Digest
    signing_key: PublicKey
    head: Digest
    events: Annotated[int, msgspec.Meta(ge=0)] = 0
    words: Annotated[int, msgspec.Meta(ge=0)] = 0


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


def count_word(folder: Path, run: str, *, head: str) -> int:
    """Note that a word will be given for the newest head that was kept; returns which one it is, from 1.

    On return the note is on the disk. Raises LineageError `chain.rolled-back` where `head` is no longer the newest.
    """
    path = folder / "heads.json"
    with alone(folder):
        runs = _read_runs(path)
        kept = runs.get(run)
        if kept is None or not same(kept.head, head):
            raise LineageError(
                "chain.rolled-back",
                f"the word would be for {head}; another process of this party has seen more of the run",
                step="rejoin",
                fix="Start `party rejoin` again: it looks at the chain anew.",
            )
        counted = msgspec.structs.replace(kept, words=kept.words + 1)
        write_whole(path, msgspec.json.encode(runs | {run: counted}))
    return counted.words


def kept_run(folder: Path, run: str) -> KeptRun | None:
    """What was kept of that run. Raises ConfigError `journal.heads-unreadable`."""
    return kept_runs(folder).get(run)


def kept_runs(folder: Path) -> dict[str, KeptRun]:
    """All runs that were countersigned, in that order. Raises ConfigError `journal.heads-unreadable`."""
    return _read_runs(folder / "heads.json")


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
