"""Uploading sealed shards: whatever a client sends, only a whole shard that its contributor signed is kept."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import pytest

from caltrain.host import uploads
from caltrain.host.api import create_app
from caltrain.host.conductor import Conductor
from caltrain.host.store import Store
from caltrain.plan import RunManifest
from caltrain.records import shard as shards
from caltrain.records.schema import DataSchema
from support.asgi import Answered, call
from support.disk import files_end_at, small_disk, tree
from support.members import Member, Shard
from support.samples import plan, signer

PLAN = plan()
HEADER_AT = len(shards.MAGIC) + 4
OTHER_SCHEMA = msgspec.structs.replace(PLAN.data, classes=("cat", "dog", "emu"))
TEN_GIGABYTES = "10000000000"


def sealed(name: str = "alpha", *, schema: DataSchema = PLAN.data) -> Shard:
    """A shard of three records."""
    member = Member(name, signer=signer(name))
    images = np.random.default_rng(7).integers(0, 256, (3, *schema.shape)).astype(np.uint8)
    member.seal(schema, images, [0, 1, 2], shard_records=3)
    return member.shards[0]


@dataclass
class Host:
    """The application over an empty store."""

    store: Store

    def __post_init__(self) -> None:
        self.conductor = conductor = Conductor(PLAN, self.store, root_secret=bytes(32), auto_start=True)
        self.woken: list[bool] = []
        conductor.notify = lambda: self.woken.append(True)  # type: ignore[method-assign]
        self.app = create_app(conductor)

    def put(
        self,
        shard: Shard,
        chunks: Iterable[bytes] | None = None,
        *,
        party: str = "alpha",
        name: str | None = None,
        length: str | None = None,
        breaks_off: bool = False,
    ) -> Answered:
        """PUT a shard, or other bytes in its place."""
        path = f"/v1/parties/{party}/shards/{shard.header.shard if name is None else name}"
        body = [shard.raw] if chunks is None else chunks
        return call(self.app, "PUT", path, chunks=body, length=length, breaks_off=breaks_off)

    def kept_nothing(self) -> None:
        """Not a byte of the upload is left, and the run was not woken for it."""
        assert tree(self.store.root) == {}
        assert not self.woken


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host without shards."""
    return Host(Store(tmp_path / "host"))


def pieces(raw: bytes, size: int) -> list[bytes]:
    """`raw` in pieces."""
    return [raw[i : i + size] for i in range(0, len(raw), size)]


@pytest.mark.parametrize("size", [1, 20, 21, 22, 700, 1 << 16])
def test_a_whole_shard_is_kept_as_it_was_sent(host: Host, size: int) -> None:
    shard = sealed()
    got = host.put(shard, pieces(shard.raw, size), length=str(len(shard.raw)))
    assert got.status == 200
    assert msgspec.json.decode(got.body, type=shards.ShardHeader) == shard.header
    assert tree(host.store.root) == {f"shards/alpha/{shard.header.shard}": shard.raw}
    assert host.woken


def test_after_the_manifest_a_shard_that_is_there_is_not_replaced(host: Host) -> None:
    shard = sealed()
    assert host.put(shard).status == 200
    before = tree(host.store.root)
    host.conductor.manifest = cast(RunManifest, object())
    got = host.put(shard, [shard.raw[: shard.frames_at], bytes(len(shard.raw) - shard.frames_at)])
    assert got.status == 200  # an honest party that sends its shard again is not in the wrong
    assert tree(host.store.root) == before


def header_bits(shard: Shard) -> Iterator[bytes]:
    """The shard with one bit of magic, header length or header flipped: 100 of all the places."""
    places = [(byte, bit) for byte in range(shard.frames_at) for bit in range(8)]
    for byte, bit in random.Random(1).sample(places, 100):
        changed = bytearray(shard.raw)
        changed[byte] ^= 1 << bit
        yield bytes(changed)


