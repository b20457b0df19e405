"""Ingest: authenticate, decrypt, recompute commitments and roots, fill the pool (DESIGN: the protocol, 4 and 6)."""

from __future__ import annotations

import io
from collections.abc import Iterator

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.boundary.messages import Done, Ingest, StoredShard
from caltrain.crypto.digests import same, to_text
from caltrain.crypto.merkle import MerkleBuilder
from caltrain.enclave.audit import Audit
from caltrain.enclave.checkpoint import write_checkpoint
from caltrain.enclave.door import Door
from caltrain.enclave.pool import Pool, PoolPlace, PoolShape, Rows
from caltrain.enclave.quarantine import Sieve, sieve_of
from caltrain.enclave.run import Course, Run, State, present
from caltrain.enclave.zones import begin_weights, make_zones
from caltrain.errors import DataError, IntegrityError, LineageError
from caltrain.plan import MAX_SHARDS, ManifestParty, ManifestShard, Plan, RunManifest
from caltrain.records import shard as shards
from caltrain.records.commitment import RecordRef, commit
from caltrain.records.schema import DataSchema, decode_record

# A row of the pool: party, shard (numbers in the manifest), leaf, label; commitment; elements.
_PLACE = np.dtype([("party", "<u4"), ("shard", "<u4"), ("leaf", "<u4"), ("label", "<u4")])
_HEAD = _PLACE.itemsize + 32
_CHUNK = 1 << 20


class Seen:
    """The records of one contributor by 16 bytes of their digests: sorted once, at the end, which takes 24 more.

    It is all of ingest's memory that grows with the records; a set would take about 100 bytes for each.
    """

    def __init__(self) -> None:
        self._keys = bytearray()

    def add(self, record: bytes) -> None:
        """One more, as canonical bytes."""
        self._keys += shards.record_key(record)

    def repeated(self) -> int | None:
        """The number of the first record that was there before, counted from 0 in the order in which they came."""
        keys = np.frombuffer(self._keys, "S16")
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        again = order[1:][ordered[1:] == ordered[:-1]]
        return int(again.min()) if len(again) else None


def ingest(run: Run, message: Ingest) -> tuple[Done, State]:
    """Take in the manifest's shards; report what else the host has. The first shard that fails ends the run."""
    plan, manifest = present(run.plan), present(run.manifest)
    wanted = {StoredShard(p.name, s.shard) for p in manifest.parties for s in p.shards}
    stored = set(message.stored)
    if wanted - stored:
        gone = min(wanted - stored, key=lambda s: (s.party, s.shard))
        raise LineageError(
            "ingest.missing-shard",
            f"shard {gone.shard} of {gone.party} is in the manifest but the host does not have it",
            step="ingest",
            fix=f"Have {gone.party} send it again.",
        )
    sieve = sieve_of(run)
    pools = {False: make_pool(run, "pool"), True: make_pool(run, "held-out")}
    taken, total = 0, manifest.records() + manifest.records(held_out=True)
    for party_index, party in enumerate(manifest.parties):
        seen = Seen()
        for shard_index, entry in enumerate(party.shards):
            place = (party_index, shard_index)
            first = RecordRef(party.name, entry.shard, 0)
            for row in _shard_rows(run, plan, first, entry, place, seen=seen, sieve=sieve):
                pools[entry.held_out].append(row)
            taken += entry.records
            run.door.progress("ingest", taken, total)
        _refuse_duplicates(party, seen)
    sieve.check_classes()
    for pool in pools.values():
        pool.finish()
    run.pool, run.held_out = pools[False], pools[True] if pools[True].shape.records else None
    start_training(run, Course(front=plan.partition.front), (0, 0))
    begin_weights(run)
    if plan.repair:
        run.record("repair", msgspec.to_builtins(plan.repair))
    run.record("ingest", {"records": taken, "ignored": len(stored - wanted)})
    write_checkpoint(run, State.READY)
    ignored = tuple(sorted(stored - wanted, key=lambda s: (s.party, s.shard)))
    return Done(ignored=ignored, center_seed=run.seeds.center, at=(0, 0), front=plan.partition.front), State.READY


def make_pool(run: Run, name: str, place: PoolPlace | None = None) -> Pool:
    """The pool `pool` of the records to train on, or `held-out`."""
    plan = present(run.plan)
    records = run.records if name == "pool" else present(run.manifest).records(held_out=True)
    shape = PoolShape.fit(records, _HEAD + _element_bytes(plan.data))
    return Pool(run.door, shape=shape, name=name, place=place)


def start_training(run: Run, course: Course, audited: tuple[int, int]) -> None:
    """Everything that training needs beside the pools, at this place of the run."""
    plan = present(run.plan)
    torch.set_num_threads(plan.training.threads)
    run.course, run.door.max_rms = course, plan.center.max_rms
    run.audit = Audit(plan.center.audit_rate, plan.center.audit_steps, runs=audited[0], audited=audited[1])
    make_zones(run)


