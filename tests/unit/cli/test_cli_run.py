"""`caltrain host serve`, `train run`, `doctor`, `demo` and `bench`: what they call, and what they say."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from caltrain import doctor
from caltrain.cli import host as commands
from caltrain.demo.result import DemoResult
from caltrain.errors import EnvironmentFault
from caltrain.host_client import RunStatus
from caltrain.participant.identity import load_identity
from caltrain.project import Project
from support.commands import Cli
from support.results import RESULT


def serving(project: Project, tmp_path: Path, *more: str) -> tuple[str | Path, ...]:
    folders = ("--folder", tmp_path / "host", "--root", project.operator.folder)
    return ("host", "serve", "--plan", project.plan_path, *folders, *more)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What `host serve` would have served."""
    given: dict[str, Any] = {}

    def serve(plan: object, **options: Any) -> None:
        given.update(options, plan=plan)
        options["on_ready"]()

    monkeypatch.setattr("caltrain.host.server.serve", serve)
    yield given
    if "sock" in given:
        given["sock"].close()


def test_serve_says_where_and_that_the_enclave_is_simulated(
    project: Project, tmp_path: Path, served: dict[str, Any], cli: Cli
) -> None:
    shown = cli(*serving(project, tmp_path, "--port", "0", "--auto-start"), as_json=True)
    assert shown.code == 0
    port = served["sock"].getsockname()[1]
    assert shown.json == {
        "url": f"http://127.0.0.1:{port}",
        "plan": project.plan.digest(),
        "simulated": True,
        "simulated_root": project.operator.signer.public,
    }
    assert (served["plan"], served["folder"]) == (project.plan, tmp_path / "host")
    assert served["auto_start"] is True
    assert served["root"].public == load_identity(project.operator.folder).signer.public
    served["sock"].close()
    text = cli(*serving(project, tmp_path, "--port", "0")).out
    assert "simulated enclave" in text
    assert f"http://127.0.0.1:{served['sock'].getsockname()[1]}" in text
    assert served["auto_start"] is False


def test_an_ipv6_address_is_written_as_urls_write_it(
    project: Project, tmp_path: Path, served: dict[str, Any], cli: Cli
) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    shown = cli(*serving(project, tmp_path, "--port", "0", "--address", "::1"), as_json=True)
    if shown.code == 18:
        pytest.skip("no IPv6 loopback here")
    assert shown.json["url"] == f"http://[::1]:{served['sock'].getsockname()[1]}"


