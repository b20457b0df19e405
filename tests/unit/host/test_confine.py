"""The enclave's start: a clean environment, and bubblewrap where it works; every claim is tried in a process."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caltrain.errors import ConfigError
from caltrain.host import confine
from caltrain.host.confine import Confinement, confined_command, enclave_environment, find_bubblewrap, probe_bubblewrap

LOOK_AROUND = """
import json, os, socket, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
json.dump({
    "environment": dict(os.environ),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "capabilities": int(status["CapEff"], 16),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "hostname": socket.gethostname(),
    "seen": [path for path in sys.argv[1:] if os.path.exists(path)],
    "writable": [path for path in ("/", "/usr", sys.prefix, "/tmp") if os.access(path, os.W_OK)],
}, sys.stdout)
"""


@pytest.fixture
def bwrap() -> str:
    found = find_bubblewrap()
    if found.bwrap is None:
        pytest.skip(found.detail)
    return found.bwrap


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    find_bubblewrap.cache_clear()
    yield
    find_bubblewrap.cache_clear()


def look_around(bwrap: str | None, *paths: Path, read_only: tuple[Path, ...] = ()) -> dict[str, Any]:
    environment = enclave_environment(2)
    argv = [sys.executable, "-I", "-c", LOOK_AROUND, *map(str, paths)]
    command = confined_command(argv, bwrap=bwrap, read_only=read_only, environment=environment)
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def test_the_environment_is_what_idle_threads_need_and_nothing_else() -> None:
    assert enclave_environment(3) == {
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }


@pytest.mark.parametrize("threads", [-1, 0, 1025])
def test_an_impossible_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(ConfigError) as caught:
        enclave_environment(threads)
    assert caught.value.code == "confine.thread-count"


def test_without_bubblewrap_the_command_is_the_command() -> None:
    command = confined_command(["python", "-I"], bwrap=None, read_only=[Path("/data")], environment={"A": "1"})
    assert command == ["python", "-I"]


def test_the_command_gives_up_everything_before_it_names_the_program() -> None:
    argv = ["/usr/bin/python3", "--version"]
    command = confined_command(argv, bwrap="/usr/bin/bwrap", read_only=[Path("/data")], environment={"A": "1"})
    assert command[0] == "/usr/bin/bwrap"
    assert command[command.index("--") :] == ["--", *argv]
    before = command[: command.index("--")]
    for option in ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--remount-ro"):
        assert option in before
    assert before[before.index("--cap-drop") + 1] == "ALL"
    assert before[before.index("--setenv") : before.index("--setenv") + 3] == ["--setenv", "A", "1"]
    # Else the private /tmp would hide an installation that lies there.
    assert before.index("--tmpfs") < before.index("--ro-bind")
    assert not {"--bind", "--dev-bind", "--share-net"} & set(before)


def test_only_python_its_packages_and_what_is_named_are_bound() -> None:
    command = confined_command(["x"], bwrap="bwrap", read_only=[Path("/data")], environment={})
    bound = {command[i + 1] for i, option in enumerate(command) if option in {"--ro-bind", "--ro-bind-try"}}
    here = Path(confine.__file__).parents[1]
    assert bound <= {
        *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/sys/devices/system/cpu", "/data"),
        *(str(path) for path in confine.python_paths()),
    }
    assert "/data" in bound
    assert any(here.is_relative_to(path) for path in bound)
    assert any(Path(sys.executable).is_relative_to(path) for path in bound)
    assert any(Path(sys.executable).resolve().is_relative_to(path) for path in bound)


def test_a_path_inside_another_is_bound_once() -> None:
    paths = [Path("/data/a"), Path("/data"), Path("/usr"), Path("/usr/share/x"), Path("/data")]
    assert confine._outermost(paths) == [Path("/data")]


def test_inside_there_is_no_network_no_other_process_and_no_right(bwrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALTRAIN_SECRET", "inherited")
    seen = look_around(bwrap)
    assert seen["interfaces"] == ["lo"]
    assert seen["processes"] == [1, 2]
    assert seen["capabilities"] == 0
    assert seen["hostname"] == "enclave"
    assert seen["writable"] == ["/tmp"]  # noqa: S108  # its own, in memory
    assert {**enclave_environment(2), "PWD": "/"} == seen["environment"]


def test_the_environment_is_cleared_even_when_the_launcher_forgets(bwrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALTRAIN_SECRET", "inherited")
    argv = [sys.executable, "-I", "-c", "import os; print(sorted(os.environ))"]
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment={"A": "1"})
    said = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert b"CALTRAIN_SECRET" not in said
    assert b"'A'" in said


def test_a_bare_enclave_inherits_no_variable_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALTRAIN_SECRET", "inherited")
    assert look_around(None)["environment"] == enclave_environment(2)


def test_its_tmp_is_not_the_hosts(bwrap: str, tmp_path: Path) -> None:
    probe = Path("/tmp") / f"{tmp_path.name}-of-{tmp_path.parent.name}"  # noqa: S108
    argv = [sys.executable, "-I", "-S", "-c", "import sys; open(sys.argv[1], 'w').close()", str(probe)]
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment={})
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    try:
        assert not probe.exists()
    finally:
        probe.unlink(missing_ok=True)


def test_inside_only_named_files_are_seen(bwrap: str, tmp_path: Path) -> None:
    named, other = tmp_path / "named", tmp_path / "other"
    named.mkdir()
    (named / "file").write_text("x", encoding="ascii")
    other.write_text("x", encoding="ascii")
    paths = (named / "file", other, Path("/etc/passwd"), Path(__file__))
    assert look_around(None, *paths)["seen"] == [str(path) for path in paths]
    assert look_around(bwrap, *paths, read_only=(named,))["seen"] == [str(named / "file")]


def test_the_exit_status_comes_through(bwrap: str) -> None:
    argv = [sys.executable, "-I", "-S", "-c", "raise SystemExit(23)"]
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment={})
    assert subprocess.run(command, timeout=60, check=False).returncode == 23


def start_holding(bwrap: str, enclave: socket.socket) -> subprocess.Popen[bytes]:
    """A program inside that says a word on the channel and then waits."""
    program = (
        "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[1])); s.sendall(b'here'); time.sleep(600)"
    )
    argv = [sys.executable, "-I", "-c", program, str(enclave.fileno())]
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment={})
    return subprocess.Popen(command, pass_fds=(enclave.fileno(),))


def test_the_channel_comes_through_and_closes_when_the_enclave_is_killed(bwrap: str) -> None:
    host, enclave = socket.socketpair()
    with host:
        process = start_holding(bwrap, enclave)
        enclave.close()
        host.settimeout(30)
        assert host.recv(4) == b"here"
        process.kill()  # bubblewrap itself; the program inside has to die with it
        assert host.recv(4) == b""
        process.wait(30)


def test_no_bubblewrap_is_said(monkeypatch: pytest.MonkeyPatch, fresh_cache: None) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = find_bubblewrap()
    assert found.bwrap is None
    assert "not installed" in found.detail


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'setting up uid map: Permission denied' >&2; exit 1", "uid map: Permission denied"),
        ("exit 3", "exit status 3"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_a_bubblewrap_that_does_not_work_is_not_used(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confine, "_PROBE_SECONDS", 1)
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    fake.chmod(0o700)
    found = probe_bubblewrap(str(fake))
    assert found.bwrap is None
    assert said in found.detail
    assert "bare" in found.detail


def test_a_bubblewrap_that_is_not_there_is_not_used(tmp_path: Path) -> None:
    found = probe_bubblewrap(str(tmp_path / "bwrap"))
    assert found == Confinement(None, found.detail)
    assert "No such file" in found.detail


def test_it_is_tried_once(monkeypatch: pytest.MonkeyPatch, fresh_cache: None) -> None:
    tries: list[str | None] = []

    def probe(path: str | None) -> Confinement:
        tries.append(path)
        return Confinement(path, "works")

    monkeypatch.setattr(shutil, "which", lambda _: "/somewhere/bwrap")
    monkeypatch.setattr(confine, "probe_bubblewrap", probe)
    assert find_bubblewrap() is find_bubblewrap()
    assert tries == ["/somewhere/bwrap"]


def test_the_lock_and_bubblewrap_go_together(bwrap: str) -> None:
    environment = enclave_environment(1)
    argv = [sys.executable, "-I", "-m", "caltrain.enclave.sandbox", "--report"]
    command = confined_command(argv, bwrap=bwrap, read_only=(), environment=environment)
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert {measure["state"] for measure in report["sandbox"]["measures"]} <= {"on", "unavailable"}
    for attempt in report["attempts"]:
        assert attempt["refused"] or attempt["name"] in {"open-socket", "start-process", "new-namespace"}
