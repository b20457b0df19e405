"""The parties' words: each for this enclave, this nonce, this purpose and this run; a quorum of them opens it."""

from __future__ import annotations

import msgspec
import pytest

from caltrain.boundary import messages as m
from caltrain.crypto import shares
from caltrain.crypto.aead import seal
from caltrain.enclave.checkpoint import CheckpointHeader, _share_aad, _share_key
from caltrain.enclave.run import State
from support.members import Member
from support.recovery import ends_as_if_undisturbed, planned
from support.world import PARTIES, World


def resuming(*, quorum: int = 0) -> World:
    """A killed run whose new enclave waits for the parties."""
    world = World(change=planned(steps=1, quorum=quorum)).run_to(State.READY)
    world.train()
    world.restart()
    world.done(world.resume())
    return world


def goes_on(world: World) -> None:
    """After a word that failed the same enclave still takes the words of all parties."""
    for name in world.parties:
        done = world.done(world.rejoin(name))
    world.center_after(done)
    ends_as_if_undisturbed(world)


def test_a_word_for_another_nonce_or_a_second_time_is_refused() -> None:
    world = resuming()
    word = world.rejoin("alpha")
    world.done(word)
    world.refused(word, "nonce.unknown")
    unasked = world.attest("resume").binding
    other = msgspec.structs.replace(unasked, nonce="ab" * 32)
    run = world.chain_of_host()[-1].run
    envelope = world.parties["alpha"].rejoin(other, run=run, head=world.host_head)
    world.refused(m.Rejoin("alpha", envelope), "nonce.unknown")
    goes_on(world)


def test_a_word_of_an_earlier_restart_is_refused() -> None:
    world = resuming()
    words = [world.rejoin(name) for name in world.parties]
    world.restart()
    world.done(world.resume())
    for word in words:
        world.refused(word, "nonce.unknown")
    goes_on(world)


def test_the_words_of_one_restart_do_not_serve_a_second_enclave() -> None:
    """Even where the host gives the second enclave the same nonces."""
    world = resuming()
    nonces = ["0" * 63 + str(i) for i in range(3)]
    run = world.chain_of_host()[-1].run
    words = []
    for name, nonce in zip(world.parties, nonces, strict=True):
        binding = world.attest("resume", nonce=nonce).binding
        words.append(m.Rejoin(name, world.parties[name].rejoin(binding, run=run, head=world.host_head)))
    for word in words:
        world.done(word)
    assert world.run.state is State.READY
    world.restart()
    world.done(world.resume())
    for word, nonce in zip(words, nonces, strict=True):
        world.attest("resume", nonce=nonce)
        world.refused(word, "sealed.malformed")
    goes_on(world)


@pytest.mark.parametrize("purpose", ["training", "query"])
def test_no_evidence_for_another_purpose_is_given_while_a_run_is_taken_up(purpose: str) -> None:
    world = resuming()
    world.refused(m.Attest(purpose, "ab" * 32), "attest.purpose")  # type: ignore[arg-type]
    goes_on(world)


@pytest.mark.parametrize("state", [State.ENROLLING, State.LINKED])
def test_no_evidence_for_resuming_is_given_by_an_enclave_that_does_not(state: State) -> None:
    World(epochs=1).run_to(state).refused(m.Attest("resume", "ab" * 32), "attest.purpose")


def test_a_word_for_another_purpose_is_refused() -> None:
    world = resuming()
    binding = world.attest("resume").binding
    world.refused(m.Rejoin("alpha", world.parties["alpha"].provision(binding)), "signature.invalid")
    training = msgspec.structs.replace(world.attest("resume").binding, purpose="training")
    run = world.chain_of_host()[-1].run
    word = world.parties["alpha"].rejoin(training, run=run, head=world.host_head)
    world.refused(m.Rejoin("alpha", word), "sealed.malformed")
    goes_on(world)


def test_a_word_in_anothers_name_is_refused() -> None:
    world = resuming()
    word = world.rejoin("alpha")
    world.refused(m.Rejoin("beta", word.envelope), "signature.invalid")
    run, binding = world.chain_of_host()[-1].run, world.attest("resume").binding
    forged = world.parties["alpha"].rejoin(binding, run=run, head=world.host_head, sender="beta")
    world.refused(m.Rejoin("alpha", forged), "resume.other-sender")
    world.refused(m.Rejoin("nobody", word.envelope), "party.unknown")
    goes_on(world)


def test_a_model_user_is_no_party() -> None:
    world = resuming()
    run, binding = world.chain_of_host()[-1].run, world.attest("resume").binding
    word = world.users["una"].rejoin(binding, run=run, head=world.host_head)
    world.refused(m.Rejoin("una", word), "party.unknown")
    goes_on(world)


