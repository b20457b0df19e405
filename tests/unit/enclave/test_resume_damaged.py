"""A checkpoint that was torn, cut, flipped or exchanged: refused by name, and the sound one still opens."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest

from caltrain.boundary import messages as m
from caltrain.crypto.aead import seal
from caltrain.crypto.kdf import derive
from caltrain.enclave.checkpoint import CheckpointHeader
from caltrain.enclave.run import present
from support.recovery import ends_as_if_undisturbed, last_word, newest, older, trained, with_header


def flipped(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def flip(raw: bytes) -> bytes:
        place = at(raw) % len(raw)
        return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]

    return flip


def body_at(raw: bytes) -> int:
    return 4 + int.from_bytes(raw[:4], "little")


AT_ONCE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _raw: b"", "storage.short"),
    "three bytes": (lambda raw: raw[:3], "storage.short"),
    "a header of 4 GiB": (lambda raw: b"\xff" * 4 + raw[4:], "checkpoint.malformed"),
    "a header of no bytes": (lambda raw: bytes(4) + raw[4:], "checkpoint.malformed"),
    "a header that is none": (lambda raw: raw[:4] + b"\xc1" + raw[5:], "checkpoint.malformed"),
    "a version to come": (lambda raw: with_header(raw, version=2), "checkpoint.malformed"),
    "a salt that is too short": (lambda raw: with_header(raw, salt=bytes(31)), "checkpoint.malformed"),
    "a size beyond all bounds": (lambda raw: with_header(raw, size=1 << 40), "checkpoint.malformed"),
    "a negative size": (lambda raw: with_header(raw, size=-1), "checkpoint.malformed"),
    "a size beyond the end": (lambda raw: with_header(raw, size=len(raw)), "storage.short"),
    "torn in the header": (lambda raw: raw[: body_at(raw) - 5], "storage.short"),
    "torn in the body": (lambda raw: raw[: body_at(raw) + 50], "storage.short"),
    "one byte less": (lambda raw: raw[:-1], "storage.short"),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_no_checkpoint_is_refused_at_once(name: str) -> None:
    change, code = AT_ONCE[name]
    world = trained()
    kept = bytes(newest(world))
    world.restart()
    request = world.resume()
    world.host.storage[request.checkpoint] = bytearray(change(kept))
    world.refused(request, code)
    assert (world.run.plan, world.run.resuming) == (None, None)
    world.host.storage[request.checkpoint] = bytearray(kept)
    world.take_up()
    ends_as_if_undisturbed(world)


def test_a_checkpoint_that_is_not_there_is_refused() -> None:
    world = trained()
    world.restart()
    world.refused(world.resume("checkpoint-7"), "storage.missing")
    world.take_up()


def alphas_share(raw: bytes, share: bytes) -> bytes:
    length = int.from_bytes(raw[:4], "little")
    header = msgspec.msgpack.decode(raw[4 : 4 + length], type=CheckpointHeader)
    return with_header(raw, shares=dict(header.shares) | {"alpha": share})


LATER: dict[str, Callable[[bytes], bytes]] = {
    "first byte of the body": flipped(body_at),
    "its nonce": flipped(lambda raw: body_at(raw) + 1),
    "its middle": flipped(lambda raw: (len(raw) + body_at(raw)) // 2),
    "its tag": flipped(lambda raw: len(raw) - 1),
    "another salt": lambda raw: with_header(raw, salt=bytes(32)),
    "a share less": lambda raw: with_header(raw, shares={}),
    "a share of no bytes": lambda raw: alphas_share(raw, b""),
    "a share of zeros": lambda raw: alphas_share(raw, bytes(98)),
    "a shorter body": lambda raw: with_header(raw, size=10),
    "a shorter body with its length": lambda raw: with_header(raw[:-1], size=len(raw) - body_at(raw) - 30),
}


@pytest.mark.parametrize("name", LATER)
def test_a_checkpoint_that_was_changed_does_not_open(name: str) -> None:
    world = trained()
    kept = bytes(newest(world))
    world.restart()
    request = world.resume()
    world.host.storage[request.checkpoint] = bytearray(LATER[name](kept))
    world.done(request)
    if "share" in name:
        world.refused(world.rejoin("alpha"), "sealed.not-authentic")
    else:
        world.refused(last_word(world), "sealed.not-authentic")
    assert world.run.seed == b""
    world.host.storage[request.checkpoint] = bytearray(kept)
    world.take_up()
    ends_as_if_undisturbed(world)


def test_a_share_of_another_party_is_not_ones_own() -> None:
    world = trained()
    raw = bytes(newest(world))
    length = int.from_bytes(raw[:4], "little")
    shares = dict(msgspec.msgpack.decode(raw[4 : 4 + length], type=CheckpointHeader).shares)
    shares["alpha"], shares["beta"] = shares["beta"], shares["alpha"]
    world.restart()
    request = world.resume()
    world.host.storage[request.checkpoint] = bytearray(with_header(raw, shares=shares))
    world.done(request)
    world.refused(world.rejoin("alpha"), "sealed.not-authentic")


def test_a_checkpoint_that_is_exchanged_between_two_words_is_refused() -> None:
    world = trained()
    world.restart()
    name, kept = world.newest_checkpoint(), bytes(newest(world))
    world.done(world.resume())
    world.done(world.rejoin("alpha"))
    world.host.storage[name] = bytearray(world.host.storage[older(world)])
    word = world.rejoin("beta", head=world.host_head)
    world.refused(word, "resume.exchanged")
    world.host.storage[name] = bytearray(kept)
    world.done(world.rejoin("beta"))
    assert world.done(world.rejoin("gamma")).at == (1, 0)


def test_no_byte_of_a_checkpoint_is_read_twice() -> None:
    world = trained()
    world.restart()
    world.host.log.clear()
    world.done(world.resume())
    reads = [c.message for c in world.host.log if isinstance(c.message, m.Read)]
    places = [(call.offset, call.length) for call in reads]
    assert places[0] == (0, 4)
    assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(places))


# --- one that was made up -----------------------------------------------------------------------------------------


def test_a_snapshot_that_a_quorum_made_up_with_the_host_is_an_error_and_no_crash() -> None:
    """Whoever holds the shares of a quorum holds the key, outside the enclave too."""
    world = trained()
    raw, key = bytes(newest(world)), present(world.run.custody).key
    plain = b"\xc1 no snapshot"
    resized = with_header(raw, size=len(plain))
    header = resized[4 : body_at(resized)]
    salt = msgspec.msgpack.decode(header, type=CheckpointHeader).salt
    world.restart()
    request = world.resume()
    forged = seal(derive(key, "checkpoint/v1", salt), plain, aad=header)
    world.host.storage[request.checkpoint] = bytearray(resized[: body_at(resized)] + forged)
    world.done(request)
    world.refused(last_word(world), "checkpoint.malformed")


@pytest.mark.parametrize("changes", [{"run": "ab" * 16}, {"plan": "sha256:" + "ab" * 32}])
def test_a_snapshot_with_the_manifest_of_another_run_or_plan_is_refused(changes: dict[str, str]) -> None:
    world = trained()
    world.run.manifest = msgspec.structs.replace(world.manifest, **changes)
    world.train()
    world.restart()
    world.done(world.resume())
    world.refused(last_word(world), "resume.other-plan")
    assert world.run.front is None
