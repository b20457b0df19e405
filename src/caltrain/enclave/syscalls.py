"""The system calls that the enclave may make once it has started: a seccomp filter as an allow-list.

An allow-list, because what nobody thought of is then refused too. Three answers keep it robust:

 * ALLOW for what Python, torch's thread pools, `cryptography` and an inherited channel need;
 * EPERM for the well-known ways out, so that a refusal reads as one;
 * ENOSYS for all else, which libc takes as "an old kernel" and works round (clone3 → clone). With EPERM here a
   newer libc would fail in ways nobody tested.

The filter is built by libseccomp through the `sandbox` extra. It cannot look behind pointers: paths are
Landlock's part (`landlock.py`). Executable memory stays allowed, oneDNN compiles its kernels at run time.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import socket
import termios
from typing import Any, Final

_MACHINES: Final = frozenset({"x86_64", "aarch64"})  # where the first argument of clone holds its flags
_CLONE_THREAD: Final = 0x0001_0000
_PRCTL_ALLOWED: Final = (3, 15, 16, 21, 23, 39, 0x5356_4D41)  # get/set of what changes nothing
_PR_SET_DUMPABLE: Final = 4
_FIOCLEX: Final = 0x5451
_IOCTL_ALLOWED: Final = (termios.FIONBIO, termios.FIONREAD, termios.TCGETS, termios.TIOCGWINSZ, _FIOCLEX)
_OPEN_TO_CHANGE: Final = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)
_OPEN_FLAGS_AT: Final = (("open", 1), ("openat", 2))

_ALLOWED: Final = (
    # memory
    *("brk", "mmap", "munmap", "mprotect", "mremap", "madvise", "msync", "mincore", "mlock", "mlock2", "munlock"),
    *("membarrier", "get_mempolicy"),
    # threads, scheduling and the end
    *("futex", "set_robust_list", "get_robust_list", "rseq", "set_tid_address", "arch_prctl", "exit", "exit_group"),
    *("sched_yield", "sched_getaffinity", "sched_getparam", "sched_getscheduler", "sched_get_priority_max"),
    *("sched_get_priority_min", "getcpu", "getpriority", "restart_syscall"),
    # signals to itself (tgkill has a rule below)
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "rt_sigpending", "rt_sigtimedwait"),
    # what there already is: the channel, the ring, the log
    *("read", "readv", "pread64", "preadv", "preadv2", "write", "writev", "pwrite64", "pwritev", "pwritev2"),
    *("close", "close_range", "dup", "dup2", "dup3", "fcntl", "lseek", "fstat", "fstatfs"),
    *("recvfrom", "recvmsg", "sendmsg", "shutdown", "getsockname", "getpeername", "getsockopt", "setsockopt"),
    *("poll", "ppoll", "select", "pselect6", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait"),
    *("epoll_pwait2", "eventfd2", "pipe", "pipe2"),
    # looking at files; opening has a rule below, and Landlock says which
    *("stat", "lstat", "newfstatat", "statx", "statfs", "access", "faccessat", "faccessat2", "readlink"),
    *("readlinkat", "getdents64", "getcwd", "fadvise64"),
    # who, when, how much
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getgroups", "getpgrp", "getpgid"),
    *("getsid", "getresuid", "getresgid", "capget", "uname", "sysinfo", "getrusage", "getrlimit", "times"),
    *("getrandom", "gettimeofday", "time", "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep"),
)

ALLOWED_COUNT: Final = len(_ALLOWED)

_REFUSED: Final = (
    # network; a socket pair has a rule below
    *("socket", "connect", "bind", "listen", "accept", "accept4", "sendmmsg"),
    # other programs and other processes
    *("fork", "vfork", "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
    *("kcmp", "setrlimit", "setpriority", "sched_setscheduler", "sched_setparam", "sched_setattr"),
    # another view of the machine
    *("unshare", "setns", "chroot", "pivot_root", "mount", "umount2", "open_tree", "move_mount", "fsopen"),
    *("fsconfig", "fsmount", "fspick", "mount_setattr", "swapon", "swapoff", "sethostname", "setdomainname"),
    # identity
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid"),
    *("capset", "setsid", "setpgid", "personality"),
    # large, or privileged, parts of the kernel
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl"),
    *("add_key", "request_key", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"),
    *("reboot", "syslog", "acct", "quotactl", "iopl", "ioperm", "modify_ldt", "settimeofday", "clock_settime"),
    *("adjtimex", "clock_adjtime", "memfd_secret", "seccomp", "fanotify_init", "inotify_init1"),
    # files by handle, and files changed
    *("open_by_handle_at", "name_to_handle_at", "creat", "mkdir", "mkdirat", "mknod", "mknodat", "unlink"),
    *("unlinkat", "rmdir", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "truncate"),
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "utimensat", "setxattr"),
    *("lsetxattr", "fsetxattr", "removexattr", "memfd_create"),
)


def build_filter() -> Any:
    """The filter, ready to `.load()`: libseccomp's own object, which has no types.

    Raises ImportError (the `sandbox` extra is not installed), RuntimeError (libseccomp is not), or
    NotImplementedError (no filter for this machine). Call it before file access is restricted: finding the
    library starts a program and may write temporary files.
    """
    if platform.machine() not in _MACHINES:
        raise NotImplementedError(f"the filter is written for {sorted(_MACHINES)}, not {platform.machine()}")
    lib = importlib.import_module("pyseccomp")
    rules = lib.SyscallFilter(lib.ERRNO(errno.ENOSYS))
    for name in _ALLOWED:
        _add(lib, rules, lib.ALLOW, name)
    for name in _REFUSED:
        _add(lib, rules, lib.ERRNO(errno.EPERM), name)
    _add_conditional(lib, rules)
    return rules


def _add_conditional(lib: Any, rules: Any) -> None:
    """Calls that are harmless with some arguments only."""
    allow, refuse = lib.ALLOW, lib.ERRNO(errno.EPERM)

    def is_(index: int, value: int) -> Any:
        return lib.Arg(index, lib.EQ, value)

    def has(index: int, mask: int, value: int) -> Any:
        return lib.Arg(index, lib.MASKED_EQ, mask, value)

    _add(lib, rules, allow, "clone", has(0, _CLONE_THREAD, _CLONE_THREAD))  # a thread
    _add(lib, rules, refuse, "clone", has(0, _CLONE_THREAD, 0))  # a process
    _add(lib, rules, allow, "tgkill", is_(0, os.getpid()))  # abort() and raise()
    _add(lib, rules, allow, "prlimit64", is_(2, 0))  # reading a limit
    _add(lib, rules, allow, "sendto", is_(4, 0))  # on a connected channel, to no other address
    _add(lib, rules, allow, "socketpair", is_(0, socket.AF_UNIX))  # both ends are here
    for option in _PRCTL_ALLOWED:
        _add(lib, rules, allow, "prctl", is_(0, option))
    _add(lib, rules, refuse, "prctl", is_(0, _PR_SET_DUMPABLE))
    for request in _IOCTL_ALLOWED:
        _add(lib, rules, allow, "ioctl", is_(1, request))
    for name, index in _OPEN_FLAGS_AT:
        _add(lib, rules, allow, name, has(index, sum(_OPEN_TO_CHANGE), 0))
        for flag in _OPEN_TO_CHANGE:
            _add(lib, rules, refuse, name, has(index, flag, flag))


def _add(lib: Any, rules: Any, action: int, name: str, *conditions: Any) -> None:
    """One rule. A name that libseccomp does not know here (older, or another machine) falls to the default."""
    if lib.resolve_syscall(lib.Arch.NATIVE, name) >= 0:
        rules.add_rule(action, name, *conditions)
