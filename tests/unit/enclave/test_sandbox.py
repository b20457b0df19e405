"""The lock: what it refuses, what still works behind it, and that without it everything would get out.

Each scenario runs in a process of its own (this file, started as a program), because a lock is for good.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import json
import mmap
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from caltrain.enclave import escapes, landlock, sandbox, syscalls
from caltrain.enclave.escapes import EscapeReport
from caltrain.enclave.sandbox import Measure, SandboxReport, lock_down
from caltrain.errors import EnvironmentFault
from caltrain.host.confine import confined_command, enclave_environment, find_bubblewrap

ATTEMPTS = {
    *("open-socket", "connect", "bind", "write-file", "read-file", "start-process", "execute", "trace-process"),
    *("read-memory", "open-memory", "signal-process", "new-namespace"),
}
MEASURES = (
    *("no-new-privileges", "no-core-dump", "not-dumpable", "descriptors-closed"),
    *("landlock-files", "landlock-network", "landlock-scope", "seccomp"),
)
RING_BYTES = 4096


# --- scenarios: these run in the child -------------------------------------------------------------------------


def workout(channel: str, ring: str, locked: str) -> None:
    """What an enclave does: train with two threads, save, seal, sign, answer on the socket, use the ring."""
    importlib.import_module("torch._dynamo")
    importlib.import_module("safetensors.torch")
    for name in ("hpke", "ciphers.aead", "asymmetric.ed25519", "asymmetric.mlkem", "asymmetric.x25519"):
        importlib.import_module(f"cryptography.hazmat.primitives.{name}")
    report = lock_down(keep_fds=[int(channel), int(ring)]) if locked == "locked" else SandboxReport(())
    answer = {
        "weights": hashlib.sha256(train()).hexdigest(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "cryptography": use_cryptography(),
        "ring": use_ring(int(ring)),
        "measures": {measure.name: measure.state for measure in report.measures},
    }
    with socket.socket(fileno=int(channel)) as host:
        host.settimeout(60)
        host.sendall(json.dumps(answer).encode())
        host.recv(16)


def train() -> bytes:
    """Three steps of a small convolutional net with dropout; its weights as safetensors bytes."""
    import safetensors.torch
    import torch
    from torch import nn

    torch.manual_seed(7)
    torch.set_num_threads(2)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)),
        *(nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.randn(64, 3, 32, 32)), torch.randint(0, 10, (64,)))
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
    large = torch.randn(512, 512)
    state = {**net.state_dict(), "product": large @ large, "half": large.bfloat16() @ large.bfloat16()}
    return bytes(safetensors.torch.save(state))


def use_cryptography() -> bool:
    from cryptography.hazmat.primitives import hpke
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(12)
    aead = AESGCM(AESGCM.generate_key(256))
    key = hpke.MLKEM768X25519PrivateKey(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    sealed = suite.encrypt(b"key", key.public_key(), info=b"info")
    signer = Ed25519PrivateKey.generate()
    signer.public_key().verify(signer.sign(sealed), sealed)
    opened = aead.decrypt(nonce, aead.encrypt(nonce, b"record", b""), b"")
    return opened == b"record" and suite.decrypt(sealed, key, info=b"info") == b"key"


def use_ring(fd: int) -> str:
    with mmap.mmap(fd, RING_BYTES) as ring:
        said = ring[:4].decode()
        ring[4:8] = b"pong"
        ring.flush()
        return said


def escape(variant: str) -> None:
    """Try to get out, behind the whole lock or a part of it."""
    if variant == "no-lock":
        escapes.report(lambda keep_fds: SandboxReport(()))
        return
    if variant != "whole":
        if variant in {"landlock-only", "neither"} or variant.startswith("abi-"):
            sys.modules["pyseccomp"] = None  # type: ignore[assignment]  # makes its import fail, as if absent
        if variant in {"seccomp-only", "neither"}:
            landlock.supported_abi = _no_landlock
        if variant.startswith("abi-"):
            landlock.supported_abi = lambda: int(variant.removeprefix("abi-"))
    escapes.report(lambda keep_fds: lock_down(keep_fds=keep_fds))


def _no_landlock() -> int:
    raise OSError(38, "Function not implemented")


def leak(secret: str, kept: str) -> None:
    """Which of two inherited descriptors, and of 0 to 2, are open behind the lock."""
    lock_down(keep_fds=[int(kept)])
    say([fd for fd in (0, 1, 2, int(secret), int(kept)) if _is_open(fd)])


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def read_only(folder: str) -> None:
    """What Landlock lets through in a folder that may be read: reading, and nothing else."""
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
    landlock.restrict(landlock.supported_abi(), readable=[Path(folder), Path(folder) / "missing"])
    program = Path(folder) / "program"
    say(
        {
            "read": succeeds(program.read_bytes),
            "write": succeeds(lambda: program.write_bytes(b"x")),
            "truncate": succeeds(lambda: os.truncate(program, 1)),
            "make": succeeds((Path(folder) / "made").mkdir),
            "remove": succeeds(program.unlink),
            "execute": succeeds(lambda: os.execve(program, ["program"], {})),  # noqa: S606
        }
    )


def succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except PermissionError:
        return False
    except OSError as error:
        return error.errno == errno.ENOEXEC  # an empty program that would have been executed
    return True


def undo() -> None:
    """Try to take the lock off again; print what the process can see of it afterwards."""
    lock_down(keep_fds=[])
    libc = ctypes.CDLL(None, use_errno=True)
    undumpable = libc.prctl(4, 1, 0, 0, 0) < 0 and libc.prctl(3, 0, 0, 0, 0) == 0
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
        core = True
    except (OSError, ValueError):
        core = False
    status = Path("/proc/self/status").read_text(encoding="ascii")
    say({"undumpable": undumpable, "core": core, "status": status})


def fault(case: str) -> None:
    """A lock that cannot be put on: print the error and whether the process was already changed."""
    keep: list[int] = []
    if case == "descriptor":
        keep = [999]
    if case == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if case == "limit":
        resource.setrlimit = _refuse
    if case == "landlock":
        landlock.restrict = _refuse
    if case == "load":
        syscalls.build_filter = _Unloadable
    try:
        lock_down(keep_fds=keep)
    except EnvironmentFault as error:
        changed = ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)
        say({**error.diagnostics(), "changed": changed})


def _refuse(*_: object, **__: object) -> NoReturn:
    raise OSError(1, "Operation not permitted")


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer))


class _Unloadable:
    def load(self) -> None:
        _refuse()


SCENARIOS: dict[str, Callable[..., None]] = {
    scenario.__name__: scenario for scenario in (workout, escape, leak, read_only, undo, fault)
}


# --- tests: these run in pytest --------------------------------------------------------------------------------


def command(scenario: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", __file__, scenario, *map(str, arguments)]


def run(scenario: str, *arguments: object, pass_fds: Sequence[int] = ()) -> bytes:
    done = subprocess.run(
        command(scenario, *arguments),
        env=enclave_environment(2),
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@cache
def escape_report(variant: str) -> EscapeReport:
    return msgspec.json.decode(run("escape", variant), type=EscapeReport)


def allowed(report: EscapeReport) -> set[str]:
    assert {attempt.name for attempt in report.attempts} == ATTEMPTS
    return {attempt.name for attempt in report.attempts if not attempt.refused}


def needs(*measures: str) -> None:
    """Skip where this machine does not offer a measure."""
    offered = {measure.name: measure for measure in escape_report("whole").sandbox.measures}
    for name in measures:
        if offered[name].state != "on":
            pytest.skip(f"{name} is not offered here: {offered[name].detail}")


def test_everything_gets_out_without_the_lock() -> None:
    out = allowed(escape_report("no-lock"))
    # A container may refuse namespaces by itself; the rest must succeed, or the tests below show nothing.
    assert out >= ATTEMPTS - {"new-namespace"}


def test_nothing_gets_out_of_the_whole_lock() -> None:
    needs("landlock-files", "landlock-network", "landlock-scope", "seccomp")
    report = escape_report("whole")
    assert tuple(measure.name for measure in report.sandbox.measures) == MEASURES
    assert {measure.state for measure in report.sandbox.measures} == {"on"}
    assert allowed(report) == set()
    # Refused as forbidden, not failed for another reason.
    assert {attempt.detail.split(":")[0] for attempt in report.attempts} <= {"EPERM", "EACCES"}


def test_landlock_alone_refuses_files_tcp_tracing_and_signals() -> None:
    needs("landlock-files", "landlock-network", "landlock-scope")
    report = escape_report("landlock-only")
    assert report.sandbox.state("seccomp") == "unavailable"
    assert "pyseccomp" in report.sandbox.measures[-1].detail
    # With what is left out said truthfully: new processes inherit the lock, UDP does not fall under it.
    assert allowed(report) <= {"open-socket", "start-process", "new-namespace"}
    assert "open-socket" in allowed(report)


def test_seccomp_alone_refuses_all_but_reading() -> None:
    needs("seccomp")
    report = escape_report("seccomp-only")
    assert report.sandbox.state("landlock-files") == "unavailable"
    assert allowed(report) == {"read-file", "open-memory"}


def test_a_machine_without_both_is_reported_and_not_fatal() -> None:
    report = escape_report("neither")
    states = {measure.name: measure.state for measure in report.sandbox.measures}
    assert {name for name, state in states.items() if state == "unavailable"} == set(MEASURES[4:])
    assert {states[name] for name in MEASURES[:4]} == {"on"}
    assert {"open-socket", "connect", "write-file", "execute"} <= allowed(report)


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6, 7, 99])
def test_an_older_or_newer_landlock_is_used_as_far_as_it_goes(abi: int) -> None:
    needs("landlock-files", "landlock-network", "landlock-scope")
    report = escape_report(f"abi-{abi}")
    out = allowed(report)
    assert not out & {"write-file", "read-file", "execute", "trace-process", "open-memory"}
    assert (report.sandbox.state("landlock-network") == "on") is (abi >= 4)
    assert ({"connect", "bind"} & out == set()) is (abi >= 4)
    assert (report.sandbox.state("landlock-scope") == "on") is (abi >= 6)
    assert ("signal-process" in out) is (abi < 6)


def test_a_folder_that_may_be_read_may_only_be_read(tmp_path: Path) -> None:
    needs("landlock-files")
    (tmp_path / "program").touch(mode=0o700)
    done = json.loads(run("read_only", tmp_path))
    assert {name for name, allowed in done.items() if allowed} == {"read"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["program"]


def test_the_lock_cannot_be_taken_off() -> None:
    needs("seccomp")
    seen = json.loads(run("undo"))
    assert seen["undumpable"] is True
    assert seen["core"] is False
    fields = dict(line.split(":\t", 1) for line in seen["status"].splitlines() if ":\t" in line)
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_only_named_descriptors_stay_open() -> None:
    secret, kept = os.memfd_create("secret"), os.memfd_create("kept")
    try:
        assert json.loads(run("leak", secret, kept, pass_fds=(secret, kept))) == [0, 1, 2, kept]
    finally:
        os.close(secret)
        os.close(kept)


@pytest.mark.parametrize(
    ("case", "code", "changed"),
    [
        ("descriptor", "sandbox.descriptor-not-open", 0),
        ("thread", "sandbox.threads-running", 0),
        ("limit", "sandbox.measure-failed", 1),
        ("landlock", "sandbox.measure-failed", 1),
        ("load", "sandbox.measure-failed", 1),
    ],
)
def test_a_lock_that_does_not_hold_is_an_error(case: str, code: str, changed: int) -> None:
    if case in {"landlock", "load"}:
        needs("landlock-files", "seccomp")
    error = json.loads(run("fault", case))
    assert (error["family"], error["code"], error["changed"]) == ("EnvironmentFault", code, changed)


@cache
def do_workout(locked: str, *, bwrap: str | None = None) -> dict[str, Any]:
    """Run the workout as a launcher would: a socket and a sealed ring handed over, the answer by the socket."""
    host, enclave = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ring = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
    environment = enclave_environment(2)
    with host, enclave:
        os.ftruncate(ring, RING_BYTES)
        os.pwrite(ring, b"ping", 0)
        argv = command("workout", enclave.fileno(), ring, locked)
        process = subprocess.Popen(
            confined_command(argv, bwrap=bwrap, read_only=[Path(__file__)], environment=environment),
            env=environment,
            pass_fds=(enclave.fileno(), ring),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        enclave.close()
        host.settimeout(120)
        said = host.recv(1 << 16)
        host.close()
        assert process.wait(30) == 0, process.communicate()[1].decode()
        process.communicate()
    assert os.pread(ring, 4, 4) == b"pong"
    os.close(ring)
    answer: dict[str, Any] = json.loads(said)
    return answer


def test_training_and_cryptography_work_behind_the_lock_and_give_the_same_bits() -> None:
    plain, locked = do_workout("unlocked"), do_workout("locked")
    assert set(locked["measures"]) == set(MEASURES)
    assert locked["cryptography"] is True
    assert locked["ring"] == "ping"
    assert locked["threads"] >= 2
    assert locked["weights"] == plain["weights"]


def test_they_work_in_bubblewrap_too() -> None:
    found = find_bubblewrap()
    if found.bwrap is None:
        pytest.skip(found.detail)
    confined, plain = do_workout("locked", bwrap=found.bwrap), do_workout("unlocked")
    assert confined["cryptography"] is True
    assert confined["weights"] == plain["weights"]


def test_every_system_call_has_one_rule() -> None:
    assert not set(syscalls._ALLOWED) & set(syscalls._REFUSED)
    assert len(set(syscalls._ALLOWED)) == len(syscalls._ALLOWED)
    assert len(set(syscalls._REFUSED)) == len(syscalls._REFUSED)


def test_a_machine_without_a_filter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    rules, measure = sandbox._prepare_seccomp()
    assert rules is None
    assert measure == Measure("seccomp", "unavailable", measure.detail)
    assert "s390x" in measure.detail


def test_python_itself_stays_readable_and_nothing_of_the_user() -> None:
    readable = sandbox.readable_paths()
    assert Path(os.__file__).parent.resolve() in {path.resolve() for path in readable}
    assert Path(msgspec.__file__).parents[1] in readable
    for private in (Path.home(), Path("/"), Path("/etc"), Path("/proc"), Path("/tmp"), Path.cwd()):  # noqa: S108
        assert private not in readable


def test_the_program_wants_to_be_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        escapes.main([])
    assert "--report" in capsys.readouterr().err


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](*sys.argv[2:])
