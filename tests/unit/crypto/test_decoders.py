"""Typed decoders: one for a type, made by one thread at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from caltrain.crypto import decoders
from caltrain.crypto.decoders import json_decoder, msgpack_decoder


class Point(msgspec.Struct, forbid_unknown_fields=True):
    x: int
    y: int = 0


def test_json_is_decoded_into_its_type() -> None:
    assert json_decoder(Point).decode(b'{"x":1}') == Point(1)
    assert json_decoder(tuple[Point, ...]).decode(b'[{"x":1,"y":2}]') == (Point(1, 2),)
    with pytest.raises(msgspec.ValidationError):
        json_decoder(Point).decode(b'{"x":1,"z":2}')


def test_messagepack_is_decoded_into_its_type() -> None:
    raw = msgspec.msgpack.encode({"x": 1})
    assert msgpack_decoder(Point).decode(raw) == Point(1)
    with pytest.raises(msgspec.ValidationError):
        msgpack_decoder(tuple[Point, ...]).decode(raw)


@pytest.mark.parametrize(("name", "get"), [("json", json_decoder), ("msgpack", msgpack_decoder)])
def test_many_threads_at_once_make_one_decoder(
    name: str, get: Callable[[type[Any]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    class Slow:
        def __init__(self, type_: type[Any]) -> None:
            time.sleep(0.02)
            made.append(type_)

    monkeypatch.setattr(getattr(decoders, name), "Decoder", Slow)
    monkeypatch.setattr(decoders, f"_{name}", {})
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(get, [Point] * 4))
    assert made == [Point]
    assert len({id(decoder) for decoder in got}) == 1
