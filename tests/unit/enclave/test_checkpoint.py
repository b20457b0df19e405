"""Checkpoints: killed anywhere, a run ends with the bits of one that was not; what lies outside tells nothing."""

from __future__ import annotations

import msgspec
import pytest

from caltrain.crypto.aead import seal
from caltrain.crypto.digests import digest
from caltrain.enclave.checkpoint import CheckpointHeader, quorum_of
from caltrain.enclave.run import State, present
from caltrain.models.weights import encode_state
from support.recovery import DEEP, Killed, Killer, ends_as_if_undisturbed, planned, torn
from support.world import PARTIES, World

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])


def whole(head: int) -> World:
    """A run with all that a checkpoint has to hold: two cuts, held-out records, an audit, several a epoch."""
    change = planned(rate=1.0, steps=2, deepen=((1, 3),), model=DEEP)
    return World(head=head, records=12, held_out=2, epochs=2, change=change)


# --- killed -----------------------------------------------------------------------------------------------------


@FORMS
def test_killed_after_every_request_a_run_ends_with_the_same_bits(head: int) -> None:
    world, restarts = whole(head).run_to(State.AGREED), 0
    while world.run.state is not State.TRAINED:
        world.take_up()
        (world.take_in if world.run.state is State.AGREED else world.train)()
        restarts += 1
    assert restarts == 5  # ingest, two checkpoints in each of two epochs
    for state in (State.TRAINED, State.RELEASED, State.LINKED):
        world.run_to(state)
        world.take_up()
        assert world.run.state is State.TRAINED
    ends_as_if_undisturbed(world)
    kinds = [event.kind for event in world.chain()]
    assert [kinds.count(kind) for kind in ("resume", "release", "link")] == [8, 1, 1]


def moments(head: int) -> int:
    """How often the host acts in the whole run."""
    world = whole(head).run_to(State.AGREED)
    killer = Killer(world)
    world.run_to(State.LINKED)
    return killer.count


@FORMS
@pytest.mark.parametrize("part", range(2))
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(head: int, part: int) -> None:
    total = moments(head)
    assert total > 70
    for moment in range(1 + part * 4, total + 1, 8):
        world = whole(head).run_to(State.AGREED)
        Killer(world, moment)
        with pytest.raises(Killed):
            world.run_to(State.LINKED)
        world.host.be_honest()
        world.take_up()
        ends_as_if_undisturbed(world)


@FORMS
def test_killed_again_and_again_a_run_still_ends_with_the_same_bits(head: int) -> None:
    world, kills = whole(head).run_to(State.AGREED), 0
    for moment in range(4, 60, 4):
        Killer(world, moment)
        try:
            world.run_to(State.LINKED)
            break
        except Killed:
            kills += 1
        world.host.be_honest()
        world.take_up()
    assert kills > 5
    world.host.be_honest()
    ends_as_if_undisturbed(world)


@FORMS
@pytest.mark.parametrize("name", ["checkpoint-0", "checkpoint-1", "pool-0", "pool-1", "held-out-0", "held-out-1"])
@pytest.mark.parametrize("after", [0, 1, 40])
def test_torn_in_the_middle_of_a_write_the_last_checkpoint_still_counts(head: int, name: str, after: int) -> None:
    world = whole(head).run_to(State.READY)
    torn(world, name, after=after)
    with pytest.raises(Killed):
        world.run_to(State.LINKED)
    world.host.be_honest()
    world.take_up()
    ends_as_if_undisturbed(world)


def test_a_checkpoint_in_the_place_of_a_longer_one_is_found_and_opens() -> None:
    world = World(change=planned(steps=1)).run_to(State.READY)
    for name in ("checkpoint-0", "checkpoint-1"):
        world.host.storage[name] = bytearray(20_000)
    world.train()
    world.train()
    assert {len(world.host.storage[f"checkpoint-{i}"]) for i in range(2)} == {20_000}
    world.take_up()
    ends_as_if_undisturbed(world)


def test_the_two_places_are_written_in_turn_also_after_a_restart() -> None:
    world = World(change=planned(steps=1)).run_to(State.READY)
    places = [world.newest_checkpoint()]
    for _ in range(4):
        world.train()
        places.append(world.newest_checkpoint())
        world.take_up()
        assert world.newest_checkpoint() == places[-1]
    assert places == ["checkpoint-1", "checkpoint-0", "checkpoint-1", "checkpoint-0", "checkpoint-1"]


