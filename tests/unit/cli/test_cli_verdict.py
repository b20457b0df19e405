"""`caltrain verdict`, `caltrain verify` of a verdict, `caltrain party hunt`."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.attestation.verify import Claims
from caltrain.auditor.bundle import TraceBundle
from caltrain.auditor.verdict import VerifiedVerdict, judge_verdict
from caltrain.boundary.sealed import Answers, SuspicionReport, seal_for
from caltrain.cli import query
from caltrain.client.ask import Answered
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.enclave import verdict as inside
from caltrain.enclave.run import State
from caltrain.exposure.figures import Estimate
from caltrain.participant import confident
from caltrain.participant.hunt import kept_report
from caltrain.participant.identity import create_identity
from caltrain.participant.receive import SUSPICION
from caltrain.project import Project
from caltrain.provenance.verdict import VerdictStatement
from support.commands import Cli
from support.courses import Course
from support.pages import Page, assert_harmless
from support.verdicts import NOBODY, asked_for_verdict, somebody, verdict_bundle
from support.world import World

INPUTS = np.random.default_rng(3).integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
DIGEST = "sha256:" + "0" * 64


@cache
def judged(*, named: bool = True) -> tuple[World, TraceBundle, VerdictStatement]:
    """A world with a verdict that names somebody, or nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "judge", lambda *_: somebody([*range(12)]) if named else NOBODY)
        world = World(epochs=1).run_to(State.LINKED)
        return world, verdict_bundle(world), asked_for_verdict(world)[2]