def test_a_flipped_bit_in_front_of_the_frames_is_refused(host: Host) -> None:
    shard = sealed()
    expected = {"signature.invalid", "envelope.malformed", "shard.damaged", "upload.cut-short"}
    for changed in header_bits(shard):
        got = host.put(shard, [changed])
        got.refused(422, got.error["code"])
        assert got.error["code"] in expected
    host.kept_nothing()


def relabelled(shard: Shard, **changes: object) -> list[bytes]:
    """The shard under a header that alpha really signed, but which says something else."""
    header = msgspec.structs.replace(shard.header, **changes)
    envelope = msgspec.json.encode(signer("alpha").sign("shard-header", header))
    return [shards.MAGIC + struct.pack("<I", len(envelope)) + envelope + shard.raw[shard.frames_at :]]


Change = Callable[[Shard], list[bytes]]
REFUSED: dict[str, tuple[Change, int, str]] = {
    "empty": (lambda _: [], 422, "upload.cut-short"),
    "shorter by a byte": (lambda s: [s.raw[:-1]], 422, "upload.cut-short"),
    "shorter by a record": (lambda s: [s.raw[: -s.header.frame_bytes]], 422, "upload.cut-short"),
    "without frames": (lambda s: [s.raw[: s.frames_at]], 422, "upload.cut-short"),
    "cut in its header": (lambda s: [s.raw[: s.frames_at - 1]], 422, "upload.cut-short"),
    "cut in its magic": (lambda s: [s.raw[:5]], 422, "upload.cut-short"),
    "longer by a byte": (lambda s: [s.raw, b"\0"], 413, "upload.too-large"),
    "longer by a record": (lambda s: [s.raw + bytes(s.header.frame_bytes)], 413, "upload.too-large"),
    "another magic": (lambda s: [b"CALTRAIN-SHARD-2\n" + s.raw[17:]], 422, "shard.damaged"),
    "a header without end": (lambda s: [shards.MAGIC + b"\xff" * 4 + bytes(1 << 15)], 422, "shard.damaged"),
    "no header": (lambda s: [shards.MAGIC + bytes(4) + s.raw[s.frames_at :]], 422, "shard.damaged"),
    "of another contributor": (lambda _: [sealed("beta").raw], 422, "signature.invalid"),
    "in another's name": (lambda s: relabelled(s, contributor="beta"), 422, "shard.damaged"),
    "for another schema": (lambda _: [sealed(schema=OTHER_SCHEMA).raw], 422, "upload.other-name"),
    "with frames of another size": (lambda s: relabelled(s, frame_bytes=1 << 20), 422, "upload.other-schema"),
    "with another schema's digest": (
        lambda s: relabelled(s, schema=OTHER_SCHEMA.digest()),
        422,
        "upload.other-schema",
    ),
    "that announces more records": (lambda s: relabelled(s, records=4), 422, "upload.cut-short"),
    "that announces fewer records": (lambda s: relabelled(s, records=2), 413, "upload.too-large"),
}


@pytest.mark.parametrize("size", [0, 50])
@pytest.mark.parametrize("what", REFUSED)
def test_no_other_body_is_kept(host: Host, what: str, size: int) -> None:
    change, status, code = REFUSED[what]
    shard = sealed()
    body = change(shard)
    host.put(shard, pieces(b"".join(body), size) if size else body).refused(status, code)
    host.kept_nothing()


def test_a_shard_of_another_schema_is_refused_under_its_own_name(host: Host) -> None:
    host.put(sealed(schema=OTHER_SCHEMA)).refused(422, "upload.other-schema")
    host.kept_nothing()


@pytest.mark.parametrize("name", ["0" * 32, "..", "%2e%2e", "x" * 500, "a\nb", " "])
def test_a_shard_is_kept_under_its_own_name_only(host: Host, name: str) -> None:
    host.put(sealed(), name=name).refused(422, "upload.other-name")
    host.kept_nothing()


@pytest.mark.parametrize("name", ["../../plan.json", "a/b", ""])
def test_a_name_with_slashes_is_no_request(host: Host, name: str) -> None:
    host.put(sealed(), name=name).refused(404, "http.no-such-route")
    host.kept_nothing()


