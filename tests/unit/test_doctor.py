"""The doctor: what it finds is what was tried, what it cannot find out is said, and nothing makes it fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from caltrain import doctor
from caltrain.doctor import DoctorReport, SandboxTrial, State, examine, sandbox_trials, tee_hardware
from caltrain.enclave import escapes, sandbox
from caltrain.host.confine import Confinement

NO_BWRAP = Confinement(None, "bubblewrap is not installed")


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return examine()


def states(report: DoctorReport) -> dict[str, State]:
    findings = (*report.software, *report.isolation, *report.hardware)
    found = {finding.name: finding.state for finding in findings}
    assert len(found) == len(findings)
    return found


def test_importing_it_imports_neither_torch_nor_the_enclave() -> None:
    program = (
        "import sys, caltrain.doctor; "
        "sys.exit('torch' in sys.modules or any(name.startswith('caltrain.enclave') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-I", "-c", program], timeout=60, check=False).returncode == 0


def test_it_reports_every_area_and_can_be_printed_as_json(report: DoctorReport) -> None:
    assert set(states(report)) == {
        *("python", "torch", "hpke", "sealed-memory", "user-namespaces", "bubblewrap", "landlock", "seccomp"),
        *("no-core-dumps", "ptrace-restricted", "sgx", "snp-guest", "tdx-guest", "configfs-tsm", "nitro"),
    }
    assert msgspec.json.decode(msgspec.json.encode(report), type=DoctorReport) == report


def test_what_this_package_requires_is_here(report: DoctorReport) -> None:
    found = states(report)
    assert (found["python"], found["torch"], found["hpke"], found["sealed-memory"]) == ("yes",) * 4
    torch = next(finding for finding in report.software if finding.name == "torch")
    assert "kernels for" in torch.detail


def test_the_trials_are_of_the_real_lock(report: DoctorReport) -> None:
    bare, confined = report.trials
    assert (bare.started, confined.started) == ("bare", "bubblewrap")
    assert {attempt.name for attempt in bare.attempts} == set(escapes._ATTEMPTS)
    on = {measure.name for measure in bare.measures if measure.state == "on"}
    assert {"no-new-privileges", "no-core-dump", "not-dumpable", "descriptors-closed"} <= on
    assert (states(report)["seccomp"] == "yes") is ("seccomp" in on)
    assert (states(report)["landlock"] == "yes") is ("landlock-files" in on)
    if "seccomp" in on and "landlock-files" in on:
        assert all(attempt.refused for attempt in bare.attempts)
        assert bare.detail.startswith("12 of 12")
    assert (states(report)["bubblewrap"] == "yes") is bool(confined.attempts)


def test_what_a_simulated_enclave_does_not_give_is_always_said(report: DoctorReport) -> None:
    text = " ".join(report.not_protected).lower()
    for word in ("root", "software key", "rollback", "side channels", "physical", "measurement", "kernel"):
        assert word in text


def test_it_reads_what_the_enclave_writes() -> None:
    assert msgspec.structs.fields(doctor.Measure) == msgspec.structs.fields(sandbox.Measure)
    assert msgspec.structs.fields(doctor.Attempt) == msgspec.structs.fields(escapes.Attempt)


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, path, _ in doctor._TEE_FILES])
def test_a_tee_is_found_by_its_file(name: str, path: str, tmp_path: Path) -> None:
    assert {finding.state for finding in tee_hardware(tmp_path)} == {"no"}
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert {finding.name for finding in tee_hardware(tmp_path) if finding.state == "yes"} == {name}


def test_a_folder_that_may_not_be_read_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    assert {finding.state for finding in tee_hardware(tmp_path)} == {"unknown"}


def test_without_bubblewrap_the_bare_trial_remains() -> None:
    bare, confined = sandbox_trials(NO_BWRAP)
    assert bare.attempts
    assert confined == SandboxTrial("bubblewrap", "bubblewrap is not installed")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo broken >&2; exit 7", "status 7: broken"),
        ("echo garbage", "cannot be read"),
        ("""echo '{"sandbox":{"measures":[]},"attempts":[],"more":1}'""", "cannot be read"),
        ("head -c 70000 /dev/zero", "70000 bytes"),
        ("exec sleep 60", "did not run"),
    ],
)
def test_a_trial_that_goes_wrong_is_said(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(doctor, "_REPORT_SECONDS", 1)
    bare, _ = sandbox_trials(NO_BWRAP)
    assert said in bare.detail
    assert not bare.measures
    assert not bare.attempts
    assert doctor._measured("seccomp", bare, "seccomp") == doctor.Finding("seccomp", "unknown", bare.detail)


def test_what_is_not_installed_is_a_finding() -> None:
    def probe() -> NoReturn:
        raise ModuleNotFoundError("No module named 'torch'")

    found = doctor._finding("torch", probe)
    assert (found.state, found.detail) == ("no", "ModuleNotFoundError: No module named 'torch'")


def test_refused_user_namespaces_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: subprocess.CompletedProcess[bytes] = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    assert doctor._user_namespaces()[0] == "no"