def test_a_word_with_another_data_key_is_refused() -> None:
    world = resuming()
    world.refused(world.rejoin("alpha", data_key=bytes(32)), "sealed.not-authentic")
    world.refused(world.rejoin("alpha", data_key=world.parties["beta"].data_key), "sealed.not-authentic")
    goes_on(world)


def test_a_word_for_another_run_is_refused() -> None:
    world = resuming()
    world.refused(world.rejoin("alpha", run="ab" * 16), "resume.other-run")
    goes_on(world)


@pytest.mark.parametrize("quorum", [0, 2, 3])
def test_fewer_words_than_the_quorum_do_not_open_it(quorum: int) -> None:
    world = resuming(quorum=quorum)
    needed = quorum or len(PARTIES)
    for name in PARTIES[: needed - 1]:
        assert world.done(world.rejoin(name)).state == ""
        world.done(world.rejoin(name))  # the same party twice is one party
    assert world.run.state is State.RESUMING
    assert (world.run.seed, world.run.manifest, world.run.front) == (b"", None, None)
    done = world.done(world.rejoin(PARTIES[needed - 1]))
    assert (done.state, done.at) == ("ready", (0, 1))
    assert world.chain()[-1].body == {"at": [0, 1], "parties": sorted(PARTIES[:needed])}
    world.center_after(done)
    ends_as_if_undisturbed(world)


@pytest.mark.parametrize("names", [("alpha", "beta"), ("gamma", "alpha"), ("beta", "gamma")])
def test_any_quorum_of_the_parties_opens_it(names: tuple[str, ...]) -> None:
    world = World(change=planned(quorum=2)).run_to(State.READY)
    world.train()
    world.take_up(*names)
    assert world.chain()[-1].body["parties"] == sorted(names)
    ends_as_if_undisturbed(world)


@pytest.mark.parametrize("first", [True, False])
def test_a_party_that_names_another_head_does_not_block_the_others(first: bool) -> None:
    world = resuming(quorum=2)
    lie = "sha256:" + "ab" * 32
    order = [("gamma", lie), ("alpha", None)]
    for name, head in order if first else reversed(order):
        assert world.done(world.rejoin(name, head=head)).state == ""
    done = world.done(world.rejoin("beta"))
    assert done.state == "ready"
    assert world.chain()[-1].body["parties"] == ["alpha", "beta"]
    world.center_after(done)
    ends_as_if_undisturbed(world)


def test_a_quorum_for_a_head_that_the_chain_does_not_end_in_opens_nothing_and_the_others_still_can() -> None:
    world = resuming(quorum=2)
    older = world.chain_of_host()[-2].digest()
    world.done(world.rejoin("gamma", head=older))
    world.refused(world.rejoin("beta", head=older), "resume.other-chain")
    world.done(world.rejoin("alpha"))
    done = world.done(world.rejoin("beta"))
    assert done.state == "ready"
    world.center_after(done)
    ends_as_if_undisturbed(world)


def test_a_party_may_correct_its_word() -> None:
    world = resuming()
    world.done(world.rejoin("alpha", head="sha256:" + "ab" * 32))
    goes_on(world)


def test_a_false_share_of_a_party_in_league_with_the_host_is_found() -> None:
    world = World(change=planned(quorum=2)).run_to(State.READY)
    name = world.newest_checkpoint()
    raw = bytes(world.host.storage[name])
    length = int.from_bytes(raw[:4], "little")
    header = msgspec.msgpack.decode(raw[4 : 4 + length], type=CheckpointHeader)
    alpha, run = world.parties["alpha"], world.run.vault.run
    false = shares.split(bytes(32), threshold=2, shares=3)[0]
    mine = seal(_share_key(alpha.data_key), false, aad=_share_aad(run, "alpha"))
    other = msgspec.structs.replace(header, shares=dict(header.shares) | {"alpha": mine})
    encoded = msgspec.msgpack.encode(other)
    world.restart()
    request = world.resume()
    world.host.storage[name] = bytearray(len(encoded).to_bytes(4, "little") + encoded + raw[4 + length :])
    world.done(request)
    world.done(world.rejoin("alpha"))
    world.refused(world.rejoin("beta"), "shares.inconsistent")
    world.host.storage[name] = bytearray(raw)
    world.take_up("beta", "gamma")
    ends_as_if_undisturbed(world)


def test_a_stranger_with_a_partys_data_key_is_still_no_party() -> None:
    world = resuming()
    thief = Member("alpha", data_key=world.parties["alpha"].data_key)
    run, binding = world.chain_of_host()[-1].run, world.attest("resume").binding
    world.refused(m.Rejoin("alpha", thief.rejoin(binding, run=run, head=world.host_head)), "signature.invalid")
    goes_on(world)
