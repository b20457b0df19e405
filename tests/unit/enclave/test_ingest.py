"""Ingest: only the manifest's records, as their contributors committed to them, get in; anything else stops the run."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.enclave.ingest import lineage, unpack
from caltrain.enclave.run import State, present
from caltrain.enclave.session import handle
from caltrain.errors import EnvironmentFault
from caltrain.records.commitment import RecordRef
from caltrain.records.schema import DataSchema, decode_record, encode_record
from caltrain.records.shard import MAGIC, key_id
from caltrain.training.seeds import RunSeeds
from support.members import Member, Shard
from support.world import World, pictures

_LABEL_AT, _SHAPE_AT, _DATA_AT = 18, 6, 22


def raw_of(world: World, party: str, number: int) -> bytearray:
    """The stored shard."""
    return world.host.storage[name_of(world, party, number)]


def name_of(world: World, party: str, number: int) -> str:
    return f"shards/{party}/{world.parties[party].shards[number].entry.shard}"


def refused(world: World, code: str, party: str, number: int) -> None:
    """Ingest stops with this error, which names the shard; nothing was taken in and the host got no seed."""
    shard = world.parties[party].shards[number].entry.shard
    assert world.refused(world.ingest(), code)["step"] == f"ingest shard {shard} of {party}"
    assert world.run.pool is None
    assert world.run.front is None


# --- a host that changes what it stores -----------------------------------------------------------------------------


def test_a_bit_flipped_anywhere_in_a_shard_is_noticed() -> None:
    world = World().run_to(State.AGREED)
    request = world.ingest()
    shard = world.parties["alpha"].shards[0]
    raw = raw_of(world, "alpha", 0)
    found: dict[str, int] = {}
    for position in range(len(raw)):
        raw[position] ^= 1 << (position * 5 % 8)
        reply = handle(world.run, request)
        assert isinstance(reply, m.Failed), f"byte {position} may be changed"
        assert reply.fatal
        assert shard.header.shard in reply.error["step"]
        found[reply.error["code"]] = found.get(reply.error["code"], 0) + 1
        raw[position] ^= 1 << (position * 5 % 8)
        world.run.state = State.AGREED  # as if nothing had happened: the next byte, please
    assert set(found) <= {"shard.damaged", "envelope.malformed", "signature.invalid", "sealed.not-authentic"}
    assert found["sealed.not-authentic"] == len(raw) - shard.frames_at
    world.done(request)


@pytest.mark.parametrize(
    "keep",
    [
        lambda s: 0,
        lambda s: len(MAGIC) + 3,
        lambda s: s.frames_at - 1,
        lambda s: s.frames_at,
        lambda s: s.frames_at + 1,
        lambda s: len(s.raw) - s.header.frame_bytes,
        lambda s: len(s.raw) - 1,
    ],
    ids=["nothing", "no length", "part of the header", "header only", "part of a frame", "a frame less", "a byte less"],
)
def test_a_truncated_shard_is_refused(keep: Callable[[Shard], int]) -> None:
    world = World().run_to(State.AGREED)
    world.upload()
    del raw_of(world, "beta", 1)[keep(world.parties["beta"].shards[1]) :]
    refused(world, "shard.damaged", "beta", 1)


@pytest.mark.parametrize("extra", [b"\0", bytes(200)], ids=["a byte", "frames"])
def test_bytes_after_the_last_frame_are_refused(extra: bytes) -> None:
    world = World().run_to(State.AGREED)
    world.upload()
    raw_of(world, "beta", 1).extend(extra)
    refused(world, "shard.damaged", "beta", 1)


def swap_frames(world: World) -> None:
    shard, raw = world.parties["beta"].shards[0], raw_of(world, "beta", 0)
    size, start = shard.header.frame_bytes, shard.frames_at
    first, second = raw[start : start + size], raw[start + size : start + 2 * size]
    raw[start : start + 2 * size] = second + first


def repeat_frame(world: World) -> None:
    shard, raw = world.parties["beta"].shards[0], raw_of(world, "beta", 0)
    size, start = shard.header.frame_bytes, shard.frames_at
    raw[start + size : start + 2 * size] = raw[start : start + size]


def header_of_another_shard(world: World) -> None:
    mine, other = world.parties["beta"].shards
    frames = mine.raw[mine.frames_at :][: len(other.records) * other.header.frame_bytes]
    raw_of(world, "beta", 1)[:] = other.raw[: other.frames_at] + frames


def another_shard_of_the_party(world: World) -> None:
    raw_of(world, "beta", 0)[:] = world.parties["beta"].shards[1].raw


def shard_of_another_party(world: World) -> None:
    raw_of(world, "beta", 0)[:] = world.parties["alpha"].shards[0].raw


def empty(world: World) -> None:
    beta, schema = world.parties["beta"], world.plan.data
    listed = beta.shards[0].header
    raw_of(world, "beta", 0)[:] = beta.forge(schema, [], shard=listed.shard, root=listed.root).raw


def sealed_again(world: World) -> None:
    beta = world.parties["beta"]
    again = beta.forge(world.plan.data, beta.shards[0].records, shard=beta.shards[0].header.shard)
    raw_of(world, "beta", 0)[:] = again.raw


STORED: dict[str, tuple[Callable[[World], None], str, int]] = {
    "two frames in the other order": (swap_frames, "sealed.not-authentic", 0),
    "a frame in the place of the next": (repeat_frame, "sealed.not-authentic", 0),
    "the header of another shard before our frames": (header_of_another_shard, "sealed.not-authentic", 1),
    "another shard of the same party": (another_shard_of_the_party, "ingest.other-shard", 0),
    "a shard of another party": (shard_of_another_party, "signature.invalid", 0),
    "a header of no records": (empty, "payload.malformed", 0),
    "the same records, sealed again": (sealed_again, "ingest.other-shard", 0),
}


@pytest.mark.parametrize("name", STORED)
def test_a_shard_that_is_not_where_and_what_it_was_is_refused(name: str) -> None:
    attack, code, number = STORED[name]
    world = World().run_to(State.AGREED)
    world.upload()
    attack(world)
    refused(world, code, "beta", number)


def test_a_shard_that_the_host_does_not_have_is_named_before_anything_is_read() -> None:
    world = World().run_to(State.AGREED)
    request, gone = world.ingest(), world.parties["gamma"].shards[1].header.shard
    world.host.log.clear()
    stored = tuple(s for s in request.stored if s.shard != gone)
    error = world.refused(m.Ingest(stored), "ingest.missing-shard")
    assert gone in error["what"]
    assert "gamma" in error["what"]
    assert not world.host.log


def test_a_shard_that_the_host_only_says_it_has_stops_the_run() -> None:
    world = World().run_to(State.AGREED)
    request = world.ingest()
    del world.host.storage[name_of(world, "gamma", 0)]
    world.refused(request, "storage.missing")


def test_a_shard_that_never_ends_is_refused() -> None:
    world = World().run_to(State.AGREED)

    def endless(call: m.Read) -> m.Answer:
        honest = world.host.read(call)
        assert isinstance(honest, m.Data)
        return m.Data(honest.data + bytes(call.length - len(honest.data)))

    world.host.on_read = endless
    refused(world, "shard.damaged", "alpha", 0)


def test_a_full_disk_under_the_pool_stops_the_run() -> None:
    world = World().run_to(State.AGREED)
    full = EnvironmentFault("storage.full", "the disk is full", step="write", fix="Free some.").diagnostics()
    world.host.on_write = lambda _call: m.CallFailed(full)
    world.refused(world.ingest(), "storage.full")


# --- a party with a modified client ---------------------------------------------------------------------------------

Forge = Callable[[Member, DataSchema], Shard]


def relabelled(record: bytes, label: int) -> bytes:
    return record[:_LABEL_AT] + struct.pack("<I", label) + record[_DATA_AT:]


def reshaped(record: bytes, shape: tuple[int, int, int]) -> bytes:
    return record[:_SHAPE_AT] + struct.pack("<3I", *shape) + record[_LABEL_AT:]


def of(change: Callable[[list[bytes]], list[bytes]], /, **header: Any) -> Forge:
    """A shard over changed records of the honest one."""
    return lambda member, schema: member.forge(schema, change(member.shards[1].records), **header)


def last(change: Callable[[bytes], bytes]) -> Forge:
    """A shard whose last record is changed."""
    return of(lambda records: [*records[:-1], change(records[-1])])


def poisoned(member: Member, schema: DataSchema) -> Shard:
    """Committed to clean records, sealed others."""
    clean = member.shards[1]
    poison = [relabelled(record, (record[_LABEL_AT] + 1) % 3) for record in clean.records]
    return member.forge(schema, poison, root=clean.header.root)


def across_shards(member: Member, schema: DataSchema) -> Shard:
    return member.forge(schema, [*member.shards[1].records, member.shards[0].records[2]])


def listed_by_another_id(member: Member, schema: DataSchema) -> Shard:
    """Records and root are those of the listed id, only the header has another."""
    shard = member.forge(schema, member.shards[1].records, place="ab" * 16, shard="cd" * 16)
    shard.listed = {"shard": "ab" * 16}
    return shard


def listed_as(**listed: Any) -> Forge:
    def forge(member: Member, schema: DataSchema) -> Shard:
        shard = member.forge(schema, member.shards[1].records)
        shard.listed = listed
        return shard

    return forge


CLIENT: dict[str, tuple[Forge, str]] = {
    "committed to other records": (poisoned, "ingest.other-root"),
    "a record twice in one shard": (of(lambda records: [*records, records[0]]), "ingest.duplicate-record"),
    "a record in two shards": (across_shards, "ingest.duplicate-record"),
    "a label outside the classes": (last(lambda r: relabelled(r, 3)), "record.label"),
    "another shape of the same size": (last(lambda r: reshaped(r, (1, 2, 8))), "record.shape"),
    "another element type": (last(lambda r: r[:4] + b"\x02" + r[5:]), "record.shape"),
    "another magic": (last(lambda r: b"CTR2" + r[4:]), "record.shape"),
    "more records than frames": (of(lambda r: r, records=5), "shard.damaged"),
    "fewer records than frames": (of(lambda r: r, records=3), "shard.damaged"),
    "no frames": (of(lambda _r: [], records=1), "shard.damaged"),
    "another schema": (of(lambda r: r, schema="sha256:" + "0" * 64), "shard.damaged"),
    "frames of another size": (of(lambda r: r, frame_bytes=1), "shard.damaged"),
    "another data key": (of(lambda r: r, key_id=key_id(bytes(32))), "shard.damaged"),
    "listed by another id": (listed_by_another_id, "ingest.other-shard"),
    "listed with another root": (listed_as(root="sha256:" + "0" * 64), "ingest.other-shard"),
    "listed with more records": (listed_as(records=5), "ingest.other-shard"),
    "listed with fewer records": (listed_as(records=3), "ingest.other-shard"),
    "another contributor": (of(lambda r: r, contributor="alpha"), "shard.damaged"),
}


@pytest.mark.parametrize("name", CLIENT)
def test_what_an_honest_client_would_not_seal_is_refused(name: str) -> None:
    forge, code = CLIENT[name]
    world = World()
    beta = world.parties["beta"]
    beta.shards[1] = forge(beta, world.plan.data)
    refused(world.run_to(State.AGREED), code, "beta", 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_record_that_is_not_finite_is_refused(value: float) -> None:
    world = World(dtype="f32")
    gamma = world.parties["gamma"]
    bad = np.array([value], "<f4").tobytes()
    records = [*gamma.shards[1].records[:-1], gamma.shards[1].records[-1][:-4] + bad]
    gamma.shards[1] = gamma.forge(world.plan.data, records)
    refused(world.run_to(State.AGREED), "record.not-finite", "gamma", 1)


def test_frames_under_another_key_than_the_one_handed_over_are_refused() -> None:
    world = World().run_to(State.AGREED)
    beta, honest = world.parties["beta"], world.parties["beta"].shards[0]
    beta.data_key = bytes(32)
    header = {name: getattr(honest.header, name) for name in ("shard", "root", "key_id")}
    world.host.storage[name_of(world, "beta", 0)] = bytearray(beta.forge(world.plan.data, honest.records, **header).raw)
    refused(world, "sealed.not-authentic", "beta", 0)


# --- what gets in ---------------------------------------------------------------------------------------------------


def taken_in(world: World) -> dict[RecordRef, tuple[bytes, int, bytes]]:
    """Every row of the pool: elements, label, commitment by reference."""
    pool, found = present(world.run.pool), {}
    rows = pool.rows(0, pool.shape.records)
    elements, labels = unpack(rows, world.plan.data)
    for x, label, (reference, commitment) in zip(elements, labels, lineage(rows, world.manifest), strict=True):
        found[reference] = (x.numpy().tobytes(), int(label), commitment)
    return found


@pytest.mark.parametrize("dtype", ["u8", "f32"])
def test_the_pool_holds_every_record_with_its_label_source_and_commitment(dtype: Any) -> None:
    world = World(dtype=dtype).run_to(State.READY)
    expected = {
        RecordRef(party.name, shard.header.shard, leaf): (
            (decoded := decode_record(world.plan.data, record))[0].tobytes(),
            decoded[1],
            shard.commitment(leaf),
        )
        for party in world.parties.values()
        for shard in party.shards
        for leaf, record in enumerate(shard.records)
    }
    assert taken_in(world) == expected


def test_the_host_learns_the_centers_seed_and_nothing_that_it_could_read() -> None:
    world = World().run_to(State.AGREED)
    reply, seeds = world.done(world.ingest()), RunSeeds.from_run_seed(world.run.seed)
    assert reply.center_seed == seeds.center
    came_out = bytes(world.host.enclave_end.sent) + msgspec.msgpack.encode(reply)
    secrets = [world.run.seed, seeds.front, seeds.head, seeds.order, seeds.augment, world.run.vault.randomness]
    for party in world.parties.values():
        secrets += [party.data_key, party.entropy]
        secrets += [record[_DATA_AT:] for shard in party.shards for record in shard.records]
    assert not [secret for secret in secrets if secret in came_out]


def test_a_shard_that_is_not_in_the_manifest_is_reported_and_not_read() -> None:
    world = World().run_to(State.AGREED)
    alpha = world.parties["alpha"]
    alpha.seal(world.plan.data, pictures(2, seed=77), [0, 1], shard_records=1)
    request = m.Ingest((m.StoredShard("zeta", "0" * 32), *world.ingest().stored))
    late = sorted(shard.header.shard for shard in alpha.shards[2:])
    reply = world.done(request)
    assert reply.ignored == (*(m.StoredShard("alpha", shard) for shard in late), m.StoredShard("zeta", "0" * 32))
    assert [e.body for e in world.chain() if e.kind == "ingest"] == [{"records": 27, "ignored": 3}]
    read = {crossing.message.name for crossing in world.host.log if isinstance(crossing.message, m.Read)}
    assert read == {name_of(world, party, number) for party in world.parties for number in range(2)}
    assert len(taken_in(world)) == 27


def test_two_parties_may_hold_the_same_record() -> None:
    world = World()
    beta, gamma = world.parties["beta"], world.parties["gamma"]
    gamma.shards = [gamma.forge(world.plan.data, shard.records) for shard in beta.shards]
    assert len(taken_in(world.run_to(State.READY))) == 27


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_it_does_not_matter_in_which_pieces_the_host_reads(size: int) -> None:
    world = World().run_to(State.AGREED)
    honest = world.host.read

    def in_pieces(call: m.Read) -> m.Answer:
        # The first read of a shard is for its header, and is one piece.
        return honest(call if call.offset == 0 else m.Read(call.name, call.offset, min(call.length, size)))

    world.host.on_read = in_pieces
    world.done(world.ingest())


def test_bytes_that_nobody_asked_for_are_not_looked_at() -> None:
    world = World().run_to(State.AGREED)
    honest = world.host.read

    def more(call: m.Read) -> m.Answer:
        answer = honest(call)
        if call.offset == 0 and isinstance(answer, m.Data) and len(answer.data) == call.length:
            return m.Data(answer.data + b"more")
        return answer

    world.host.on_read = more
    world.done(world.ingest())


def test_progress_is_told_shard_by_shard_up_to_all_records() -> None:
    world = World().run_to(State.READY)
    told = [c.message for c in world.host.log if isinstance(c.message, m.Progress)]
    assert [(p.phase, p.done, p.total) for p in told] == [("ingest", n, 27) for n in (5, 9, 14, 18, 23, 27)]


def test_a_two_way_plan_has_no_headnet_inside_and_a_ternary_one_has() -> None:
    assert World(head=0).run_to(State.READY).run.head is None
    assert World(head=2).run_to(State.READY).run.head is not None


def test_the_plan_says_how_many_threads_compute() -> None:
    world = World().run_to(State.AGREED)
    torch.set_num_threads(2)
    world.done(world.ingest())
    assert torch.get_num_threads() == world.plan.training.threads == 1


def test_a_lone_row_is_a_tensor_of_its_own() -> None:
    schema = World().plan.data
    record = encode_record(schema, pictures(1, seed=0)[0], 2)
    head = np.zeros(16, np.uint8)
    head[12] = 2
    row = head.tobytes() + bytes(32) + record[_DATA_AT:]
    elements, labels = unpack(np.frombuffer(row, np.uint8).reshape(1, -1), schema)
    assert elements.numpy().tobytes() == record[_DATA_AT:]
    assert labels.tolist() == [2]
    elements += 1  # would be a warning, and undefined, on what was read
