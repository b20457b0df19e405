"""Decoders of typed JSON and MessagePack, each made once and one at a time.

msgspec works a type out when it first decodes it, and crashes the process when two threads do so at once
(seen with 0.22): a host that several parties speak to for the first time would die of it.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

from msgspec import json, msgpack

T = TypeVar("T")
_making = threading.Lock()
_json: dict[Any, json.Decoder[Any]] = {}
_msgpack: dict[Any, msgpack.Decoder[Any]] = {}


def json_decoder(type_: type[T]) -> json.Decoder[T]:
    """The JSON decoder of a type."""
    with _making:
        if type_ not in _json:
            _json[type_] = json.Decoder(type_)
        return _json[type_]


def msgpack_decoder(type_: type[T]) -> msgpack.Decoder[T]:
    """The MessagePack decoder of a type."""
    with _making:
        if type_ not in _msgpack:
            _msgpack[type_] = msgpack.Decoder(type_)
        return _msgpack[type_]