def test_a_port_in_use_is_a_named_error_and_nothing_is_made(project: Project, tmp_path: Path, cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        shown = cli(*serving(project, tmp_path, "--port", port), as_json=True)
    assert shown.code == 18
    assert shown.error["code"] == "listen.port-in-use"
    assert port in shown.error["what"]
    assert "--port" in shown.error["fix"]
    assert list(tmp_path.iterdir()) == []


# --- train run ------------------------------------------------------------------------------------------------------


class FakeHost:
    """Answers with statuses, one after the other."""

    statuses: list[RunStatus]

    def __init__(self, url: str) -> None:
        self.url, self.posts = url, list[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def post(self, path: str, _envelope: None, _type: type[RunStatus]) -> RunStatus:
        assert path == "/v1/run/start"
        return self.statuses[0]

    def status(self) -> RunStatus:
        return self.statuses.pop(0)


@pytest.mark.parametrize(("simulated", "named"), [(True, 1), (False, 0)])
def test_train_run_watches_to_the_end(simulated: bool, named: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "HostClient", FakeHost)
    monkeypatch.setattr("caltrain.reports.progress._POLL", 0)
    statuses = [
        RunStatus("ingest", simulated=simulated),
        RunStatus("train", simulated=simulated, epoch=1, epochs=2, loss=0.5, images_per_second=100.0),
        RunStatus("linked", simulated=simulated, epoch=2, epochs=2, loss=0.25, images_per_second=100.0),
    ]
    monkeypatch.setattr(FakeHost, "statuses", [*statuses], raising=False)
    shown = cli("train", "run", "http://x", as_json=True).json
    assert (shown["phase"], shown["loss"], shown["simulated"]) == ("linked", 0.25, simulated)
    monkeypatch.setattr(FakeHost, "statuses", [*statuses], raising=False)
    text = cli("train", "run", "http://x").out
    assert text.count("simulated enclave") == named
    assert "\x1b" not in text  # no bar where nobody watches


def test_train_run_fails_with_the_runs_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    error = EnvironmentFault("enclave.died", "it is gone", step="train", fix="start again").diagnostics()
    monkeypatch.setattr(commands, "HostClient", FakeHost)
    monkeypatch.setattr(FakeHost, "statuses", [RunStatus("failed", error=error)] * 2, raising=False)
    shown = cli("train", "run", "http://x", as_json=True)
    assert (shown.code, shown.error) == (18, error)


def test_train_run_does_not_wait_forever(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "HostClient", FakeHost)
    monkeypatch.setattr(FakeHost, "statuses", [RunStatus("approvals", waiting_for=["ann"])] * 2, raising=False)
    shown = cli("train", "run", "http://x", "--timeout", "-1", as_json=True)
    assert (shown.code, shown.error["code"]) == (18, "host.too-slow")
    assert "approvals" in shown.error["what"]


# --- doctor, demo, bench --------------------------------------------------------------------------------------------

REPORT = doctor.DoctorReport(
    software=(doctor.Finding("python", "yes", "3.11"),),
    isolation=(doctor.Finding("seccomp", "no", "[bold]not[/] here"),),
    hardware=(doctor.Finding("sgx", "unknown", "no rights"),),
    trials=(doctor.SandboxTrial("bare", "0 of 0"),),
    not_protected=("root reads everything",),
)


def test_doctor_prints_the_measurement_and_every_finding(
    project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: REPORT)
    shown = cli("doctor", as_json=True).json
    assert shown["measurement"] == project.plan.enclave.measurement
    assert shown["isolation"] == [{"name": "seccomp", "state": "no", "detail": "[bold]not[/] here"}]
    assert shown["not_protected"] == ["root reads everything"]
    text = cli("doctor").out
    for words in (project.plan.enclave.measurement, "[bold]not[/] here", "root reads everything", "simulated enclave"):
        assert words in text


@pytest.mark.parametrize("as_json", [True, False])
def test_demo_calls_the_story_and_prints_its_result(
    as_json: bool, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def tell(data: str, **options: Any) -> DemoResult:
        given.update(options, data=data)
        options["console"].print("a step")
        return RESULT

    monkeypatch.setattr("caltrain.demo.story.tell", tell)
    words = ("--data", "mnist", "--data-dir", tmp_path, "--form", "two-way", "--seed", "3", "--epochs", "2")
    shown = cli("demo", *words, "--out", tmp_path / "out", as_json=as_json)
    assert shown.code == 0
    given.pop("console")
    assert given == {
        "data": "mnist",
        "data_dir": tmp_path,
        "download": False,
        "out": tmp_path / "out",
        "form": "two-way",
        "seed": 3,
        "epochs": 2,
    }
    if as_json:
        assert msgspec.convert(shown.json, DemoResult) == RESULT
    else:
        assert shown.out.startswith("a step\n")
        assert "simulated enclave" in shown.out


def test_the_demos_result_has_at_least_these_fields() -> None:
    promised = {
        *("data", "records", "form", "simulated", "accuracy", "plain_accuracy", "weights_identical"),
        *("attack_success", "plain_attack_success", "poison_share", "trace_precision_at_9"),
        *("trace_contributor_accuracy", "mislabel_auroc", "disclosures_verified", "substitutions_refused"),
        *("seconds", "report"),
    }
    assert promised <= set(DemoResult.__struct_fields__)


def test_bench_prints_what_was_measured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []

    def run(**options: int) -> dict[str, int]:
        asked.append(options)
        return {"speed": 7}

    monkeypatch.setattr("caltrain.bench.sealing.run", run)
    assert cli("bench", "sealing", "--records", "100", "--repeats", "1", as_json=True).json == {"speed": 7}
    assert asked == [{"records": 100, "repeats": 1}]
