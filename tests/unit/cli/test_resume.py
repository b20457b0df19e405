"""The commands around a run that is taken up, or whose cut moves: what they call, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import pytest

from caltrain.cli import host as host_commands
from caltrain.cli import party as party_commands
from caltrain.crypto.dsse import SigningKey
from caltrain.errors import DataError, IntegrityError, LineageError
from caltrain.host_client import RunStatus
from caltrain.participant.identity import load_identity
from caltrain.participant.rejoin import Rejoined
from caltrain.participant.seal import own_shards, shard_path
from caltrain.project import Project
from caltrain.provenance.chain import Chain
from support.commands import Cli

WORD = Rejoined(
    run="0" * 32,
    head="sha256:" + "1" * 64,
    events=9,
    at=(2, 7),
    resumed=1,
    stopped=("host.reported",),
    words=1,
    simulated=True,
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What `host serve` would have served."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("caltrain.host.server.serve", lambda _plan, **options: given.update(options))
    yield given
    if "sock" in given:
        given["sock"].close()


def serving(project: Project, tmp_path: Path, *more: str | Path) -> tuple[str | Path, ...]:
    folders = ("--folder", tmp_path / "host", "--root", project.operator.folder)
    return ("host", "serve", "--plan", project.plan_path, *folders, "--port", "0", *more)


def test_serve_passes_on_what_is_asked_for(project: Project, tmp_path: Path, served: dict[str, Any], cli: Cli) -> None:
    assert cli(*serving(project, tmp_path, "--resume", "--device", "cpu")).code == 0
    assert (served["resume"], served["anew"], served["device"], served["given"]) == (True, False, "cpu", {})
    served["sock"].close()
    assert cli(*serving(project, tmp_path, "--anew")).code == 0
    assert (served["resume"], served["anew"], served["device"]) == (False, True, "auto")


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--resume", "--anew"), "usage.refused"),
        (("--device", "tpu"), "usage.refused"),
        (("--wheel", "w.whl"), "given.not-named"),
        (("--initial", "w.safetensors"), "given.not-named"),
        (("--quarantine", "list.json"), "given.not-named"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_served(
    more: tuple[str, ...], code: str, project: Project, tmp_path: Path, served: dict[str, Any], cli: Cli
) -> None:
    shown = cli(*serving(project, tmp_path, *more), as_json=True)
    assert (shown.code, shown.error["code"]) == (2 if code == "usage.refused" else 10, code)
    assert served == {}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_is_not_resumed(project: Project, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "host"
    shown = cli(*serving(project, tmp_path, "--resume"))
    assert (shown.code, shown.out) == (15, "")
    assert "resume.nothing" in shown.err
    assert not folder.exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_run_that_would_be_lost_is_all_that_is_said(
    as_json: bool, project: Project, tmp_path: Path, cli: Cli
) -> None:
    folder = tmp_path / "host"
    folder.mkdir()
    event = Chain(SigningKey(), run="0" * 32).append("checkpoint", {})
    (folder / "chain.jsonl").write_bytes(msgspec.json.encode(event) + b"\n")
    shown = cli(*serving(project, tmp_path), as_json=as_json)
    if as_json:
        assert shown.error["code"] == "host.unfinished-run"
    else:
        assert shown.out == ""
        assert "host.unfinished-run" in shown.err


class FakeHost:
    """Answers with statuses, one after the other."""

    statuses: list[RunStatus]
    posted: list[str]

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def post(self, path: str, _envelope: None, _type: type[RunStatus]) -> RunStatus:
        self.posted.append(path)
        return self.statuses[0]

    def status(self) -> RunStatus:
        return self.statuses.pop(0)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[RunStatus]:
    """What the host will say."""
    monkeypatch.setattr(host_commands, "HostClient", FakeHost)
    monkeypatch.setattr("caltrain.reports.progress._POLL", 0)
    monkeypatch.setattr(FakeHost, "statuses", [], raising=False)
    monkeypatch.setattr(FakeHost, "posted", [], raising=False)
    return FakeHost.statuses


def test_train_resume_says_whose_word_is_missing_and_watches_to_the_end(says: list[RunStatus], cli: Cli) -> None:
    says += [
        RunStatus("starting"),
        RunStatus("resume", waiting_for=["alder", "birch"]),
        RunStatus("resume", waiting_for=["alder", "birch"]),
        RunStatus("resume", waiting_for=["birch"]),
        RunStatus("train", epoch=1, epochs=2),
        RunStatus("linked", epoch=2, epochs=2, loss=0.25),
    ]
    shown = cli("train", "resume", "http://x")
    assert shown.code == 0
    lines = [line for line in shown.out.splitlines() if "waiting for the word" in line or line == "the run goes on"]
    assert lines == [
        "waiting for the word of: alder, birch (caltrain party rejoin)",
        "waiting for the word of: birch (caltrain party rejoin)",
        "the run goes on",
    ]
    assert "simulated enclave" in shown.out
    assert FakeHost.posted == []


def test_train_resume_fails_with_the_runs_error(says: list[RunStatus], cli: Cli) -> None:
    error = IntegrityError("center.other-state", "another", step="train", fix="stop").diagnostics()
    says += [RunStatus("starting"), RunStatus("failed", error=error)]
    shown = cli("train", "resume", "http://x", as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "center.other-state")


@pytest.mark.parametrize(("rate", "said"), [(0.1, "center audited at rate 0.1"), (0.0, "center not audited")])
def test_train_run_says_how_the_center_is_watched(rate: float, said: str, says: list[RunStatus], cli: Cli) -> None:
    says += [RunStatus("linked", audit_rate=rate)]
    assert said in cli("train", "run", "http://x").out


def test_move_cut_asks_and_says_from_when(says: list[RunStatus], cli: Cli) -> None:
    says += [RunStatus("train", epoch=3, cut=5)]
    shown = cli("train", "move-cut", "http://x", "--front", "5", as_json=True).json
    assert shown == {"front": 5, "from_epoch": 4, "phase": "train"}
    assert FakeHost.posted == ["/v1/run/cut?front=5"]


# -- the parties' ------------------------------------------------------------------------------------------------


def rejoining(project: Project) -> tuple[str | Path, ...]:
    home = project.parties["alder"].folder
    return ("party", "rejoin", "http://x", "--home", home, "--plan", project.plan_path, "--policy", project.policy_path)


def test_rejoin_says_for_what_the_word_was_given(project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []

    def given(*args: Any, **options: Any) -> Rejoined:
        called.append((*args[1:], options["seconds"]))
        return WORD

    monkeypatch.setattr(party_commands, "rejoin_run", given)
    shown = cli(*rejoining(project), "--timeout", "7", as_json=True).json
    assert shown == {
        "party": "alder",
        "given": True,
        "run": WORD.run,
        "goes_on_at": "epoch 2, step 7",
        "events": 9,
        "head": WORD.head,
        "resumed_before": 1,
        "stopped_by_itself": ["host.reported"],
        "word": 1,
        "simulated": True,
    }
    ((plan, identity, policy, seconds),) = called
    assert (plan, identity.name, policy, seconds) == (project.plan, "alder", project.policy, 7)
    text = cli(*rejoining(project)).out
    assert "simulated enclave" in text
    assert "for one head" not in text


def test_rejoin_says_that_a_former_enclave_may_still_live(
    project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(party_commands, "rejoin_run", lambda *_, **__: replace(WORD, words=2))
    assert "word number 2 for one head: the former enclave may still live" in cli(*rejoining(project)).out
    assert cli(*rejoining(project), as_json=True).json["word"] == 2


def test_rejoin_says_when_no_word_is_waited_for(project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(party_commands, "rejoin_run", lambda *_, **__: None)
    assert cli(*rejoining(project), as_json=True).json == {"party": "alder", "given": False}


def test_a_run_that_was_turned_back_fails_by_name(project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise LineageError("chain.rolled-back", "older", step="look", fix="Refuse.")

    monkeypatch.setattr(party_commands, "rejoin_run", refuses)
    shown = cli(*rejoining(project), as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "chain.rolled-back")


def test_agree_cut_signs_for_that_cut(project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(party_commands, "agree_to_cut", lambda *_, front, **__: f"head for {front}")
    home = project.parties["alder"].folder
    words = ("party", "agree-cut", "http://x", "--home", home, "--plan", project.plan_path, "--front", "3")
    assert cli(*words, as_json=True).json == {"party": "alder", "front": 3, "head": "head for 3"}


def test_held_out_records_are_sealed_apart_and_listed_last(project: Project, tmp_path: Path, cli: Cli) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (25, 8, 8)).astype(np.uint8)
    labels, data = np.arange(25) % 10, tmp_path / "data.npz"
    np.savez(data, x_train=pictures[:20], y_train=labels[:20], x_test=pictures[20:], y_test=labels[20:])
    home = tmp_path / "ann"
    cli("party", "keygen", "ann", "--home", home)
    words = ("party", "seal", "--home", home, "--plan", project.plan_path, "--data", data)
    held = cli(*words, "--held-out", as_json=True).json
    assert (held["records"], held["held_out"]) == (5, True)
    with pytest.raises(DataError, match=r"^seal\.nothing"):
        own_shards(load_identity(home))
    assert cli(*words, as_json=True).json["records"] == 20
    entries = own_shards(load_identity(home))
    assert [(entry.records, entry.held_out) for entry in entries] == [(20, False), (5, True)]
    assert shard_path(load_identity(home), entries[1].shard).parent.name == "held-out"
    np.savez(data, x_train=pictures[20:], y_train=labels[20:], x_test=pictures[:1], y_test=labels[:1])
    for more in ((), ("--held-out",)):  # what is held out is not trained on, nor the other way round
        assert cli(*words, *more, as_json=True).error["code"] == "seal.duplicate-record"
