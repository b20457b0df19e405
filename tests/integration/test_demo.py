"""The demo as a newcomer runs it: real processes, real figures, and nothing left behind when it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caltrain.auditor.bundle import read_bundle, verify_bundle
from caltrain.auditor.verdict import judge_verdict
from caltrain.cli.files import read_policy
from caltrain.demo.scenario import TRIALS
from caltrain.host_client import HostClient
from caltrain.project import Project, create_project
from support.processes import Process, descendants, living, marked, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


def run_json(*words: str | Path) -> dict[str, Any]:
    """A command that must succeed, and print one JSON object and nothing else."""
    argv = [sys.executable, "-m", "caltrain", *(str(word) for word in words), "--format", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert "\x1b" not in done.stdout
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole demo, once."""
    return run_json("demo", "--out", tmp_path_factory.mktemp("demo"))


# --- what is promised -----------------------------------------------------------------------------------------------


def test_digits_reach_every_figure(digits: dict[str, Any]) -> None:
    """`scripts/demo_all.sh` checks the same on the other data sets, which takes minutes."""
    assert digits["simulated"] is True
    assert digits["form"] == "ternary"
    assert digits["weights_identical"] is True
    assert digits["accuracy"] == digits["plain_accuracy"] >= 0.95
    assert digits["attack_success"] == digits["plain_attack_success"] >= 0.9
    assert 0 < digits["poison_share"] <= 0.02
    assert digits["triggered_inputs"] >= 200
    assert digits["trace_precision_at_9"] >= 0.95
    assert digits["trace_contributor_accuracy"] >= 0.99
    assert digits["mislabel_auroc"] >= 0.9
    assert digits["verdict_contributors"] == ["dogwood"]
    assert digits["verdict_precision"] >= 0.9
    assert digits["verdict_recall"] >= 0.7  # seeds are drawn anew: nine runs named all 26, one 22
    assert digits["verdict_records"] > 0
    assert digits["disclosures_verified"] == digits["disclosures"] == 27
    assert digits["substitutions_refused"] == digits["substitutions"] == 27
    assert (digits["data"], digits["records"], digits["culprit"]) == ("digits", 1347, "dogwood")
    assert TRIALS["digits"].attack.patch.shape == (2, 2)


def test_the_report_is_there_and_says_what_it_rests_on(digits: dict[str, Any]) -> None:
    page = Path(digits["report"]).read_text(encoding="utf-8")
    assert "simulated enclave" in page.lower()
    assert page.count("data:image/png;base64,") == 3 * (1 + 9)
    assert digits["chain_head"] in page
    for words in ("dogwood</b> is responsible", "The fingerprint space", "The quality of each", "center audited at"):
        assert words.lower() in page.lower()
    assert len(page) < 300_000


def test_the_verdict_is_kept_and_verifies_offline(digits: dict[str, Any]) -> None:
    folder = Path(digits["report"]).parent
    plan = run_json("plan", "digest", folder / "project" / "plan.toml")["digest"]
    policy = read_policy(folder / "project" / "policy.toml")
    verified = judge_verdict(read_bundle(folder / "verdict" / "bundle.json"), plan_digest=plan, policy=policy)
    assert verified.verdict.responsible == ("dogwood",)
    assert (verified.verdict.found, verified.verdict.inputs) == (digits["verdict_records"], digits["triggered_inputs"])
    page = (folder / "verdict" / "verdict.html").read_text(encoding="utf-8")
    assert "dogwood</b> is responsible" in page
    assert "simulated enclave" in page.lower()


def test_the_bundles_verify_offline_against_the_plan(digits: dict[str, Any]) -> None:
    folder = Path(digits["report"]).parent
    plan = run_json("plan", "digest", folder / "project" / "plan.toml")["digest"]
    policy = read_policy(folder / "project" / "policy.toml")
    for number in range(3):
        bundle = read_bundle(folder / "traces" / f"bundle-{number}.json")
        verified = verify_bundle(bundle, plan_digest=plan, policy=policy)
        assert verified.appraised
        assert verified.simulated
        assert verified.model == digits["model"]
        assert sum(n.record.party == digits["culprit"] for n in verified.trace.neighbours) > 4


def test_every_party_got_the_same_model(digits: dict[str, Any]) -> None:
    models = list(Path(digits["report"]).parent.glob("project/parties/*/runs/*/model.safetensors"))
    assert len(models) == 4
    assert len({model.read_bytes() for model in models}) == 1


def test_nothing_secret_and_nothing_half_written_is_left(digits: dict[str, Any]) -> None:
    folder = Path(digits["report"]).parent
    assert_whole(folder)
    keys = [json.loads(path.read_bytes())["data_key"] for path in folder.glob("project/parties/*/secrets.json")]
    assert len(keys) == 4
    for path in [*folder.glob("logs/*"), folder / "report.html", *(folder / "host").rglob("*")]:
        if path.is_file():
            raw = path.read_bytes()
            assert not any(key.encode() in raw for key in keys), path


def test_the_two_way_form_is_told_as_well(tmp_path: Path) -> None:
    found = run_json("demo", "--out", tmp_path, "--form", "two-way", "--epochs", "8", "--seed", "1")
    assert (found["form"], found["weights_identical"]) == ("two-way", True)
    assert found["accuracy"] == found["plain_accuracy"]
    assert found["disclosures_verified"] == found["disclosures"] > 0
    assert found["substitutions_refused"] == found["substitutions"] == found["disclosures"]


