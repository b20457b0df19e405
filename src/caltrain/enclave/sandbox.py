"""The lock that the enclave puts on itself, after its imports and before it reads any message.

What an unprivileged Linux program can give up for good: new privileges, core dumps, being traced, files that it
inherited by accident, the file system but for reading Python's own files, and every system call that its work
does not need. Nothing here keeps the machine's administrator out: root reads the memory of every process.

`python -I -m caltrain.enclave.sandbox --report` locks itself, tries to get out, and prints what was refused.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from caltrain.enclave import landlock, syscalls
from caltrain.errors import EnvironmentFault

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_STANDARD_FDS: Final = frozenset({0, 1, 2})

# Shared libraries that are loaded late (libgcc_s on a thread's end), and what describes processor and memory:
# without /proc/cpuinfo torch falls back to its slowest kernels.
_SYSTEM_READABLE: Final = (
    *("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom", "/dev/null"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/sys/vm/overcommit_memory", "/sys/devices/system/cpu"),
)


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measure: whether it holds from now on, and how far or why not."""

    name: str
    state: Literal["on", "off", "unavailable"]
    detail: str


class SandboxReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `lock_down` did, in the order it was done."""

    measures: tuple[Measure, ...]

    def state(self, name: str) -> Literal["on", "off", "unavailable"]:
        """The state of one measure; a measure that was not taken is off."""
        return next((measure.state for measure in self.measures if measure.name == name), "off")


def lock_down(*, keep_fds: Sequence[int]) -> SandboxReport:
    """Lock this process, for good: call it once, with one thread running and all imports done.

    Imports include those that a library puts off: the first optimiser of torch imports `torch._dynamo`, which looks
    for a folder to write in and would fail behind the lock. `torch.set_num_threads` starts threads: it comes after.
    `keep_fds` (the channel, the ring) stay open beside 0, 1 and 2. A measure that this kernel or installation
    does not offer is reported as unavailable. Raises EnvironmentFault: `sandbox.threads-running`,
    `sandbox.descriptor-not-open`, `sandbox.measure-failed` (offered, and yet it did not hold). After an error
    the process may be half locked and must end.
    """
    _check_one_thread()
    _check_open(keep_fds)
    rules, seccomp = _prepare_seccomp()  # first: it looks for a library, which the rest would refuse
    measures = [_no_new_privileges(), _no_core_dumps(), _not_dumpable(), _close_others(keep_fds), *_landlock()]
    if rules is not None:
        try:
            rules.load()
        except OSError as error:
            raise _failed("seccomp", error) from error
    return SandboxReport(measures=(*measures, seccomp))


def readable_paths() -> tuple[Path, ...]:
    """What stays readable: the standard library, site-packages, this package, shared libraries, /proc/self."""
    installed = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    package = Path(__file__).resolve().parents[1]
    return tuple(dict.fromkeys((*map(Path, installed), package, *map(Path, _SYSTEM_READABLE))))


def _check_one_thread() -> None:
    # Landlock binds the calling thread and those it starts; another one would stay outside.
    running = len(_listed("/proc/self/task"))
    if running != 1:
        raise EnvironmentFault(
            "sandbox.threads-running",
            f"{running} threads are running, the lock would hold one of them only",
            step="lock down the enclave",
            fix="Lock down before torch.set_num_threads and any computation; start with OPENBLAS_NUM_THREADS=1.",
        )


def _check_open(fds: Sequence[int]) -> None:
    for fd in fds:
        if not _is_open(fd):
            raise EnvironmentFault(
                "sandbox.descriptor-not-open",
                f"descriptor {fd}, which should be kept, is not open",
                step="lock down the enclave",
                fix="The launcher must pass the channel's descriptors to the enclave (pass_fds).",
            )


def _no_new_privileges() -> Measure:
    _prctl("no-new-privileges", _PR_SET_NO_NEW_PRIVS, 1)
    _expect("no-new-privileges", _prctl("no-new-privileges", _PR_GET_NO_NEW_PRIVS), 1)
    return Measure("no-new-privileges", "on", "no program that is started can gain rights")


def _no_core_dumps() -> Measure:
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        raise _failed("no-core-dump", error) from error
    return Measure("no-core-dump", "on", "RLIMIT_CORE is 0, soft and hard")


def _not_dumpable() -> Measure:
    _prctl("not-dumpable", _PR_SET_DUMPABLE, 0)
    _expect("not-dumpable", _prctl("not-dumpable", _PR_GET_DUMPABLE), 0)
    return Measure("not-dumpable", "on", "processes of the same user cannot trace it or read its memory; root can")


def _close_others(keep_fds: Sequence[int]) -> Measure:
    others = _open_fds() - _STANDARD_FDS.union(keep_fds)
    for fd in others:
        os.close(fd)
    _expect("descriptors-closed", len(_open_fds() - _STANDARD_FDS.union(keep_fds)), 0)
    return Measure("descriptors-closed", "on", f"closed {len(others)}, kept {sorted(keep_fds)} beside 0, 1 and 2")


def _landlock() -> tuple[Measure, ...]:
    names = ("landlock-files", "landlock-network", "landlock-scope")
    try:
        abi = landlock.supported_abi()
    except OSError as error:
        return tuple(Measure(name, "unavailable", f"the kernel says: {error.strerror}") for name in names)
    try:
        landlock.restrict(abi, readable=readable_paths())
    except OSError as error:
        raise _failed("landlock", error) from error
    return (
        Measure(names[0], "on", f"ABI {abi}: no writing, no execution; reading under Python's own paths"),
        _since_abi(names[1], landlock.holds_network(abi), "no TCP bind or connect", abi),
        _since_abi(names[2], landlock.holds_scopes(abi), "no signal or abstract socket leads out", abi),
    )


def _since_abi(name: str, offered: bool, detail: str, abi: int) -> Measure:
    if offered:
        return Measure(name, "on", detail)
    return Measure(name, "unavailable", f"ABI {abi} of this kernel does not offer it")


def _prepare_seccomp() -> tuple[Any, Measure]:
    """The filter to load last, or None, and what to report about it."""
    try:
        rules = syscalls.build_filter()
    except ImportError as error:
        return None, Measure("seccomp", "unavailable", f"{error}; install the extra 'sandbox'")
    except RuntimeError as error:  # no libseccomp; NotImplementedError, its subclass: no filter for this machine
        return None, Measure("seccomp", "unavailable", str(error))
    except OSError as error:
        raise _failed("seccomp", error) from error
    return rules, Measure("seccomp", "on", f"allow-list of {syscalls.ALLOWED_COUNT} system calls")


def _prctl(measure: str, option: int, value: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    result = int(libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))
    if result < 0:
        code = ctypes.get_errno()
        raise _failed(measure, OSError(code, os.strerror(code)))
    return result


def _expect(measure: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise _failed(measure, ValueError(f"it reads {found} afterwards, not {wanted}"))


def _open_fds() -> set[int]:
    # The listing holds its own descriptor, which is closed by the time it is read.
    return {fd for fd in map(int, _listed("/proc/self/fd")) if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _listed(folder: str) -> list[str]:
    try:
        return [entry.name for entry in Path(folder).iterdir()]
    except OSError as error:
        raise _failed("the list of threads and descriptors in /proc", error) from error


def _failed(measure: str, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        "sandbox.measure-failed",
        f"{measure}: {error}",
        step="lock down the enclave",
        fix="The kernel offers this and refused it: run `caltrain doctor`, look at the container's limits.",
    )


if __name__ == "__main__":
    from caltrain.enclave import escapes

    sys.exit(escapes.main(sys.argv[1:]))
