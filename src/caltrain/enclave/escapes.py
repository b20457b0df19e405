"""What a locked enclave still manages: real attempts to get out, each reported as refused or not.

The attempts run in a child; its parent stays unlocked and is what they aim at: it listens on a loopback port,
holds a word in memory, and keeps a folder to read, write and execute in. Every attempt succeeds without a lock
(a test shows that), so that a refusal is the lock's doing.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from caltrain.enclave.sandbox import SandboxReport, lock_down

_PTRACE_SEIZE: Final = 0x4206  # attaches without stopping the parent
_CLONE_NEWNS: Final = 0x0002_0000
_CLONE_NEWUSER: Final = 0x1000_0000
_PR_SET_PTRACER: Final = 0x59616D61
_WORD: Final = b"a word in the parent's memory"


class Attempt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attempt to get out."""

    name: str
    refused: bool
    detail: str


class EscapeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The lock as it reports itself, and what was refused when it was tried."""

    sandbox: SandboxReport
    attempts: tuple[Attempt, ...]


class _Target(msgspec.Struct, frozen=True):
    """What the attempts aim at. The two sockets are made before the lock, to try connect and bind by themselves."""

    folder: Path
    port: int
    word: int  # address of _WORD, the same in parent and child
    connecting: socket.socket
    binding: socket.socket

    @property
    def keep_fds(self) -> tuple[int, int]:
        return (self.connecting.fileno(), self.binding.fileno())


def main(arguments: Sequence[str]) -> int:
    """`--report`: print an EscapeReport of this machine as JSON; the exit status is 0 if there is one."""
    parser = argparse.ArgumentParser(prog="python -I -m caltrain.enclave.sandbox")
    parser.add_argument("--report", action="store_true", required=True, help="lock, try to get out, print JSON")
    parser.parse_args(arguments)
    return report(lambda keep_fds: lock_down(keep_fds=keep_fds))


def report(lock: Callable[[Sequence[int]], SandboxReport]) -> int:
    """Apply `lock` to a child, let it try everything, print the EscapeReport to stdout; its exit status.

    `lock` takes the descriptors to keep. Raises OSError where the targets themselves cannot be set up.
    """
    _libc().prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1))  # else Yama, not the lock, would protect the parent
    with (
        tempfile.TemporaryDirectory(prefix="caltrain-escape-") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket() as connecting,
        socket.socket() as binding,
    ):
        word = ctypes.create_string_buffer(_WORD)
        target = _Target(Path(folder), server.getsockname()[1], ctypes.addressof(word), connecting, binding)
        (target.folder / "secret").write_bytes(_WORD)
        program = target.folder / "program"
        program.touch(mode=0o700)
        child = os.fork()
        if child == 0:
            _run_child(target, lock)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_child(target: _Target, lock: Callable[[Sequence[int]], SandboxReport]) -> None:
    status = 1
    try:
        sandbox = lock(target.keep_fds)
        attempts = tuple(_attempt(name, action, target) for name, action in _ATTEMPTS.items())
        sys.stdout.buffer.write(msgspec.json.encode(EscapeReport(sandbox, attempts)) + b"\n")
        sys.stdout.flush()
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)  # the targets belong to the parent, which clears them away


def _attempt(name: str, action: Callable[[_Target], str], target: _Target) -> Attempt:
    try:
        return Attempt(name, refused=False, detail=action(target))
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "?")
        return Attempt(name, refused=True, detail=f"{code}: {error.strerror}")


def _open_socket(_: _Target) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
        return "opened a UDP socket"


def _connect(target: _Target) -> str:
    target.connecting.connect(("127.0.0.1", target.port))
    return "connected by TCP"


def _bind(target: _Target) -> str:
    target.binding.bind(("127.0.0.1", 0))
    return "bound a TCP port"


def _write_file(target: _Target) -> str:
    (target.folder / "written").write_bytes(b"x")
    return "wrote a file"


def _read_file(target: _Target) -> str:
    return f"read {len((target.folder / 'secret').read_bytes())} bytes of another program's file"


def _execute(target: _Target) -> str:
    # An empty executable: the kernel says ENOEXEC only after everything else has let it through.
    try:
        os.execve(target.folder / "program", ["program"], {})  # noqa: S606  # no shell: that is the point
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    return "could have replaced itself by another program"


def _start_process(_: _Target) -> str:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "started a process"


def _trace_process(_: _Target) -> str:
    _checked(_libc().ptrace(ctypes.c_long(_PTRACE_SEIZE), ctypes.c_int(os.getppid()), None, None))
    return "attached to its parent"


def _read_memory(target: _Target) -> str:
    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    copy = ctypes.create_string_buffer(len(_WORD))
    here, there = Piece(ctypes.addressof(copy), len(_WORD)), Piece(target.word, len(_WORD))
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    call = _libc().process_vm_readv
    _checked(call(ctypes.c_int(os.getppid()), ctypes.byref(here), one, ctypes.byref(there), one, none))
    return f"read from its parent: {copy.raw!r}"


def _open_memory(_: _Target) -> str:
    with Path(f"/proc/{os.getppid()}/mem").open("rb"):
        return "opened its parent's /proc/PID/mem"


def _signal_process(_: _Target) -> str:
    os.kill(os.getppid(), signal.SIGCONT)
    return "sent its parent a signal"


def _new_namespace(_: _Target) -> str:
    _checked(_libc().unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    return "entered a namespace where it may mount"


# In this order: the last ones change the process that tries them.
_ATTEMPTS: Final[dict[str, Callable[[_Target], str]]] = {
    "open-socket": _open_socket,
    "connect": _connect,
    "bind": _bind,
    "write-file": _write_file,
    "read-file": _read_file,
    "start-process": _start_process,
    "execute": _execute,
    "trace-process": _trace_process,
    "read-memory": _read_memory,
    "open-memory": _open_memory,
    "signal-process": _signal_process,
    "new-namespace": _new_namespace,
}


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
