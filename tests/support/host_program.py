"""The host server as a program: `python host_program.py PLAN.json FOLDER ROOT [PORT] [resume] [WHO:N]`.

It says its port and serves. With WHO:N it kills the enclave, itself (host), or both, at the N-th time that something
is stored or read: a write is then left half done.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from caltrain.crypto.dsse import SigningKey
from caltrain.host.server import serve
from caltrain.host.store import Store
from caltrain.listening import bind
from caltrain.plan import plan_from_json


class Death:
    """Comes at the N-th operation of the store."""

    def __init__(self, who: str, number: int) -> None:
        self._who, self._left = who, number

    def come(self) -> None:
        """Watch all operations of the store."""
        for name in ("read", "write", "put", "append_line"):
            setattr(Store, name, self._watched(name, getattr(Store, name)))

    def _watched(self, name: str, original: Any) -> Any:
        def operation(store: Store, *args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                sys.stderr.write(f"death of {self._who} at {name} {args[0]}\n")
                sys.stderr.flush()
                if self._who != "enclave":
                    _half(store, name, *args, **options)
                self._strike()
            return original(store, *args, **options)

        return operation

    def _strike(self) -> None:
        if self._who in {"enclave", "both"}:
            for pid in _descendants(os.getpid()):
                os.kill(pid, signal.SIGKILL)
        if self._who in {"host", "both"}:
            os.kill(os.getpid(), signal.SIGKILL)


def _half(store: Store, name: str, object_: str, data: bytes = b"", *, offset: int = 0, **_: Any) -> None:
    """What a write that is cut short leaves."""
    path, half = store.path(object_), data[: len(data) // 2]
    if name == "append_line":
        with path.open("ab") as file:
            file.write(half)
    elif name == "write":
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.seek(offset)
            file.write(half)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found[1:]


def main(plan: str, folder: str, root: str, *more: str) -> None:
    """Serve until a signal comes."""
    agreed, key = plan_from_json(Path(plan).read_bytes()), SigningKey(Path(root).read_bytes())
    for who, number in (word.split(":") for word in more if ":" in word):
        Death(who, int(number)).come()
    sock = bind("127.0.0.1", next((int(word) for word in more if word.isdecimal()), 0))
    sys.stdout.write(f"{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    serve(agreed, folder=Path(folder), sock=sock, root=key, auto_start=True, resume="resume" in more)


if __name__ == "__main__":
    main(*sys.argv[1:])
