"""Landlock by three system calls: no file writes, reads under named paths only, no TCP, no signals outward.

Constants and structures: Linux `include/uapi/linux/landlock.h`; how a program meets an older kernel:
Documentation/userspace-api/landlock.rst. Rights that a kernel does not know are left out by its ABI number.
Landlock binds the calling thread and what it starts later, so it is applied while there is one thread.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_CREATE_RULESET: Final = 444  # the same numbers on every architecture that CPython 3.11 runs on
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION_QUERY: Final = 1
_RULE_PATH_BENEATH: Final = 1

_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_RIGHTS_ABI_1: Final = (1 << 13) - 1  # execute, write, read, list, remove, and seven kinds of "make"
_FILE_RIGHTS_SINCE: Final = ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))  # refer, truncate, ioctl on a device
_TCP_SINCE: Final = 4
_TCP_BIND_CONNECT: Final = 0b11
_SCOPES_SINCE: Final = 6
_ABSTRACT_SOCKETS_AND_SIGNALS: Final = 0b11


class _Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr` of ABI 6. An older kernel accepts it while the newer fields are zero."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`, packed as the kernel has it."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def supported_abi() -> int:
    """The kernel's Landlock ABI, 1 or more. Raises OSError where there is none, or it may not be asked."""
    return _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_QUERY))


def holds_network(abi: int) -> bool:
    """Whether this ABI can refuse TCP bind and connect."""
    return abi >= _TCP_SINCE


def holds_scopes(abi: int) -> bool:
    """Whether this ABI can refuse signals and abstract UNIX sockets that lead out of the process."""
    return abi >= _SCOPES_SINCE


def restrict(abi: int, *, readable: Iterable[Path]) -> None:
    """Refuse this thread all files but reading under `readable`, all TCP, and signals outward, for good.

    Needs no_new_privs. Paths that do not exist are passed over. Raises OSError.
    """
    ruleset = _Ruleset(
        handled_access_fs=_RIGHTS_ABI_1 | sum(right for since, right in _FILE_RIGHTS_SINCE if abi >= since),
        handled_access_net=_TCP_BIND_CONNECT if holds_network(abi) else 0,
        scoped=_ABSTRACT_SOCKETS_AND_SIGNALS if holds_scopes(abi) else 0,
    )
    size = ctypes.c_size_t(ctypes.sizeof(ruleset))
    ruleset_fd = _syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, ctypes.c_uint32(0))
    try:
        for path in readable:
            _allow_reading(ruleset_fd, path)
        _syscall(_RESTRICT_SELF, ctypes.c_int(ruleset_fd), ctypes.c_uint32(0))
    finally:
        os.close(ruleset_fd)


def _allow_reading(ruleset_fd: int, path: Path) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        # The kernel refuses a rule that gives a directory's right to a file.
        rights = _READ_FILE | (_READ_DIR if stat.S_ISDIR(os.fstat(fd).st_mode) else 0)
        rule = _PathBeneath(allowed_access=rights, parent_fd=fd)
        kind = ctypes.c_int(_RULE_PATH_BENEATH)
        _syscall(_ADD_RULE, ctypes.c_int(ruleset_fd), kind, ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(fd)


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
