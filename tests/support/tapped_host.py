"""A host server as it is, of a run or a package, with a tap at its end of the door: `python tapped_host.py < CONFIG`.

Every byte of every frame, and what passes through the ring, goes to files outside of the host's folder: `in` (host to
enclave) and `out` (enclave to host), and `storage-in` and `storage-out` for the stream of its own that storage has. A
tensor frame whose bytes lie in the ring is followed by those bytes.
At named moments the process says the moment's name on standard output and stops itself (SIGSTOP), to be looked at.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from caltrain.boundary import frames
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.ring import Ring
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.dsse import SigningKey
from caltrain.host import launcher
from caltrain.host.confine import confined_command
from caltrain.host.server import serve
from caltrain.host.serving.server import serve as serve_packages
from caltrain.listening import bind
from caltrain.plan import plan_from_json


class Config(msgspec.Struct, frozen=True):
    """What to serve, where to keep what, when to stop; `enclave` is another program to start in the enclave's place.

    All that the host keeps is in `folder`. Of `plan` and `package` (a folder) one is given: it is what is served.
    """

    folder: str
    tap: str
    root: bytes
    plan: str = ""
    package: str = ""
    moments: tuple[str, ...] = ()
    enclave: str = ""


class Tap:
    """Wraps the functions through which all bytes pass."""

    def __init__(self, folder: Path, moments: tuple[str, ...]) -> None:
        folder.mkdir(parents=True)
        names = ("in", "out", "storage-in", "storage-out")
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb", buffering=0) for name in names}
        self._moments = set(moments)
        self._in_ring = b""

    def install(self) -> None:
        """From now on everything is put on record."""
        send_frame, receive_frame, put, view = frames.send_frame, frames.receive_frame, Ring.put, Ring.view

        def tapped_send(sock: socket.socket, kind: FrameKind, *parts: bytes | memoryview) -> None:
            self._stop_at(moment_of(kind, *parts))
            ring = b"" if serves_storage() else self._in_ring
            self._keep("in", on_wire(kind, *parts) + ring)
            self._in_ring = self._in_ring if serves_storage() else b""
            send_frame(sock, kind, *parts)

        def tapped_receive(sock: socket.socket) -> tuple[FrameKind, memoryview]:
            kind, body = receive_frame(sock)
            self._keep("out", on_wire(kind, body))
            return kind, body

        def tapped_put(ring: Ring, parts: Sequence[memoryview]) -> int:
            self._in_ring = b"".join(parts)  # its frame is sent next
            return put(ring, parts)

        def tapped_view(ring: Ring, slot: int, length: int) -> memoryview:
            seen = view(ring, slot, length)
            self._keep("out", seen)  # its frame came just before
            return seen

        setattr(frames, "send_frame", tapped_send)  # noqa: B010  # a type checker lets nobody replace a function
        setattr(frames, "receive_frame", tapped_receive)  # noqa: B010
        setattr(Ring, "put", tapped_put)  # noqa: B010
        setattr(Ring, "view", tapped_view)  # noqa: B010

    def _keep(self, way: str, data: bytes | memoryview) -> None:
        self._files[f"storage-{way}" if serves_storage() else way].write(data)

    def _stop_at(self, moment: str) -> None:
        if moment in self._moments:
            say(moment)
            os.kill(os.getpid(), signal.SIGSTOP)


def serves_storage() -> bool:
    """Whether this is the launcher's thread for the storage stream."""
    return threading.current_thread().name == "storage"


def on_wire(kind: FrameKind, *parts: bytes | memoryview) -> bytes:
    """A frame as it goes over the stream."""
    body = b"".join(parts)
    return (len(body) + 1).to_bytes(4, "little") + bytes([kind]) + body


def moment_of(kind: FrameKind, *parts: bytes | memoryview) -> str:
    """What a frame to the enclave is called: `release`, `infer-0`, `train-0-0`, `center-out-1-2` (epoch, step)."""
    if kind is FrameKind.TENSOR:
        head = msgspec.msgpack.decode(parts[1], type=TensorHead)
        return f"{head.role}-{head.epoch}-{head.step}"
    message = msgspec.msgpack.decode(parts[0])
    numbers = ("epoch", "step") if "epoch" in message else ("batch",) if "batch" in message else ()
    return "-".join([message["t"], *(str(message[number]) for number in numbers)])


def say(line: str) -> None:
    """One line for who started us."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def start_instead(program: Path) -> None:
    """Have the launcher start `program`, in the same confinement, where it would start the enclave."""

    def command(argv: list[str], *, bwrap: str | None, environment: dict[str, str], **_: object) -> list[str]:
        words = [str(program) if word == "caltrain.enclave" else word for word in argv if word != "-m"]
        return confined_command(words, bwrap=bwrap, read_only=(program,), environment=environment)

    setattr(launcher, "confined_command", command)  # noqa: B010


def main() -> None:
    """Serve until told to stop."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
    Tap(Path(config.tap), config.moments).install()
    if config.enclave:
        start_instead(Path(config.enclave))
    sock, root = bind("127.0.0.1", 0), SigningKey(config.root)
    say(str(sock.getsockname()[1]))
    if config.package:
        serve_packages([Path(config.package)], root=root, sock=sock, threads=1)
    else:
        plan = plan_from_json(config.plan.encode())
        serve(plan, folder=Path(config.folder), sock=sock, root=root, auto_start=True)


if __name__ == "__main__":
    main()
