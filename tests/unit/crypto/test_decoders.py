"""Decoders are made one at a time: several threads that decode a type for the first time must not end the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from caltrain.crypto.decoders import json_decoder, msgpack_decoder
from caltrain.plan import PlanApproval

THREADS = """
import sys, threading, msgspec
from caltrain.crypto.decoders import json_decoder, msgpack_decoder
sys.setswitchinterval(1e-6)
SOURCE = '''
import msgspec
from typing import Annotated, Literal
class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    x: Annotated[str, msgspec.Meta(pattern=r"^[a-z]{1,40}$")]
    y: Literal[1] = 1
class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    a: Inner
    b: tuple[Inner, ...]
'''
raw = {"a": {"x": "k"}, "b": [{"x": "z"}]}
make, encode = {
    "json": (json_decoder, msgspec.json.encode), "msgpack": (msgpack_decoder, msgspec.msgpack.encode)
}[sys.argv[1]]
for number in range(150):
    module = type(sys)(f"m{number}")
    sys.modules[module.__name__] = module
    exec(SOURCE, module.__dict__)
    start, found = threading.Barrier(4), []
    def decode():
        start.wait()
        found.append(make(module.Outer).decode(encode(raw)).a.x)
    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert found == ["k"] * 4
"""


@pytest.mark.parametrize("form", ["json", "msgpack"])
def test_threads_that_decode_a_new_type_at_once_all_get_it(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", THREADS, form], capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_decoder_is_made_once() -> None:
    assert json_decoder(PlanApproval) is json_decoder(PlanApproval)
    assert msgpack_decoder(PlanApproval) is msgpack_decoder(PlanApproval)
    assert json_decoder(dict[str, int]).decode(b'{"a":1}') == {"a": 1}
