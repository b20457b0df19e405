"""Receiving a sealed shard: its header is verified and its size known before a byte of it is kept."""

from __future__ import annotations

import io

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from caltrain.errors import IntegrityError, ProtocolError
from caltrain.host.store import Store
from caltrain.plan import MAX_SHARDS, Plan
from caltrain.records import shard as shards

MAX_SHARD_BYTES = 8 << 30
_MAX_DIGITS = 19
_HEAD = len(shards.MAGIC) + 4 + shards.MAX_HEADER_BYTES
_STEP = "receive shard"


async def receive_shard(
    store: Store, plan: Plan, party: str, shard_id: str, request: Request, *, replace: bool
) -> shards.ShardHeader:
    """Stream a shard of `party` into the store. Nothing stays unless header, signature, name and length all fit.

    Without `replace` a shard that is there already is received, and left as it is.

    Raises AccessError for an unknown party, IntegrityError for a bad shard, ProtocolError `upload.too-large`,
    `upload.too-many`.
    """
    public_key = plan.party(party).public_key
    declared = request.headers.get("content-length", "0")
    if len(declared) > _MAX_DIGITS or not declared.isdecimal() or int(declared) > MAX_SHARD_BYTES:
        raise _too_large(MAX_SHARD_BYTES)
    if len(store.shard_ids(party) - {shard_id}) >= MAX_SHARDS:
        raise ProtocolError(
            "upload.too-many",
            f"{party} has sent {MAX_SHARDS} shards already",
            step=_STEP,
            fix="Seal into larger shards.",
        )
    with store.incoming() as file:
        head, header = bytearray(), None
        received = expected = 0
        async for chunk in request.stream():
            received += len(chunk)
            if header is None:
                head += chunk
                if len(head) < _HEAD and not _complete(head):
                    continue
                header, expected = _open(bytes(head), plan, party, shard_id, public_key)
                chunk = bytes(head)  # noqa: PLW2901  # everything so far goes to disk at once
            if received > expected:
                raise _too_large(expected)
            file.write(chunk)
        if header is None or received != expected:
            raise IntegrityError(
                "upload.cut-short",
                f"the shard has {received} bytes, its header announces {expected or 'more'}",
                step=_STEP,
                fix="Send the whole shard again.",
            )
        # A header seen on the wire lets anybody send it before other frames: what is there stays, once it counts.
        if replace or shard_id not in store.shard_ids(party):
            await run_in_threadpool(store.publish, file, f"shards/{party}/{shard_id}")
    return header


def _complete(head: bytearray) -> bool:
    """Whether the header is all there."""
    start = len(shards.MAGIC) + 4
    return len(head) >= start and len(head) >= start + int.from_bytes(head[start - 4 : start], "little")


def _open(head: bytes, plan: Plan, party: str, shard_id: str, public_key: str) -> tuple[shards.ShardHeader, int]:
    """Verified header and the total length that it announces."""
    envelope, offset = shards.read_header(io.BytesIO(head), step=_STEP)
    header = shards.open_header(envelope, contributor=party, public_key=public_key, step=_STEP)
    if header.shard != shard_id:
        raise IntegrityError(
            "upload.other-name",
            "the shard's header names another shard",
            step=_STEP,
            fix="Send a shard under the id that it was sealed with.",
        )
    if header.schema != plan.data.digest() or header.frame_bytes != shards.frame_bytes(plan.data):
        raise IntegrityError(
            "upload.other-schema",
            "the shard was sealed for another schema than the plan's",
            step=_STEP,
            fix="Seal the records again with this plan.",
        )
    expected = offset + header.records * header.frame_bytes
    if expected > MAX_SHARD_BYTES:
        raise _too_large(MAX_SHARD_BYTES)
    return header, expected


def _too_large(limit: int) -> ProtocolError:
    return ProtocolError(
        "upload.too-large", f"a body of more than {limit} bytes", step=_STEP, fix="Seal into smaller shards."
    )