def _shard_rows(
    run: Run, plan: Plan, first: RecordRef, entry: ManifestShard, place: tuple[int, int], *, seen: Seen, sieve: Sieve
) -> Iterator[bytes]:
    """Rows of one shard, each checked, but for those in quarantine; raises with the shard and its party named."""
    step = f"ingest shard {first.shard} of {first.party}"
    name = f"shards/{first.party}/{first.shard}"
    prefix = run.door.read_up_to(name, offset=0, length=shards.MAX_HEADER_BYTES + 64)
    envelope, offset = shards.read_header(io.BytesIO(prefix), step=step)
    key = plan.party(first.party).public_key
    header = shards.open_header(envelope, contributor=first.party, public_key=key, step=step)
    if (header.shard, header.root, header.records) != (entry.shard, entry.root, entry.records):
        raise IntegrityError(
            "ingest.other-shard",
            "the stored shard is not the one that the manifest names",
            step=step,
            fix=f"Have {first.party} send the shard that it listed, or start a new run with the new one.",
        )
    data_key = run.vault.parties[first.party].data_key
    chunks = _chunks(run.door, name, offset)
    tree = MerkleBuilder()
    for leaf, salt, record in shards.open_frames(header, data_key, chunks, schema=plan.data, step=step):
        reference = RecordRef(first.party, first.shard, leaf)
        commitment = commit(reference, salt=salt, record=record)
        tree.append(commitment)
        elements, label = _decode(plan.data, record, leaf, step)
        seen.add(record)
        if entry.held_out or sieve.keeps(reference, commitment, label, step=step):
            head = np.array((*place, leaf, label), dtype=_PLACE).tobytes()
            yield head + commitment + elements.tobytes()
    if not same(to_text(tree.root()), entry.root):
        raise LineageError(
            "ingest.other-root",
            "the records do not hash to the root that the contributor committed to",
            step=step,
            fix=f"{first.party} used a modified client: exclude it, or have it seal its records again.",
        )


def _chunks(door: Door, name: str, offset: int) -> Iterator[bytes]:
    while chunk := door.read_up_to(name, offset=offset, length=_CHUNK):
        yield chunk
        offset += len(chunk)


def _decode(schema: DataSchema, record: bytes, leaf: int, step: str) -> tuple[NDArray[np.generic], int]:
    """The record, or the error that says whose it is."""
    try:
        return decode_record(schema, record)
    except DataError as error:
        raise DataError(error.code, f"leaf {leaf}: {error.what}", step=step, fix=error.fix) from None


def _refuse_duplicates(party: ManifestParty, seen: Seen) -> None:
    """A record twice, in one shard of the party's or in two, would count twice."""
    at = seen.repeated()
    for entry in party.shards:
        if at is not None and at < entry.records:
            raise DataError(
                "ingest.duplicate-record",
                f"leaf {at} repeats a record of the same contributor",
                step=f"ingest shard {entry.shard} of {party.name}",
                fix="The contributor removes the copy and seals again.",
            )
        at = None if at is None else at - entry.records


def _element_bytes(schema: DataSchema) -> int:
    return int(np.prod(schema.shape)) * schema.numpy_dtype.itemsize


def unpack(rows: Rows, schema: DataSchema) -> tuple[Tensor, Tensor]:
    """Elements (N, C, H, W) in the schema's type and labels (N,) int64 of pool rows."""
    # A copy of its own, aligned and writable, as torch wants it: a lone row would be a view of what was read.
    elements = rows[:, _HEAD:].copy().view(schema.numpy_dtype).reshape(-1, *schema.shape)
    return torch.from_numpy(elements), torch.from_numpy(_places(rows)["label"].astype(np.int64))


def lineage(rows: Rows, manifest: RunManifest) -> Iterator[tuple[RecordRef, bytes]]:
    """(reference, commitment) of each pool row."""
    commitments = rows[:, _PLACE.itemsize : _HEAD]
    for place, commitment in zip(_places(rows), commitments, strict=True):
        party = manifest.parties[int(place["party"])]
        yield RecordRef(party.name, party.shards[int(place["shard"])].shard, int(place["leaf"])), commitment.tobytes()


def contributors_of(rows: Rows) -> Tensor:
    """Of each pool row its contributor's number in the manifest: (N,) int64."""
    return torch.from_numpy(_places(rows)["party"].astype(np.int64))


def record_keys(rows: Rows) -> NDArray[np.uint64]:
    """One number for each pool row: that of `record_key`."""
    place = _places(rows)
    return record_key(place["party"], place["shard"], place["leaf"])


def record_key(party: NDArray[np.uint32], shard: NDArray[np.uint32], leaf: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Numbers of party and shard in the manifest, and the leaf, as one number: no two records share one."""
    source = party.astype(np.uint64) * np.uint64(MAX_SHARDS) + shard
    return np.asarray((source << np.uint64(32)) | leaf)


def _places(rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.ascontiguousarray(rows[:, : _PLACE.itemsize]).view(_PLACE).reshape(-1)
