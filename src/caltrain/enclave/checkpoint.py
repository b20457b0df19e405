"""Sealed checkpoints: all that the enclave knows of a run, at one (epoch, step), bound to the center's state there.

An object of the host's: length and header in clear, then the snapshot under AES-256-GCM with the header as AAD. The
key is a share-out of the parties: as many of them as the plan's quorum, each with its own data key, open it together
inside another enclave (see `resume`); fewer cannot, nor can the host. Two objects are written in turn, and the chain's
last `checkpoint` event names the digest of the one that counts, so a torn or an older one is never taken for it.
"""

from __future__ import annotations

import os
import struct
from typing import Annotated

import msgspec
from torch import Tensor

from caltrain.boundary.sealed import PartySecret
from caltrain.crypto import shares
from caltrain.crypto.aead import OVERHEAD, seal, unseal
from caltrain.crypto.decoders import msgpack_decoder
from caltrain.crypto.digests import Digest, digest, to_text
from caltrain.crypto.kdf import derive
from caltrain.enclave.finite import check_finite
from caltrain.enclave.pool import PoolPlace
from caltrain.enclave.run import Course, Custody, Run, State, present
from caltrain.errors import UNDECODABLE, IntegrityError
from caltrain.models.weights import decode_state, encode_state
from caltrain.plan import MAX_PARTIES, Plan, RunManifest
from caltrain.records.commitment import PartyName, ShardId

MAX_CHECKPOINT = 8 << 30
_LENGTH = struct.Struct("<I")
_MAX_HEADER = 1 << 20


class CheckpointHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """In clear: whose checkpoint it is, and each party's share of its key, sealed to that party."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    run: ShardId
    plan: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHECKPOINT)]
    shares: Annotated[dict[PartyName, bytes], msgspec.Meta(max_length=MAX_PARTIES)]


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the enclave knows. `tensors` is safetensors of the zones' states, as `front/...` and `head/...`."""

    state: State
    manifest: RunManifest
    signing_key: bytes
    seed: bytes
    parties: dict[PartyName, PartySecret]
    custody: Custody
    course: Course | None
    audit: tuple[int, int]
    pool: PoolPlace | None
    held_out: PoolPlace | None
    tensors: bytes


def quorum_of(plan: Plan) -> int:
    """Parties that it takes to resume."""
    return plan.resume_quorum or len(plan.parties)


def take_custody(run: Run) -> None:
    """Draw the checkpoints' key and share it out: once a run."""
    plan = present(run.plan)
    key, names = os.urandom(32), [party.name for party in plan.parties]
    parts = shares.split(key, threshold=quorum_of(plan), shares=len(names))
    sealed = {
        name: seal(_share_key(run.vault.parties[name].data_key), part, aad=_share_aad(run.vault.run, name))
        for name, part in zip(names, parts, strict=True)
    }
    run.custody = Custody(key, sealed)


def open_share(header: CheckpointHeader, party: str, data_key: bytes) -> bytes:
    """A party's share, by its data key. Raises IntegrityError."""
    sealed = header.shares.get(party, b"")
    return unseal(_share_key(data_key), sealed, aad=_share_aad(header.run, party), step="resume")


def _share_key(data_key: bytes) -> bytes:
    return derive(data_key, "checkpoint-share/v1")


def _share_aad(run: str, party: str) -> bytes:
    return f"{run}/{party}".encode()


def write_checkpoint(run: Run, state: State) -> None:
    """Seal the run as it is (it goes on in `state`) and note the event that makes it count.

    Raises DataError `train.overflow` for weights that are not finite; then nothing is written.
    """
    custody, course, salt = present(run.custody), run.course, os.urandom(32)
    snapshot = msgspec.msgpack.encode(_snapshot(run, state))
    header = msgspec.msgpack.encode(
        CheckpointHeader(
            run=run.vault.run,
            plan=present(run.plan).digest(),
            salt=salt,
            size=len(snapshot),
            shares=custody.shares,
        )
    )
    sealed = seal(_key(custody.key, salt), snapshot, aad=header)
    blob = _LENGTH.pack(len(header)) + header + sealed
    run.door.write(f"checkpoint-{custody.written % 2}", blob, offset=0)
    custody.written += 1
    # With its size, because the object may be longer: the one before it in this place was not cut off.
    body: dict[str, object] = {"state": state, "sealed": digest("checkpoint/v1", blob), "size": len(blob)}
    if course:
        body |= {"epoch": course.epoch, "step": course.step, "front": course.front}
        body |= {"center": to_text(course.center)} if course.center else {}
    run.record("checkpoint", body)


def _snapshot(run: Run, state: State) -> Snapshot:
    tensors: dict[str, Tensor] = {}
    for side, zone in (("front", run.front), ("head", run.head)):
        tensors |= {f"{side}/{name}": value for name, value in zone.state().items()} if zone else {}
    # Else they would replace the last good checkpoint, and could not be loaded.
    check_finite(tensors.values(), "the inner weights")
    audit = run.audit
    return Snapshot(
        state=state,
        manifest=present(run.manifest),
        signing_key=run.vault.signing.private_bytes(),
        seed=run.seed,
        parties=run.vault.parties,
        custody=present(run.custody),
        course=run.course,
        audit=(audit.runs, audit.audited) if audit else (0, 0),
        pool=run.pool.place if run.pool else None,
        held_out=run.held_out.place if run.held_out else None,
        tensors=encode_state(tensors),
    )


def read_checkpoint(run: Run, name: str) -> tuple[CheckpointHeader, bytes]:
    """Header and whole object of the host's checkpoint `name`. Raises IntegrityError `checkpoint.malformed`.

    No byte is read twice: the header that is looked at is the one in the object.
    """
    prefix = run.door.read(name, offset=0, length=_LENGTH.size)
    (length,) = _LENGTH.unpack(prefix)
    if length > _MAX_HEADER:
        raise _malformed(f"a header of {length} bytes")
    raw = run.door.read(name, offset=_LENGTH.size, length=length)
    try:
        header = msgpack_decoder(CheckpointHeader).decode(raw)
    except UNDECODABLE as error:
        raise _malformed(str(error)) from None
    sealed = run.door.read(name, offset=_LENGTH.size + length, length=header.size + OVERHEAD)
    return header, prefix + raw + sealed


def open_checkpoint(blob: bytes, header: CheckpointHeader, key: bytes) -> tuple[Snapshot, dict[str, Tensor]]:
    """The snapshot and its tensors. Raises IntegrityError, also for a snapshot that a quorum made up."""
    (length,) = _LENGTH.unpack(blob[: _LENGTH.size])
    raw, sealed = blob[_LENGTH.size : _LENGTH.size + length], blob[_LENGTH.size + length :]
    plain = unseal(_key(key, header.salt), sealed, aad=raw, step="resume")
    try:
        snapshot: Snapshot = msgpack_decoder(Snapshot).decode(plain)
    except UNDECODABLE as error:
        raise _malformed(str(error)) from None
    return snapshot, decode_state(snapshot.tensors, step="resume")


def _key(key: bytes, salt: bytes) -> bytes:
    return derive(key, "checkpoint/v1", salt)


def _malformed(what: str) -> IntegrityError:
    return IntegrityError(
        "checkpoint.malformed",
        f"not a checkpoint: {what}",
        step="resume",
        fix="Restore the host's folder from a copy; a damaged checkpoint cannot be repaired.",
    )
