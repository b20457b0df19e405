"""What holds on this machine, found out by trying, and what a simulated enclave does not protect against.

`examine` never fails: what cannot be found out is reported as unknown. It starts two short-lived programs that
lock themselves as the enclave does and try to get out, one bare and one in bubblewrap; each prints what was
refused. Torch is imported only inside `examine`.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from caltrain.host.confine import Confinement, confined_command, enclave_environment, find_bubblewrap

_REPORT_SECONDS: Final = 60
_PROBE_SECONDS: Final = 20
_MAX_REPORT_BYTES: Final = 64 * 1024
_CLONE_NEWUSER: Final = 0x1000_0000

NOT_PROTECTED: Final = (
    "The administrator of the host (root) reads and changes all memory of a simulated enclave: records, keys, weights.",
    "The evidence is signed by a software key that lies on the host: whoever has it can vouch for any program.",
    "The measurement says what the launcher started, as the launcher reports it; no hardware checks it.",
    "Rollback and cloning: no hardware counter tells an old sealed state, or a second copy, from the only one.",
    "Side channels: caches, timing, page faults, memory access patterns, power, speculative execution.",
    "Physical attacks: cold boot, probes on the memory bus, DMA devices; memory is not encrypted.",
    "The kernel and the hypervisor below: an exploit of either ends every measure listed here.",
    "Refusal and delay: the host can stop, slow down or starve the enclave whenever it likes.",
)

# The file that is there when this machine is, or offers, such a TEE.
_TEE_FILES: Final = (
    ("sgx", "dev/sgx_enclave", "Intel SGX enclaves can be started"),
    ("snp-guest", "dev/sev-guest", "this is an AMD SEV-SNP guest"),
    ("tdx-guest", "dev/tdx_guest", "this is an Intel TDX guest"),
    ("configfs-tsm", "sys/kernel/config/tsm/report", "the kernel hands out TEE evidence"),
    ("nitro", "dev/nsm", "this is an AWS Nitro enclave"),
)

State = Literal["yes", "no", "unknown"]


class Finding(msgspec.Struct, frozen=True):
    """One thing about this machine."""

    name: str
    state: State
    detail: str


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measure of the enclave's lock, as the locked program reports it."""

    name: str
    state: Literal["on", "off", "unavailable"]
    detail: str


class Attempt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attempt of a locked program to get out."""

    name: str
    refused: bool
    detail: str


class _Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    measures: tuple[Measure, ...]


class _EscapeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sandbox: _Lock
    attempts: tuple[Attempt, ...]


class SandboxTrial(msgspec.Struct, frozen=True):
    """What a locked program found, started bare or in bubblewrap. Both lists are empty where it could not run."""

    started: Literal["bare", "bubblewrap"]
    detail: str
    measures: tuple[Measure, ...] = ()
    attempts: tuple[Attempt, ...] = ()


class DoctorReport(msgspec.Struct, frozen=True):
    """What holds here. `not_protected` is the same on every machine: what no simulated enclave gives."""

    software: tuple[Finding, ...]
    isolation: tuple[Finding, ...]
    hardware: tuple[Finding, ...]
    trials: tuple[SandboxTrial, ...]
    not_protected: tuple[str, ...]


def examine() -> DoctorReport:
    """Examine this machine; takes a few seconds, changes nothing, and never raises for what it finds."""
    confinement = find_bubblewrap()
    trials = sandbox_trials(confinement)
    return DoctorReport(
        software=(_finding("python", _python), _finding("torch", _torch), _finding("hpke", _hpke)),
        isolation=(
            _finding("sealed-memory", _sealed_memory),
            _finding("user-namespaces", _user_namespaces),
            Finding("bubblewrap", "yes" if confinement.bwrap else "no", confinement.detail),
            _measured("landlock", trials[0], "landlock-files"),
            _measured("seccomp", trials[0], "seccomp"),
            _finding("no-core-dumps", _no_core_dumps),
            _finding("ptrace-restricted", _ptrace_restricted),
        ),
        hardware=tee_hardware(Path("/")),
        trials=trials,
        not_protected=NOT_PROTECTED,
    )


def tee_hardware(root: Path) -> tuple[Finding, ...]:
    """Which TEE's files are there under `root`. A file says that a driver is there, not that evidence would pass."""
    return tuple(_tee_file(name, root / path, meaning) for name, path, meaning in _TEE_FILES)


