"""A tapped host server as a process, and everything that can be seen of it: memory, disk, log, frames."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from support.canary_memory import Memory, arguments_of, descendants, hold, let_go, wait_until_held
from support.tapped_host import Config

Place = Literal["memory", "disk", "log", "door"]
_PROGRAM = Path(__file__).parent / "tapped_host.py"
_SECONDS = 150
T = TypeVar("T")


@dataclass(frozen=True)
class Haystack:
    """Bytes that the host can see: where, and what they are called there."""

    place: Place
    name: str
    data: bytes


class TappedHost:
    """A host server as a process of its own, and what could be seen of it so far.

    It works and is at home in the folder that is its own: what it would write without being told where is seen there.
    """

    def __init__(self, config: Config, *, log: Path) -> None:
        self._config, self._log = config, log
        self._files: set[tuple[str, bytes]] = set()
        self.memory = Memory()
        self.seen: list[Haystack] = []
        Path(config.folder).mkdir(exist_ok=True)
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                cwd=config.folder,
                env=os.environ | {"HOME": config.folder, "TMPDIR": config.folder},
            )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(config))
        self.process.stdin.close()
        self.url = f"http://127.0.0.1:{self._line()}"

    def at(self, moment: str, *, meanwhile: Callable[[], None]) -> None:
        """Wait until the host has stopped itself at this moment; look at it, and let it go on.

        `meanwhile` is called every second: it may raise when the moment will never come.
        """
        assert self._line(meanwhile) == moment
        wait_until_held(self.process.pid)
        self._look_at_memory(moment, files=False)
        self._look_at_disk(moment)
        let_go(self.process.pid)

    def at_each(self, moments: Sequence[str], *, of: Sequence[Future[T]]) -> list[T]:
        """Look at the host at each of these moments of what others do with it; returns what they come to."""

        def unless_one_failed() -> None:
            for future in of:
                if future.done():
                    future.result()

        try:
            for moment in moments:
                self.at(moment, meanwhile=unless_one_failed)
            return [future.result() for future in of]
        except BaseException:
            self.end()  # else the others would wait for it
            raise

    def at_last(self, *, memory: bool) -> None:
        """Look at the host as it is, also at what it has mapped from files; end it, and take log and tap."""
        hold(self.process.pid)
        if memory:
            self._look_at_memory("end", files=True)
        self._look_at_disk("end")
        let_go(self.process.pid)
        self.end()
        self.seen.append(Haystack("log", "standard error", self._log.read_bytes()))
        for path in sorted(Path(self._config.tap).iterdir()):
            self.seen.append(Haystack("door", path.name, path.read_bytes()))

    def end(self) -> None:
        """Terminate the host, and with it the enclave."""
        if self.process.poll() is None:
            let_go(self.process.pid)
            self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _look_at_memory(self, moment: str, *, files: bool) -> None:
        below = descendants(self.process.pid)
        enclaves = [pid for pid in below if arguments_of(pid)[:2] == [sys.executable, "-I"]]
        assert len(enclaves) == 1, [arguments_of(pid) for pid in below]
        for pid in (self.process.pid, *below):
            if pid not in enclaves:
                for where, piece in self.memory.read(pid, files=files):
                    self.seen.append(Haystack("memory", f"{moment}: {pid}: {where}", piece))

    def _look_at_disk(self, moment: str) -> None:
        root = Path(self._config.folder)
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name, data = path.relative_to(root).as_posix(), path.read_bytes()
            if (name, data) not in self._files:
                self._files.add((name, data))
                self.seen.append(Haystack("log" if path.suffix == ".log" else "disk", f"{moment}: {name}", data))

    def _line(self, meanwhile: Callable[[], None] = lambda: None) -> str:
        """The next line that the host says."""
        assert self.process.stdout is not None
        stdout, line, deadline = self.process.stdout.fileno(), b"", time.monotonic() + _SECONDS
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], 1)
            more = os.read(stdout, 1) if ready else b""
            meanwhile()
            late = not ready and time.monotonic() > deadline
            assert more or not (ready or late), f"the host said {line!r} and no more: {self._log.read_text()[-2000:]}"
            line += more
        return line.decode().strip()
