"""How the enclave's process is started: a clean environment, and bubblewrap round it where that works.

Bubblewrap gives the process namespaces of its own: no network, no other processes, a file tree that holds
Python and nothing else. The host does this to keep a broken enclave in; it keeps no host out. Where bubblewrap is
missing or may not create user namespaces, the enclave starts bare and has only the lock it puts on itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from caltrain.errors import ConfigError

_MAX_THREADS: Final = 1024
_PROBE_SECONDS: Final = 20

# Waiting threads sleep instead of spinning: enclave and CenterNet compute in turn on the same cores.
QUIET_THREADS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_OPTIONS: Final = (
    *("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "enclave"),
    *("--clearenv", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/"),  # noqa: S108  # its own, in memory
)
# /sbin holds ldconfig, by which Python finds libseccomp. torch picks its kernels by what it reads in
# /sys/devices/system/cpu: without it the enclave's arithmetic could differ from the outside's.
_SYSTEM: Final = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/sys/devices/system/cpu")


class Confinement(msgspec.Struct, frozen=True):
    """Whether bubblewrap can be used here. `bwrap` is its path, or None; `detail` says why."""

    bwrap: str | None
    detail: str


def enclave_environment(threads: int) -> dict[str, str]:
    """The whole environment of an enclave that computes with `threads` threads; nothing is inherited.

    OpenBLAS, which torch does not use, must not start threads at import, or the enclave cannot lock itself.
    Raises ConfigError `confine.thread-count`.
    """
    if not 1 <= threads <= _MAX_THREADS:
        raise ConfigError(
            "confine.thread-count",
            f"{threads} threads for the enclave",
            step="start the enclave",
            fix=f"Choose 1 to {_MAX_THREADS} threads.",
        )
    return {
        "OMP_NUM_THREADS": str(threads),
        **QUIET_THREADS,
        "OPENBLAS_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }


def confined_command(
    argv: Sequence[str], *, bwrap: str | None, read_only: Sequence[Path], environment: Mapping[str, str]
) -> list[str]:
    """`argv` inside bubblewrap, or `argv` itself where `bwrap` is None.

    Inside it sees the system's libraries, this Python with its packages, and `read_only`, at the same absolute
    paths and read-only; its environment is `environment` alone. Give the same `environment` to the process that is
    started: without bubblewrap nothing else sets it. Descriptors given as `pass_fds` reach `argv`.
    """
    if bwrap is None:
        return list(argv)
    command = [bwrap, *_OPTIONS]
    for system in _SYSTEM:
        command += ["--ro-bind-try", system, system]
    for path in _outermost([*python_paths(), *read_only]):
        command += ["--ro-bind", str(path), str(path)]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    return [*command, "--remount-ro", "/", "--", *argv]


def python_paths() -> tuple[Path, ...]:
    """Where this Python, its packages and this package lie, also when a link or an editable install leads there."""
    package = Path(__file__).resolve().parents[1]
    prefixes = (Path(sys.prefix), Path(sys.base_prefix))
    return (*prefixes, *(prefix.resolve() for prefix in prefixes), package)


@cache
def find_bubblewrap() -> Confinement:
    """Look for bubblewrap and try it once, by running a program in it."""
    return probe_bubblewrap(shutil.which("bwrap"))


def probe_bubblewrap(bwrap: str | None) -> Confinement:
    """Run a program in the bubblewrap at this path, as the enclave would be run."""
    if bwrap is None:
        return Confinement(None, "bubblewrap is not installed; the enclave has only the lock it puts on itself")
    environment = enclave_environment(1)
    argv = (sys.executable, "-I", "-S", "-c", "")
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment=environment)
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Confinement(None, f"{bwrap} does not run here ({error}); the enclave starts bare")
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-200:] or f"exit status {done.returncode}"
        return Confinement(None, f"{bwrap} may not do its work here ({said}); the enclave starts bare")
    return Confinement(bwrap, f"{bwrap} works: no network, no other processes, a read-only tree of its own")


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Absolute paths without those that lie in another of them, or in the system's own."""
    wanted = dict.fromkeys(path.absolute() for path in paths)
    system = {Path(path) for path in _SYSTEM}
    return [path for path in wanted if path not in system and not (system | wanted.keys()) & {*path.parents}]
