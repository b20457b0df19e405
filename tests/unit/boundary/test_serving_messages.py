"""Messages of a serving enclave: each goes through whole, to the end it is meant for; bounds hold."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.msgpack import Decoder

from caltrain.boundary import messages as m
from caltrain.boundary import serving as s
from caltrain.crypto.dsse import SigningKey
from caltrain.errors import ProtocolError
from support.ends import ends, frame, hear

ENVELOPE = SigningKey(bytes(32)).sign("test", {"a": 1})
REQUESTS: list[m.Message] = [
    m.Boot("simulated", bytes(32), role="serving"),
    s.LoadPackage(ENVELOPE),
    m.Attest("serving", "0f" * 32),
    s.Grant(ENVELOPE),
    s.OpenSession(ENVELOPE),
    s.OpenSession(ENVELOPE, ENVELOPE),
    s.CloseSession("ab" * 16),
    s.Infer(3, (b"one", b"two")),
    s.Abandon(3),
    m.Stop(),
]
REPLIES: list[m.Message] = [
    m.Ready("sha384:" + "0" * 96, simulated=True, sandbox={}),
    s.Served(signed=ENVELOPE, session="ab" * 16, sealed=b"x"),
    m.Failed({"code": "a.b"}, fatal=False),
    s.Admitted(3, {1: {"code": "a.b"}}, 4),
    s.Answered(3, {0: b"answer"}, {"code": "a.b"}),
]
DECODERS: dict[str, tuple[Decoder[Any], list[m.Message]]] = {
    "in": (s.SERVING_REQUESTS, REQUESTS),
    "out": (s.SERVING_REPLIES, REPLIES),
}


def test_the_examples_are_all_the_messages_there_are() -> None:
    own = {kind for kind in m.Message.__subclasses__() if kind.__module__ == s.__name__}
    assert own <= {type(message) for message in REQUESTS + REPLIES}


@pytest.mark.parametrize("message", REQUESTS + REPLIES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("direction", DECODERS)
def test_a_message_is_taken_where_it_belongs_and_nowhere_else(direction: str, message: m.Message) -> None:
    decoder, accepted = DECODERS[direction]
    with ends() as (near, far):
        near.send(message)
        if message in accepted:
            assert far.receive(decoder) == message
        else:
            with pytest.raises(ProtocolError) as caught:
                far.receive(decoder)
            assert caught.value.code == "door.unexpected"


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "infer", "batch": 0, "requests": []},
        {"t": "infer", "batch": 0, "requests": [b"x"] * (s.MAX_REQUESTS + 1)},
        {"t": "infer", "batch": -1, "requests": [b"x"]},
        {"t": "infer", "batch": 1 << 53, "requests": [b"x"]},
        {"t": "infer", "batch": 0, "requests": [b"x"], "more": 1},
        {"t": "infer", "batch": 0, "requests": [bytes(s.MAX_REQUEST_BYTES + 1)]},
        {"t": "close-session", "session": "short"},
        {"t": "abandon", "batch": "1"},
        {"t": "grant", "envelope": None},
    ],
)
def test_a_request_beyond_its_limits_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        hear(frame(msgspec.msgpack.encode(fields)), s.SERVING_REQUESTS)
    assert caught.value.code == "door.unexpected"