@pytest.mark.parametrize("party", ["mallory", "..", "ALPHA", "una", "alpha\n", "alpha "])
def test_nobody_but_the_plans_parties_may_send_shards(host: Host, party: str) -> None:
    fields = host.put(sealed(), party=party).refused(403, "party.unknown")
    assert fields["family"] == "AccessError"
    host.kept_nothing()


def test_a_party_may_not_send_under_another_partys_name(host: Host) -> None:
    host.put(sealed("alpha"), party="beta").refused(422, "signature.invalid")
    host.kept_nothing()


def endless() -> Iterator[bytes]:
    """Zeros without end; whoever takes more than a little of them is broken."""
    for _ in range(100):
        yield bytes(1 << 16)
    raise AssertionError("the host goes on reading")


@pytest.mark.parametrize("length", [TEN_GIGABYTES, "9" * 5000, "-1", "ten", "1e9", "١٢", ""])
def test_a_length_that_no_shard_has_is_refused_unread(host: Host, length: str) -> None:
    got = host.put(sealed(), endless(), length=length)
    got.refused(413, "upload.too-large")
    assert got.pulled == 0
    host.kept_nothing()


@pytest.mark.parametrize("length", [None, "1"])
def test_more_than_the_header_announces_is_not_read_on(host: Host, length: str | None) -> None:
    shard = sealed()

    def body() -> Iterator[bytes]:
        yield shard.raw
        yield from endless()

    got = host.put(shard, body(), length=length)
    got.refused(413, "upload.too-large")
    assert got.pulled <= len(shard.raw) + (1 << 16)
    host.kept_nothing()


def test_garbage_without_end_is_not_read_on(host: Host) -> None:
    got = host.put(sealed(), endless())
    got.refused(422, "shard.damaged")
    assert got.pulled == 1 << 16
    host.kept_nothing()


def test_a_shard_that_announces_more_than_the_host_takes_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sealed()
    monkeypatch.setattr(uploads, "MAX_SHARD_BYTES", len(shard.raw) - 1)
    got = host.put(shard)
    got.refused(413, "upload.too-large")
    host.kept_nothing()


@pytest.mark.parametrize("taken", [0, 10, 400, -1])
def test_an_upload_that_breaks_off_leaves_nothing(host: Host, taken: int) -> None:
    shard = sealed()
    host.put(shard, [shard.raw[:taken]], breaks_off=True).refused(422, "upload.cut-short")
    host.kept_nothing()


def test_an_upload_that_breaks_off_leaves_the_shard_that_was_there(host: Host) -> None:
    shard = sealed()
    host.put(shard)
    before = tree(host.store.root)
    host.put(shard, [shard.raw[:-1]]).refused(422, "upload.cut-short")
    assert tree(host.store.root) == before


def test_a_party_can_send_a_shard_again(host: Host) -> None:
    shard = sealed()
    assert host.put(shard, [shard.raw[:-1] + b"!"]).status == 200
    assert host.put(shard).status == 200
    assert tree(host.store.root) == {f"shards/alpha/{shard.header.shard}": shard.raw}


def test_a_party_can_send_so_many_shards_and_each_of_them_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_SHARDS", 2)
    first, second, third = (sealed() for _ in range(3))
    assert host.put(first).status == host.put(second).status == 200
    before = tree(host.store.root)
    host.put(third).refused(409, "upload.too-many")
    assert tree(host.store.root) == before
    assert host.put(first).status == 200
    assert host.put(sealed("beta"), party="beta").status == 200


def test_a_disk_that_is_full_is_said_so_and_nothing_half_stays(host: Host) -> None:
    shard = sealed()
    with files_end_at(len(shard.raw) - 1):
        got = host.put(shard)
    got.refused(507, "storage.full")
    host.kept_nothing()
    assert host.put(shard).status == 200


def test_a_small_disk_that_really_runs_full_keeps_nothing_half(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        host = Host(Store(disk))
        (disk / "filler").write_bytes(bytes(64 << 10))
        shard = sealed()
        host.put(shard).refused(507, "storage.full")
        (disk / "filler").unlink()
        host.kept_nothing()
        assert host.put(shard).status == 200
