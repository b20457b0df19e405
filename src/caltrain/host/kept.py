"""What the host keeps of a run so that it can be taken up: which checkpoint counts, and the CenterNet beside it."""

from __future__ import annotations

import base64

from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import digest
from caltrain.crypto.dsse import Envelope
from caltrain.errors import ProtocolError
from caltrain.host.store import Store
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


def newest_checkpoint(store: Store) -> str:
    """Name of the checkpoint that the chain names last. Raises ProtocolError `resume.nothing`."""
    sealed = ""
    for line in store.read_whole("chain.jsonl").splitlines():
        event = json_decoder(Event).decode(base64.b64decode(json_decoder(Envelope).decode(line).payload))
        if event.kind == "checkpoint":
            sealed = str(event.body.get("sealed"))
    for name in _CHECKPOINTS:
        if store.path(name).is_file() and digest("checkpoint/v1", store.read_whole(name)) == sealed:
            return name
    raise ProtocolError(
        "resume.nothing",
        f"{store.root} holds no checkpoint of a run",
        step="resume",
        fix="Nothing was trained yet, or the folder is not that of the run: have the parties join a new run.",
    )