def test_the_chain_names_place_cut_and_state_of_every_checkpoint() -> None:
    world = whole(2).run_to(State.TRAINED)
    noted = [event.body for event in world.chain() if event.kind == "checkpoint"]
    places = [(b["state"], b.get("epoch"), b.get("step"), b.get("front")) for b in noted]
    assert places == [
        ("agreed", None, None, None),
        ("ready", 0, 0, 2),
        ("ready", 0, 2, 2),
        ("ready", 1, 0, 2),
        ("ready", 1, 2, 3),
        ("trained", 2, 0, 3),
    ]
    sealed = bytes(world.host.storage[world.newest_checkpoint()])
    assert (noted[-1]["sealed"], noted[-1]["size"]) == (digest("checkpoint/v1", sealed), len(sealed))


# --- what the host has of it ------------------------------------------------------------------------------------


@FORMS
def test_nothing_that_a_checkpoint_holds_lies_in_it_in_clear(head: int) -> None:
    world = World(head=head).run_to(State.READY)
    world.train()
    run = world.run
    secrets = [run.seed, run.vault.signing.private_bytes(), present(run.custody).key, present(run.pool).place.key]
    secrets += [part for party in run.vault.parties.values() for part in (party.data_key, party.entropy)]
    for zone in (run.front, run.head):
        if zone is not None:
            state = zone.state()
            assert any(name.startswith("momentum/") for name in state)
            secrets += [value.numpy().tobytes() for value in state.values() if value.numel() > 2]
            secrets.append(encode_state(state)[-64:])
    held = b"".join(bytes(raw) for raw in world.host.storage.values()) + bytes(world.host.enclave_end.sent)
    assert len(secrets) > 12
    assert not [secret for secret in secrets if any(secret) and secret in held]


def header_of(raw: bytes) -> CheckpointHeader:
    length = int.from_bytes(raw[:4], "little")
    return msgspec.msgpack.decode(raw[4 : 4 + length], type=CheckpointHeader)


def test_the_header_in_clear_names_run_and_plan_and_has_a_share_for_each_party() -> None:
    world = World().run_to(State.AGREED)
    header = header_of(bytes(world.host.storage["checkpoint-0"]))
    assert (header.run, header.plan) == (world.run.vault.run, world.plan.digest())
    assert set(header.shares) == set(PARTIES)
    assert len(set(header.shares.values())) == len(PARTIES)


def test_two_checkpoints_of_one_state_have_no_bytes_in_common() -> None:
    world = World(change=planned(steps=1)).run_to(State.READY)
    world.train()
    world.take_up()
    events, before = list(world.events), dict(world.host.storage)
    seen = []
    for _ in range(2):
        world.events, world.host.storage = list(events), {n: bytearray(v) for n, v in before.items()}
        world.take_up()
        world.train()
        seen.append(bytes(world.host.storage[world.newest_checkpoint()]))
    one, other = seen
    assert len(one) == len(other)
    headers = [header_of(raw) for raw in seen]
    assert headers[0].salt != headers[1].salt
    bodies = [raw[len(raw) - headers[0].size :] for raw in seen]
    blocks = [{raw[i : i + 16] for i in range(0, len(raw) - 15, 16)} for raw in bodies]
    assert not blocks[0] & blocks[1]


@FORMS
def test_a_shuffle_that_is_repeated_after_a_restart_repeats_no_ciphertext(head: int) -> None:
    """The order is the seed's, the key is not: a nonce or a key that followed from the seed would show here."""
    world = World(head=head, held_out=2, epochs=2).run_to(State.READY)
    events, before = list(world.events), {n: bytearray(v) for n, v in world.host.storage.items()}
    written: list[set[bytes]] = []
    rows: list[bytes] = []
    for _ in range(2):
        world.events, world.host.storage = list(events), {n: bytearray(v) for n, v in before.items()}
        world.take_up()
        world.train()
        pool = present(world.run.pool)
        rows.append(pool.rows(0, pool.shape.records).tobytes())
        raw = [bytes(world.host.storage[name]) for name in ("pool-1", "held-out-1")]
        written.append({part[i : i + 16] for part in raw for i in range(0, len(part) - 15, 16)})
    assert rows[0] == rows[1]
    assert not written[0] & written[1]


# --- the quorum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "needed"), [(0, 3), (1, 1), (2, 2), (3, 3)])
def test_the_quorum_is_all_parties_unless_the_plan_says_fewer(asked: int, needed: int) -> None:
    assert quorum_of(World(change=planned(quorum=asked)).plan) == needed


def test_fewer_shares_than_the_quorum_do_not_give_the_key() -> None:
    world = World(change=planned(quorum=2)).run_to(State.AGREED)
    key, raw = present(world.run.custody).key, bytes(world.host.storage["checkpoint-0"])
    header = header_of(raw)
    # All that one party and the host can open together: its own share, sealed to its data key.
    for party in world.parties.values():
        assert key not in b"".join((raw, party.data_key, *header.shares.values()))
    assert seal(key, b"", aad=b"")  # a key of the right form
