"""Messages: each goes through whole, to the end it is meant for, and hostile bytes end in a named error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Decoder

from caltrain.attestation.evidence import Binding, Evidence, EvidenceBundle
from caltrain.boundary import messages as m
from caltrain.boundary.frames import FrameKind
from caltrain.crypto.digests import digest
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import EnvironmentFault, ProtocolError
from support.ends import ends, frame, hear

KEY = SigningKey(bytes(32))
ENVELOPE = KEY.sign("test", {"a": 1})
NONCE = "0f" * 32
SHARD = m.StoredShard("alpha", "ab" * 16)
BUNDLE = EvidenceBundle(
    binding=Binding(
        purpose="training",
        encryption_key=HpkePrivateKey().public,
        signing_key=KEY.public,
        plan=digest("test"),
        nonce=NONCE,
    ),
    evidence=Evidence(kind="simulated", blob="AAAA"),
)
REQUESTS: list[m.Message] = [
    m.Boot("simulated", bytes(32)),
    m.Configure(b"{}", {"alpha": ENVELOPE}),
    m.Attest("query", NONCE),
    m.Provision("alpha", ENVELOPE),
    m.MakeManifest(),
    m.Countersign("alpha", ENVELOPE),
    m.Ingest((SHARD,)),
    m.Train(3, 4),
    m.Assess(),
    m.Vote("alpha", ENVELOPE),
    m.MoveCut(2, {"alpha": ENVELOPE}),
    m.Resume(b"{}", "checkpoint-1"),
    m.Rejoin("alpha", ENVELOPE),
    m.Hunt(),
    m.Release(),
    m.Link(),
    m.Query("user", ENVELOPE),
    m.RecordDisclosure("alpha", ENVELOPE),
    m.Stop(),
]
REPLIES: list[m.Message] = [
    m.Ready("sha384:" + "0" * 96, simulated=True, sandbox={"seccomp": "on"}),
    m.Done(events=(ENVELOPE,), bundle=BUNDLE, signed=ENVELOPE, sealed={"a": b"x"}, ignored=(SHARD,), loss=0.5),
    m.Done(held_out=m.Measured(9, 0.5, 0.75, 1.0), state="ready", at=(1, 2), front=3, center_seed=bytes(32)),
    m.Failed({"code": "a.b"}, fatal=True, events=(ENVELOPE,)),
]
CALLS: list[m.Message] = [
    m.Read("pool-0", 7, m.MAX_CHUNK),
    m.Write("shards/alpha/x.y", 7, b"abc"),
    m.CommitCenter(2, 3, durable=True),
    m.ShowCenter(2, 3),
    m.Progress("train", 1, 2, loss=0.25),
]
ANSWERS: list[m.Message] = [m.Data(b"abc"), m.CallFailed({"code": "storage.full"})]
EVERY = [*REQUESTS, *REPLIES, *CALLS, *ANSWERS]
DECODERS: dict[str, tuple[Decoder[Any], list[m.Message]]] = {
    "requests": (m.REQUESTS, REQUESTS),
    "replies": (m.REPLIES, REPLIES),
    "replies and calls": (m.REPLIES_AND_CALLS, REPLIES + CALLS),
    "storage calls": (m.STORAGE_CALLS, CALLS[:2]),
    "answers": (m.ANSWERS, ANSWERS),
}


def name_of(message: object) -> str:
    return type(message).__name__


def pack(fields: dict[str, object]) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_the_examples_are_all_the_messages_there_are() -> None:
    own = {kind for kind in m.Message.__subclasses__() if kind.__module__ == m.__name__}
    assert {type(message) for message in EVERY} == own - {m.StoredShard}


@pytest.mark.parametrize("message", EVERY, ids=name_of)
@pytest.mark.parametrize("direction", DECODERS)
def test_a_message_is_taken_where_it_belongs_and_nowhere_else(direction: str, message: m.Message) -> None:
    decoder, accepted = DECODERS[direction]
    with ends() as (near, far):
        near.send(message)
        if message in accepted:
            assert far.receive(decoder) == message
        else:
            with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
                far.receive(decoder)


# --- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "stop", "more": 1},
        {"t": "no-such-message"},
        {},
        {"t": "boot", "kind": "k" * 41, "root_secret": bytes(32)},
        {"t": "boot", "kind": "k", "root_secret": bytes(31)},
        {"t": "boot", "kind": "k", "root_secret": bytes(33)},
        {"t": "configure", "plan": bytes((1 << 20) + 1), "approvals": {}},
        {"t": "configure", "plan": b"", "approvals": {f"p{i}": msgspec.to_builtins(ENVELOPE) for i in range(257)}},
        {"t": "configure", "plan": b"", "approvals": {"../alpha": msgspec.to_builtins(ENVELOPE)}},
        {"t": "attest", "purpose": "sealing", "nonce": NONCE},
        {"t": "attest", "purpose": "training", "nonce": NONCE[:-1]},
        {"t": "attest", "purpose": "training", "nonce": NONCE + "\n"},
        {"t": "ingest", "stored": [{"t": "stored-shard", "party": "alpha", "shard": "AB" * 16}]},
        {"t": "train", "epoch": -1},
        {"t": "train", "epoch": 1.5},
        {"t": "train", "epoch": 0, "step": -1},
        {"t": "move-cut", "front": -1},
        {"t": "move-cut", "front": 1 << 20},
        {"t": "move-cut", "front": 1, "approvals": {f"p{i}": msgspec.to_builtins(ENVELOPE) for i in range(257)}},
        {"t": "resume", "plan": bytes((1 << 20) + 1), "checkpoint": "checkpoint-0"},
        {"t": "resume", "plan": b"", "checkpoint": "/etc/passwd"},
        {"t": "resume", "plan": b"", "checkpoint": "checkpoint-0\n"},
        {"t": "rejoin", "party": "../alpha", "envelope": msgspec.to_builtins(ENVELOPE)},
        {"t": "release", "center_bytes": 1000},
    ],
    ids=lambda fields: " ".join(map(str, fields.values()))[:40],
)
def test_a_request_beyond_its_limits_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
        hear(frame(pack(fields)), m.REQUESTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "read", "name": "pool-0", "offset": -1, "length": 1},
        {"t": "read", "name": "pool-0", "offset": 0, "length": 0},
        {"t": "read", "name": "pool-0", "offset": 0, "length": m.MAX_CHUNK + 1},
        {"t": "read", "name": "", "offset": 0, "length": 1},
        {"t": "read", "name": "/etc/passwd", "offset": 0, "length": 1},
        {"t": "read", "name": "pool-0\n", "offset": 0, "length": 1},
        {"t": "read", "name": "p" * 201, "offset": 0, "length": 1},
        {"t": "write", "name": "a b", "offset": 0, "data": b""},
        {"t": "write", "name": "pool-0", "offset": 0, "data": bytes(m.MAX_CHUNK + 1)},
        {"t": "write", "name": "pool-0", "offset": -1, "data": b""},
        {"t": "progress", "phase": "p" * 41, "done": 0, "total": 0},
    ],
    ids=lambda fields: " ".join(map(str, fields.values()))[:40],
)
def test_a_call_beyond_its_limits_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
        hear(frame(pack(fields)), m.REPLIES_AND_CALLS)


def test_an_answer_longer_than_a_chunk_is_refused() -> None:
    longest = m.Data(bytes(m.MAX_CHUNK))
    assert hear(frame(msgspec.msgpack.encode(longest)), m.ANSWERS) == longest
    with pytest.raises(ProtocolError, match=r"^door\.unexpected: .*length <= 4194304"):
        hear(frame(msgspec.msgpack.encode(m.Data(bytes(m.MAX_CHUNK + 1)))), m.ANSWERS)


# --- hostile bytes ---------------------------------------------------------------------------------------------

HOSTILE = {
    "no UTF-8 in a key": b"\x81\xa1\xfft",
    "no UTF-8 in a tag": b"\x81\xa1t\xa4st\xffp",
    "deep nesting before the tag": b"\x82\xa1x" + b"\x91" * 100_000 + b"\xc0\xa1t\xa4stop",
    "deep nesting": b"\x91" * 100_000,
    "an array that claims 4 G elements": b"\x82\xa1t\xa6ingest\xa6stored\xdd\xff\xff\xff\xff",
    "a map that claims 4 G entries": b"\x82\xa1t\xa9configure\xa9approvals\xdf\xff\xff\xff\xff",
    "bytes that claim 4 GB": b"\x82\xa1t\xa4boot\xabroot_secret\xc6\xff\xff\xff\xff",
    "an extension": b"\xc7\x01\x05\x00",
    "two messages in one frame": b"\x81\xa1t\xa4stop" * 2,
    "nothing": b"",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("direction", DECODERS)
def test_hostile_bytes_are_refused_by_name(direction: str, body: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
        hear(frame(body), DECODERS[direction][0])


@st.composite
def mutated_frames(draw: st.DrawFn) -> bytes:
    """A valid frame with some bytes replaced, put in, taken out, or cut off."""
    raw = bytearray(frame(msgspec.msgpack.encode(draw(st.sampled_from(EVERY)))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(["replace", "insert", "delete", "cut"])):
            case "replace":
                raw[at] = draw(st.integers(0, 255))
            case "insert":
                raw[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del raw[at : at + draw(st.integers(1, 8))]
            case _:
                del raw[at:]
        if not raw:
            break
    return bytes(raw)


def whatever_happens_is_named(stream: bytes) -> None:
    for decoder, _ in DECODERS.values():
        code = "none"
        try:
            hear(stream, decoder)
        except (ProtocolError, EnvironmentFault) as error:
            code = error.code
        assert code in {"none", "door.unexpected", "frame.malformed", "tensor.malformed", "door.closed"}


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_unnamed(stream: bytes) -> None:
    whatever_happens_is_named(stream)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(FrameKind))
def test_random_bodies_never_raise_anything_unnamed(body: bytes, kind: FrameKind) -> None:
    whatever_happens_is_named(frame(body, kind))


@settings(deadline=None)
@given(mutated_frames())
def test_mutated_frames_never_raise_anything_unnamed(stream: bytes) -> None:
    whatever_happens_is_named(stream)
