"""What the host keeps of a run so that it can be taken up: which checkpoint counts, and the CenterNet beside it."""

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path

from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import digest
from caltrain.crypto.dsse import Envelope
from caltrain.errors import UNDECODABLE, ConfigError, ProtocolError
from caltrain.host.store import Store
from caltrain.plan import Plan, plan_from_json
from caltrain.provenance.chain import Event

_CHECKPOINTS = ("checkpoint-0", "checkpoint-1")


def center_object(epoch: int, step: int) -> str:
    """Name of the CenterNet's state before that step."""
    return f"center-at-{epoch}-{step}"


def keep_center(store: Store, epoch: int, step: int, state: bytes) -> None:
    """Keep the CenterNet's state of a checkpoint beside the one before it."""
    store.put(center_object(epoch, step), state)
    kept = sorted(store.root.glob("center-at-*"), key=lambda path: path.stat().st_mtime_ns)
    for old in kept[:-2]:
        old.unlink()


def kept_events(store: Store) -> list[Event]:
    """The run's chain as it lies in the folder, unverified.

    Raises ProtocolError `resume.nothing` without one, `resume.damaged-chain`.
    """
    if not store.path("chain.jsonl").is_file():
        raise _nothing(store.root)
    try:
        return [_event(line) for line in store.read_whole("chain.jsonl").splitlines()]
    except UNDECODABLE as error:
        raise ProtocolError(
            "resume.damaged-chain",
            f"the chain in {store.root} cannot be read: {error}",
            step="resume",
            fix="Get the chain back from a copy of the folder, or from a party that kept it.",
        ) from None


def _event(line: bytes) -> Event:
    return json_decoder(Event).decode(base64.b64decode(json_decoder(Envelope).decode(line).payload, validate=True))


def newest_checkpoint(store: Store) -> str:
    """Name of the checkpoint that the chain names last. Raises ProtocolError `resume.nothing`."""
    named = [event.body for event in kept_events(store) if event.kind == "checkpoint"]
    for name in _CHECKPOINTS if named else ():
        # An object may be longer than its checkpoint: what lay there before was written over, not cut.
        if store.path(name).is_file():
            raw = store.read_whole(name)[: int(named[-1]["size"])]
            if digest("checkpoint/v1", raw) == named[-1]["sealed"]:
                return name
    raise _nothing(store.root)


def check_holds_run(folder: Path) -> None:
    """Raise ProtocolError `resume.nothing` for a folder with nothing to resume, before anything is made in it."""
    if not any((folder / name).is_file() for name in _CHECKPOINTS) or not (folder / "chain.jsonl").is_file():
        raise _nothing(folder)


def check_resumable(store: Store, plan: Plan) -> None:
    """Raise ProtocolError `resume.nothing`, or ConfigError `resume.plan-differs`, unless a run of `plan` lies there."""
    newest_checkpoint(store)
    kept = plan_from_json(store.read_whole("plan.json"))
    if kept.digest() != plan.digest():
        raise ConfigError(
            "resume.plan-differs",
            f"{store.root} holds a run of the plan {kept.digest()}, not of {plan.digest()}",
            step="resume",
            fix="Give the plan with which the run began; a run's plan cannot be changed.",
        )


def check_nothing_lost(store: Store) -> None:
    """Raise ConfigError `host.unfinished-run` where a run that could be taken up lies in the folder."""
    if not store.path("chain.jsonl").is_file():
        return
    kinds = set()
    for line in store.read_whole("chain.jsonl").splitlines():
        with suppress(*UNDECODABLE):  # a last line that was not written out; who resumes drops it
            kinds.add(_event(line).kind)
    if "checkpoint" in kinds and "link" not in kinds:
        raise ConfigError(
            "host.unfinished-run",
            f"{store.root} holds a run that is not finished, and that a new one would make impossible to resume",
            step="serve",
            fix="Serve with --resume to take it up; with --anew to give it up; or choose another --folder.",
        )


def last_cut(store: Store) -> int:
    """Layers of the FrontNet after the last move of the cut, 0 where it was never moved."""
    return next((int(e.body["front"]) for e in reversed(kept_events(store)) if e.kind == "cut"), 0)


def _nothing(folder: Path) -> ProtocolError:
    return ProtocolError(
        "resume.nothing",
        f"{folder} holds no checkpoint of a run",
        step="resume",
        fix="Nothing was trained yet, or the folder is not that of the run: have the parties join a new run.",
    )
