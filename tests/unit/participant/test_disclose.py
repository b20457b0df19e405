"""Disclosing a record: ours, whole, signed, and nobody else's."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest

from caltrain.crypto.dsse import open_envelope
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import IntegrityError, LineageError
from caltrain.participant.disclose import disclose, note_disclosure, refuse
from caltrain.participant.identity import Identity
from caltrain.participant.seal import shard_path
from caltrain.plan import Reader
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure, Refusal, check_disclosure
from caltrain.records.shown import Reading, SealedDisclosure, open_disclosure
from support.folders import identity_of
from support.samples import refused
from support.scripted_host import ScriptedHost
from support.world import World
from support.worlds import finished_world

MODEL = "sha256:" + "1" * 64


@pytest.fixture
def world() -> World:
    """A world in which nothing has happened."""
    return World()


@pytest.fixture
def finished() -> World:
    """A world whose run is over."""
    return finished_world()


@pytest.fixture
def alpha(world: World, tmp_path: Path) -> Identity:
    """A party with two shards."""
    return identity_of(world.parties["alpha"], tmp_path / "alpha")


def reference(world: World, leaf: int, *, shard: int = 0) -> RecordRef:
    """One of alpha's records."""
    return RecordRef("alpha", world.parties["alpha"].shards[shard].header.shard, leaf)


@pytest.mark.parametrize(("shard", "leaf"), [(0, 0), (0, 4), (1, 3)])
def test_a_record_is_disclosed_with_what_proves_it(world: World, alpha: Identity, shard: int, leaf: int) -> None:
    own = world.parties["alpha"].shards[shard]
    envelope, commitment = disclose(alpha, world.plan, reference(world, leaf, shard=shard), model=MODEL)
    found = open_envelope(envelope, "disclosure", alpha.signer.public, Disclosure, step="test")
    assert commitment == "sha256:" + own.commitment(leaf).hex()
    assert base64.b64decode(found.record) == own.records[leaf]
    assert base64.b64decode(found.salt) == own.salts[leaf]
    header = own.header
    assert check_disclosure(found, root=header.root, records=header.records, commitment=commitment) == own.records[leaf]


def test_what_we_do_not_have_is_not_disclosed(world: World, alpha: Identity) -> None:
    known = reference(world, 0).shard
    for wanted in (
        RecordRef("alpha", known, 5),  # the shard has five records
        RecordRef("alpha", known, 1 << 31),
        RecordRef("alpha", known, -1),
        RecordRef("alpha", "0" * 32, 0),
        RecordRef("alpha", "../shards/" + known, 6),
        RecordRef("beta", known, 0),
        RecordRef("beta", world.parties["beta"].shards[0].header.shard, 0),
    ):
        with refused(LineageError, "disclose.no-such-record") as caught:
            disclose(alpha, world.plan, wanted, model=MODEL)
        assert wanted.shard in caught.value.what


def test_a_shard_under_another_name_is_not_disclosed_from(world: World, alpha: Identity) -> None:
    path = shard_path(alpha, reference(world, 0).shard)
    path.rename(shard_path(alpha, "0" * 32))
    with refused(IntegrityError, "seal.misnamed"):
        disclose(alpha, world.plan, RecordRef("alpha", "0" * 32, 0), model=MODEL)


@pytest.mark.parametrize("at", [-1, 0, 200])
def test_from_a_damaged_shard_nothing_is_disclosed(world: World, alpha: Identity, at: int) -> None:
    path = shard_path(alpha, reference(world, 0).shard)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError):
        disclose(alpha, world.plan, reference(world, 0), model=MODEL)


def test_the_disclosure_is_noted_in_the_chain(finished: World, tmp_path: Path) -> None:
    alpha = identity_of(finished.parties["alpha"], tmp_path / "alpha")
    host, run = ScriptedHost(finished), finished.run.vault.run
    _, commitment = disclose(alpha, finished.plan, reference(finished, 2), model=MODEL)
    with host.client() as client:
        note_disclosure(client, alpha, run=run, commitment=commitment)
        last = finished.chain()[-1]
        assert (last.kind, last.body) == ("disclosure", {"party": "alpha", "commitment": commitment})
        with refused(IntegrityError, "disclosure.not-own"):
            note_disclosure(client, alpha, run=run, commitment="sha256:" + "0" * 64)
    assert finished.chain()[-1] == last


def test_where_the_plan_names_readers_they_alone_are_shown_the_record(world: World, alpha: Identity) -> None:
    una, pat = (Reading(name, HpkePrivateKey()) for name in ("una", "pat"))
    readers = tuple(Reader(name=reading.name, encryption_key=reading.key.public) for reading in (una, pat))
    spec = msgspec.structs.replace(world.plan.trace, disclose_to=readers)
    plan, own = msgspec.structs.replace(world.plan, trace=spec), world.parties["alpha"].shards[0]
    envelope, commitment = disclose(alpha, plan, reference(world, 2), model=MODEL)
    sealed = open_envelope(envelope, "sealed-disclosure", alpha.signer.public, SealedDisclosure, step="test")
    assert set(sealed.readers) == {"una", "pat"}
    assert commitment == "sha256:" + own.commitment(2).hex()
    assert base64.b64encode(own.records[2]) not in base64.b64decode(sealed.sealed)
    for reading in (una, pat):
        opened = open_disclosure(sealed, reading)
        found = open_envelope(opened, "disclosure", alpha.signer.public, Disclosure, step="test")
        assert base64.b64decode(found.record) == own.records[2]


def test_a_refusal_is_signed_and_names_record_and_model(world: World, alpha: Identity) -> None:
    envelope = refuse(alpha, reference(world, 1), model=MODEL)
    found = open_envelope(envelope, "refusal", alpha.signer.public, Refusal, step="test")
    assert found == Refusal(record_ref=reference(world, 1), model=MODEL)
    with refused(LineageError, "disclose.no-such-record"):
        refuse(alpha, RecordRef("beta", world.parties["beta"].shards[0].header.shard, 0), model=MODEL)