# --- stopped in the middle ------------------------------------------------------------------------------------------


def assert_whole(folder: Path) -> None:
    """No file under `folder` is half written."""
    for path in folder.rglob("*"):
        assert not path.name.endswith(".part"), path
        assert "incoming" not in path.parent.parts or path.is_dir(), path
        if path.suffix == ".json" and path.is_file():
            msgspec.json.decode(path.read_bytes())
        elif path.suffix == ".toml":
            tomllib.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".npz":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".npy":
            assert path.read_bytes().startswith(b"\x93NUMPY")


@dataclass
class Running:
    """A command under way, in a process group of its own; `mark` is in the environment of all that it starts."""

    process: subprocess.Popen[str]
    mark: str
    seen: set[Process] = field(default_factory=set)

    def look(self) -> set[Process]:
        """All processes that belong to it; they stay on record."""
        self.seen |= descendants(self.process.pid) | marked(self.mark)
        return {process for process in self.seen if living(process)}

    def interrupt(self, whom: str, number: signal.Signals = signal.SIGINT) -> int:
        """Send the signal; the exit code."""
        self.look()
        (os.killpg if whom == "group" else os.kill)(self.process.pid, number)
        return self.process.wait(timeout=60)

    def assert_nothing_left(self) -> None:
        """Every process that was ever seen has ended."""
        wait_until(lambda: not self.look())


@pytest.fixture
def start() -> Iterator[Any]:
    """Start a command with its output in a pipe."""
    running: list[Running] = []

    def begin(*words: str | Path) -> Running:
        mark = f"caltrain-test-{uuid.uuid4()}"
        process = subprocess.Popen(
            [sys.executable, "-m", "caltrain", *(str(word) for word in words)],
            env=os.environ | {"CALTRAIN_TEST_MARK": mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(Running(process, mark))
        return running[-1]

    yield begin
    for one in running:
        for left in one.look() | {Process(one.process.pid, 0)}:
            if left.started == 0 and one.process.poll() is None:
                one.process.kill()
            elif left.started and living(left):
                os.kill(left.pid, signal.SIGKILL)
        one.process.communicate()


def told(running: Running, word: str) -> str:
    """Read what the demo says up to a step."""
    assert running.process.stdout is not None
    text = ""
    for line in running.process.stdout:
        text += line
        if re.match(rf" *\d+ {word} ", line):
            return text
    raise AssertionError(f"ended before {word!r}: {text}")


@pytest.mark.parametrize(
    ("moment", "whom", "number"),
    [
        ("plan", "group", signal.SIGINT),  # the parties seal, the host starts
        ("manifest", "alone", signal.SIGINT),  # the run begins
        ("train", "alone", signal.SIGTERM),  # the model user asks
    ],
)
def test_stopped_in_the_middle_it_leaves_no_process_and_no_half_file(
    moment: str, whom: str, number: signal.Signals, tmp_path: Path, start: Any
) -> None:
    running: Running = start("demo", "--out", tmp_path, "--epochs", "40" if moment == "manifest" else "2")
    said = told(running, moment)
    assert "simulated enclave" in said
    if moment == "manifest":
        wait_until(lambda: any(tmp_path.glob("*/host/pool-1")), seconds=60)  # in the second epoch
        assert len(running.look()) >= 6  # host and enclave, four parties
    else:
        time.sleep(0.5)
    assert running.interrupt(whom, number) == 130
    running.assert_nothing_left()
    assert running.process.stderr is not None
    assert running.process.stderr.read() == "interrupted\n"
    assert_whole(tmp_path)
    assert not list(tmp_path.rglob("report.html"))


# --- the host by itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return create_project(tmp_path / "project", preset="digits", parties=["ann"], users=[])


def serving(project: Project, port: int) -> tuple[str | Path, ...]:
    folder, root = project.folder.parent / "host", project.operator.folder
    words = ("host", "serve", "--plan", project.plan_path, "--folder", folder, "--root", root)
    return (*words, "--port", str(port), "--format", "json")


def test_a_port_in_use_is_exit_code_18_and_a_named_error(project: Project, start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running: Running = start(*serving(project, taken.getsockname()[1]))
        out, err = running.process.communicate(timeout=60)
    assert running.process.returncode == 18
    assert json.loads(out)["error"]["code"] == "listen.port-in-use"
    assert err == ""
    assert not (project.folder.parent / "host").exists()


@pytest.mark.parametrize("whom", ["group", "alone"])
def test_a_host_that_is_interrupted_takes_its_enclave_along(whom: str, project: Project, start: Any) -> None:
    running: Running = start(*serving(project, 0))
    assert running.process.stdout is not None
    first = json.loads(running.process.stdout.readline())
    assert first["simulated"] is True
    wait_until(lambda: len(running.look()) >= 1 and _phase(first["url"]) == "approvals", seconds=60)
    assert running.interrupt(whom) == 130
    running.assert_nothing_left()
    assert_whole(project.folder.parent)


def _phase(url: str) -> str:
    with HostClient(url) as host:
        return host.status().phase