def sandbox_trials(confinement: Confinement) -> tuple[SandboxTrial, ...]:
    """Let a program lock itself and try to get out: bare, and in bubblewrap where that works."""
    bare = _trial("bare", None)
    if confinement.bwrap is None:
        return (bare, SandboxTrial("bubblewrap", confinement.detail))
    return (bare, _trial("bubblewrap", confinement.bwrap))


def _trial(started: Literal["bare", "bubblewrap"], bwrap: str | None) -> SandboxTrial:
    environment = enclave_environment(1)
    argv = (sys.executable, "-I", "-m", "caltrain.enclave.sandbox", "--report")
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment=environment)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_REPORT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return SandboxTrial(started, f"the trial did not run: {error}")
    if len(done.stdout) > _MAX_REPORT_BYTES:
        return SandboxTrial(started, f"the trial's report has {len(done.stdout)} bytes")
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        return SandboxTrial(started, f"the trial ended with status {done.returncode}: {said}")
    try:
        report = msgspec.json.decode(done.stdout, type=_EscapeReport)
    except msgspec.DecodeError as error:
        return SandboxTrial(started, f"the trial's report cannot be read: {error}")
    refused = sum(attempt.refused for attempt in report.attempts)
    summary = f"{refused} of {len(report.attempts)} attempts to get out were refused"
    return SandboxTrial(started, summary, report.sandbox.measures, report.attempts)


def _measured(name: str, trial: SandboxTrial, measure: str) -> Finding:
    for found in trial.measures:
        if found.name == measure:
            return Finding(name, "yes" if found.state == "on" else "no", found.detail)
    return Finding(name, "unknown", trial.detail)


def _tee_file(name: str, path: Path, meaning: str) -> Finding:
    try:
        found = path.exists()
    except OSError as error:
        return Finding(name, "unknown", f"{path}: {error.strerror}")
    return Finding(name, "yes", f"{path}: {meaning}") if found else Finding(name, "no", f"{path} is not there")


def _finding(name: str, probe: Callable[[], tuple[State, str]]) -> Finding:
    try:
        return Finding(name, *probe())
    except (ImportError, OSError, subprocess.TimeoutExpired) as error:  # not here, which is the answer
        return Finding(name, "no", f"{type(error).__name__}: {error}")


def _python() -> tuple[State, str]:
    version = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"
    return ("yes" if sys.version_info >= (3, 11) else "no"), version


def _torch() -> tuple[State, str]:
    torch = importlib.import_module("torch")  # here and no earlier: it takes seconds
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    return "yes", f"torch {torch.__version__}, kernels for {capability}, {threads} threads on {cores} cores"


def _hpke() -> tuple[State, str]:
    exceptions = importlib.import_module("cryptography.exceptions")
    hpke = importlib.import_module("caltrain.crypto.hpke")
    try:
        key = hpke.HpkePrivateKey()
        opened = key.unseal(hpke.seal_to(key.public, b"probe", info=b"doctor"), info=b"doctor", step="doctor")
    except exceptions.UnsupportedAlgorithm as error:
        return "no", f"this build of cryptography has no ML-KEM: {error}"
    return ("yes" if opened == b"probe" else "no"), "X-Wing (ML-KEM-768 with X25519), sealed and opened"


def _sealed_memory() -> tuple[State, str]:
    fd = os.memfd_create("caltrain-doctor", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            return "yes", "a shared memory file, once sealed, keeps its size"
        return "no", "a sealed memory file could be cut: the other side could crash a reader of the ring"
    finally:
        os.close(fd)


def _user_namespaces() -> tuple[State, str]:
    # In a process of its own: a namespace once entered is not left.
    program = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({_CLONE_NEWUSER}) != 0)"
    argv = (sys.executable, "-I", "-S", "-c", program)
    done = subprocess.run(argv, env={}, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    if done.returncode == 0:
        return "yes", "a program may enter a user namespace"
    return "no", "the kernel or this container refuses user namespaces, which bubblewrap needs"


def _no_core_dumps() -> tuple[State, str]:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text(encoding="utf-8", errors="replace").strip()
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    detail = f"limit {limit}, pattern {pattern!r}; the enclave switches its own off, whatever this says"
    return ("yes" if soft == 0 else "no"), detail


def _ptrace_restricted() -> tuple[State, str]:
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except FileNotFoundError:
        return "no", "no Yama here; the enclave makes itself untraceable for its own user, not for root"
    return ("yes" if scope > 0 else "no"), f"Yama's ptrace_scope is {scope}"