@pytest.fixture
def enclave(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers every question with a verdict; keeps what was asked."""
    asked: dict[str, Any] = {"named": True}

    def ask(_host: object, _plan: object, _policy: object, **options: Any) -> Answered:
        asked.update(options)
        said = judged(named=asked["named"])[2]
        return Answered(
            claims=Claims(kind="simulated", simulated=True, measurement="", report_data=b""),
            evidence=judged()[1].evidence,
            answers=Answers(model=DIGEST, predicted=(7,) * 3, budget_left=5),
            traces=(),
            envelopes=(SigningKey().sign("verdict", said),),
            verdicts=(said,),
        )

    monkeypatch.setattr(query, "ask", ask)
    return asked


def asking(project: Project) -> list[str | Path]:
    user = project.users["analyst"].folder
    places = ("--home", user, "--plan", project.plan_path, "--policy", project.policy_path)
    return ["--url", "http://127.0.0.1:1", *places]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    np.save(tmp_path / "inputs.npy", INPUTS)
    return tmp_path / "inputs.npy"


def test_a_verdict_names_who_is_responsible_and_how_sure_that_is(
    project: Project, inputs: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    text = cli("verdict", inputs, *asking(project)).out
    assert enclave["kind"] == "verdict"
    assert (enclave["inputs"] == INPUTS).all()
    assert "responsible: beta" in text
    assert text.count("simulated enclave") == 1
    assert "center not audited: a hostile host could have planted what no record shows" in text
    assert re.search(r"beta +100\.0% +33\.3% +0\.0001 +0\.0002", text)
    assert "12 records held responsible, estimated to be so rightly: 98.8% (91.2% to 100.0%)" in text
    assert "share_of_blame" not in text  # the table says it
    assert len(re.findall(r"^  \w+ [0-9a-f]{32}:\d+$", text, re.M)) == 9
    shown = cli("verdict", inputs, *asking(project), as_json=True).json
    assert (shown["outcome"], shown["responsible"], shown["suspects"]) == ("responsible", ["beta"], 12)
    assert shown["kinds"] == {"trigger": 2, "mislabelled": 1}
    assert (shown["center"], shown["audit_rate"], shown["budget_left"]) == ("center not audited", 0.0, 5)
    assert shown["precision"] == {"value": 0.988, "low": 0.912, "high": 1.0, "n": 12}


def test_a_verdict_may_name_nobody(project: Project, inputs: Path, enclave: dict[str, Any], cli: Cli) -> None:
    enclave["named"] = False
    text = cli("verdict", inputs, *asking(project)).out
    assert "cannot tell who is responsible\nnothing\n" in text
    assert "held responsible" not in text
    assert cli("verdict", inputs, *asking(project), as_json=True).json["responsible"] == []


@pytest.mark.parametrize("named", [True, False])
def test_a_verdict_can_be_had_as_a_page(
    named: bool, project: Project, inputs: Path, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    enclave["named"] = named
    path = tmp_path / "reports" / "verdict.html"
    assert cli("verdict", inputs, *asking(project), "--report", path, as_json=True).json["suspects"] == 12 * named
    page = Page.of(path)
    assert_harmless(page)
    assert ("beta is responsible" in page.words) == named
    assert ("It cannot be told who is responsible" in page.words) != named
    assert f"{inputs}:2" in page.words


def test_a_page_that_cannot_be_written_does_not_cost_the_verdict(
    project: Project, inputs: Path, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    shown = cli("verdict", inputs, *asking(project), "--report", tmp_path)
    assert shown.code == 18
    assert "responsible: beta" in shown.out
    assert enclave["kind"] == "verdict"


def test_a_folder_of_inputs_is_asked_about_in_the_order_of_its_names(
    project: Project, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    for name, x in zip(("b", "a", "c"), INPUTS, strict=True):
        np.save(folder / f"{name}.npy", x)
    (folder / "notes.txt").write_text("not an input")
    cli("verdict", folder, *asking(project), as_json=True)
    assert (enclave["inputs"] == INPUTS[[1, 0, 2]]).all()


def test_a_folder_without_inputs_is_a_named_error(project: Project, tmp_path: Path, cli: Cli) -> None:
    shown = cli("verdict", tmp_path, *asking(project), as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "input.none")


def test_the_signed_verdict_is_kept_before_anything_else_can_fail(
    project: Project, inputs: Path, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    shown = cli("verdict", inputs, *asking(project), "--out", tmp_path / "out", as_json=True)
    assert (shown.code, shown.error["code"]) == (18, "host.unreachable")  # the bundle's other parts are the host's
    kept = msgspec.json.decode((tmp_path / "out" / "verdict.json").read_bytes(), type=Envelope)
    assert kept.claims("verdict")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["verdict.json"]
    assert enclave["kind"] == "verdict"


def test_verify_says_what_a_bundle_with_a_verdict_proves(tmp_path: Path, cli: Cli) -> None:
    world, bundle, _ = judged()
    path = tmp_path / "bundle.json"
    path.write_bytes(msgspec.json.encode(bundle))
    words = ("verify", path, "--plan-digest", world.plan.digest())
    shown = cli(*words, as_json=True).json
    assert (shown["verified"], shown["responsible"], shown["disclosed"]) == (True, ["beta"], 0)
    assert (shown["run"], shown["model"]) == (world.run.vault.run, world.run.model_digest)
    assert (shown["simulated"], shown["center_audited"], shown["front_public"]) == (True, False, False)
    text = cli(*words).out
    assert text.count("simulated enclave") == text.count("center not audited: ") == 1
    assert "public weights" not in text
    refused = cli("verify", path, "--plan-digest", DIGEST, as_json=True)
    assert (refused.code, refused.error["code"]) == (17, "bundle.other-plan")


def test_verify_of_a_verdict_says_that_the_front_net_is_no_secret(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def public(found: TraceBundle, **anchors: Any) -> VerifiedVerdict:
        return msgspec.structs.replace(judge_verdict(found, **anchors), front_public=True, simulated=False)

    world, bundle, _ = judged()
    monkeypatch.setattr("caltrain.cli.verify.judge_verdict", public)
    (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(bundle))
    text = cli("verify", tmp_path / "bundle.json", "--plan-digest", world.plan.digest()).out
    assert "training began from public weights: the FrontNet is no secret" in text
    assert "simulated enclave" not in text


# --- party hunt -----------------------------------------------------------------------------------------------------

RUN, SHARD = "ab" * 16, "cd" * 16
REPORT = SuspicionReport(
    model=DIGEST,
    scores={
        "disagreement": {SHARD: b"\x00\x00\xe8\x03"},
        "labels": {SHARD: b"\x0a\x00\x14\x00"},
        "spectral": {SHARD: b"\x00\x00\x00\x00"},
        "clusters": {SHARD: b"\x00\x00\x01\x00"},
    },
    wrong_labels={"ann": Estimate(0.125, 0.05, 0.25, 2)},
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    identity = create_identity(tmp_path / "ann", "ann")
    folder = tmp_path / "ann" / "runs" / RUN
    folder.mkdir(parents=True)
    (folder / SUSPICION).write_bytes(seal_for(identity.data_key, "suspicion/v1", REPORT, context=RUN))
    return tmp_path / "ann"


def test_a_party_reads_which_of_its_records_are_suspicious(home: Path, cli: Cli) -> None:
    shown = cli("party", "hunt", "--home", home, "--run", RUN, "--top", "1", as_json=True).json
    assert shown["suspicious"]["disagreement"] == [{"record": f"{SHARD}:1", "score": 1.0}]
    assert shown["suspicious"]["labels"] == [{"record": f"{SHARD}:1", "score": 0.02}]
    assert shown["wrong_labels"] == {"ann": {"value": 0.125, "low": 0.05, "high": 0.25, "n": 2}}
    assert (shown["party"], shown["run"], shown["model"]) == ("ann", RUN, DIGEST)
    text = cli("party", "hunt", "--home", home, "--run", RUN).out
    assert re.search(rf"disagreement +1\.000 +{SHARD}:1", text)
    assert text.count(f"{SHARD}:1") == 4
    assert text.count("simulated enclave") == 1
    assert "ann: wrong labels, estimated: 12.5% (5.0% to 25.0%)" in text


def test_a_hunt_is_asked_of_the_host_too(home: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_host: object, identity: Any, *, seconds: float) -> tuple[str, SuspicionReport]:
        assert seconds == 5
        return RUN, kept_report(identity, RUN)

    monkeypatch.setattr("caltrain.cli.hunt.fetch_report", fetch)
    shown = cli("party", "hunt", "--home", home, "--url", "http://127.0.0.1:1", "--timeout", "5", as_json=True)
    assert shown.json["run"] == RUN


def test_a_report_without_predictions_costs_one_line(home: Path, cli: Cli) -> None:
    shown = cli("party", "hunt", "--home", home, "--run", RUN, as_json=True).json
    assert shown["suspicious"]["confident-learning"] == []
    assert shown["confident_learning"].pop("why").startswith("the report has no predictions")
    assert shown["confident_learning"] == {"outcome": "no-predictions", "records": 0, "share": None}
    text = cli("party", "hunt", "--home", home, "--run", RUN).out
    assert "confident-learning: the report has no predictions" in text


def test_confident_learning_is_one_more_scan_of_a_kept_run(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    course = Course(tmp_path / "alpha")
    words = ("party", "hunt", "--home", tmp_path / "alpha", "--run", course.worlds[0].manifest.run)
    with monkeypatch.context() as patched:
        patched.setattr(confident, "_issues", lambda own: np.arange(3))
        shown = cli(*words, as_json=True).json
        assert shown["confident_learning"] == {"outcome": "found", "why": "", "records": 9, "share": 0.333}
        shards = [shard.header.shard for shard in course.worlds[0].parties["alpha"].shards]
        listed = shown["suspicious"]["confident-learning"]
        assert [line["record"] for line in listed] == [f"{shards[0]}:{leaf}" for leaf in range(3)]
        assert len(cli(*words, "--top", "2", as_json=True).json["suspicious"]["confident-learning"]) == 2
        text = cli(*words).out
        assert "alpha: wrong labels, by confident learning (cleanlab): 33.3% of 9 records" in text
        assert re.search(rf"{listed[1]['score']:.3f} +{shards[0]}:1", text)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    without = cli(*words, as_json=True)
    assert (without.code, without.json["confident_learning"]["outcome"]) == (0, "not-installed")
    assert "pip install 'caltrain[accountability]'" in cli(*words).out


@pytest.mark.parametrize("words", [(), ("--url", "http://127.0.0.1:1", "--run", RUN)])
def test_one_of_url_and_run_says_which_hunt_is_meant(words: tuple[str, ...], home: Path, cli: Cli) -> None:
    shown = cli("party", "hunt", "--home", home, *words, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "option.missing")


def test_a_run_that_was_not_received_is_a_named_error(home: Path, cli: Cli) -> None:
    shown = cli("party", "hunt", "--home", home, "--run", "0" * 32, as_json=True)
    assert shown.error["code"] == "hunt.none-kept"
