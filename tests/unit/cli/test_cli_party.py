"""`caltrain party keygen|seal|disclose|join`: what a contributor types."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.cli import party as commands
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.crypto.hpke import seal_to
from caltrain.exposure.party_report import PartyReport
from caltrain.participant.assess import Voted
from caltrain.participant.identity import create_identity, load_identity
from caltrain.participant.seal import own_shards
from caltrain.plan import Plan, parse_plan
from caltrain.project import Project, create_project
from caltrain.provenance.statements import AssessedModel
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure, Refusal
from caltrain.records.schema import decode_record
from caltrain.records.shown import Reading, SealedDisclosure, open_disclosure
from support.commands import Cli

ZEROS = "sha256:" + "0" * 64
MODEL = ("--model", ZEROS)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    create_identity(tmp_path / "ann", "ann")
    return tmp_path / "ann"


def test_keygen_prints_the_entry_for_the_plan_and_no_secret(tmp_path: Path, cli: Cli) -> None:
    shown = cli("party", "keygen", "ann", "--home", tmp_path / "ann", as_json=True)
    identity = load_identity(tmp_path / "ann")
    assert shown.json == {"name": "ann", "public_key": identity.signer.public}
    assert base64.b64encode(identity.data_key).decode() not in shown.out
    assert base64.b64encode(identity.signer.private_bytes()).decode() not in shown.out


def test_keygen_does_not_replace_keys(home: Path, cli: Cli) -> None:
    before = load_identity(home)
    shown = cli("party", "keygen", "ann", "--home", home, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "identity.exists")
    assert load_identity(home).data_key == before.data_key


@pytest.mark.parametrize("name", ["", "Ann", "a b", "../ann", "-ann", "a" * 41, "ann\n"])
def test_keygen_refuses_what_cannot_be_a_name(name: str, tmp_path: Path, cli: Cli) -> None:
    shown = cli("party", "keygen", "--home", tmp_path / "x", "--format", "json", "--", name)
    assert (shown.code, shown.error["code"]) == (10, "identity.name")
    assert list(tmp_path.iterdir()) == []


def test_seal_says_which_shards_hold_how_many_records(home: Path, project: Project, records: Path, cli: Cli) -> None:
    words = ("party", "seal", "--home", home, "--plan", project.plan_path, "--data", records, "--shard-records", "8")
    shown = cli(*words, as_json=True).json
    assert [shard["records"] for shard in shown["shards"]] == [8, 8, 4]
    assert (shown["party"], shown["records"], shown["dropped"]) == ("ann", 20, 0)
    assert {s.shard for s in own_shards(load_identity(home))} == {shard["shard"] for shard in shown["shards"]}


def spoiled(records: Path, **changes: Any) -> None:
    with np.load(records) as archive:
        arrays = dict(archive) | changes
    np.savez(records, **arrays)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x_train": np.zeros((20, 8, 8), np.uint8)}, "seal.duplicate-record"),
        ({"x_train": np.ones((20, 9, 9), np.uint8), "x_test": np.ones((1, 9, 9), np.uint8)}, "record.shape"),
        ({"y_train": np.full(20, 10)}, "seal.unknown-class"),
        ({"x_train": np.full((20, 8, 8), None)}, "reader.kind"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_nothing_is_sealed(
    changes: dict[str, Any], code: str, home: Path, project: Project, records: Path, cli: Cli
) -> None:
    spoiled(records, **changes)
    shown = cli("party", "seal", "--home", home, "--plan", project.plan_path, "--data", records, as_json=True)
    assert shown.code == 11
    assert shown.error["code"] == code
    assert not list(home.glob("**/*.shard"))
    assert not list(home.glob("**/*.part"))


def test_copies_can_be_left_out(home: Path, project: Project, records: Path, cli: Cli) -> None:
    images = np.zeros((20, 8, 8), np.uint8)
    images[0] = 1
    spoiled(records, x_train=images, y_train=np.zeros(20, np.int64))
    words = ("party", "seal", "--home", home, "--plan", project.plan_path, "--data", records, "--drop-duplicates")
    shown = cli(*words, as_json=True).json
    assert (shown["records"], shown["dropped"]) == (2, 18)


@pytest.fixture
def sealed(home: Path, project: Project, records: Path, cli: Cli) -> str:
    words = ("party", "seal", "--home", home, "--plan", project.plan_path, "--data", records)
    shard: str = cli(*words, as_json=True).json["shards"][0]["shard"]
    return shard


def test_disclose_writes_the_signed_records(
    sealed: str, home: Path, project: Project, records: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "disclosures.json"
    asked = ("--record", f"{sealed}:3", "--record", f"{sealed}:19")
    words = ("party", "disclose", "--home", home, "--plan", project.plan_path, *asked, *MODEL, "--out", out)
    assert cli(*words, as_json=True).json == {
        "party": "ann",
        "disclosed": 2,
        "file": str(out),
        "readers": ["analyst"],
    }
    key = load_identity(home).signer.public
    reading = Reading("analyst", project.users["analyst"].reading_key())
    envelopes = msgspec.json.decode(out.read_bytes(), type=list[Envelope])
    with np.load(records) as archive:
        for envelope, row in zip(envelopes, (3, 19), strict=True):
            sealed_one = open_envelope(envelope, "sealed-disclosure", key, SealedDisclosure, step="test")
            opened = open_disclosure(sealed_one, reading)
            disclosure = open_envelope(opened, "disclosure", key, Disclosure, step="test")
            assert (disclosure.model, sealed_one.model) == (MODEL[1], MODEL[1])
            assert archive["x_train"][row].tobytes() not in base64.b64decode(sealed_one.sealed)
            assert (disclosure.record_ref.shard, disclosure.record_ref.leaf) == (sealed, row)
            pixels, label = decode_record(project.plan.data, base64.b64decode(disclosure.record))
            assert (pixels[0] == archive["x_train"][row]).all()
            assert label == archive["y_train"][row]


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ("{shard}:20", "disclose.no-such-record"),
        ("00112233445566778899aabbccddeeff:0", "disclose.no-such-record"),
        ("../{shard}:0", "disclose.no-such-record"),
        ("{shard}", "disclose.reference"),
        ("{shard}:x", "disclose.reference"),
        ("{shard}:-1", "disclose.reference"),
        ("{shard}:²", "disclose.reference"),
    ],
)
def test_a_record_that_is_not_ours_is_not_disclosed(
    record: str, code: str, sealed: str, home: Path, project: Project, cli: Cli
) -> None:
    out = home / "disclosures.json"
    asked = ("--record", f"{sealed}:0", "--record", record.format(shard=sealed))
    words = ("party", "disclose", "--home", home, "--plan", project.plan_path, *asked, *MODEL, "--out", out)
    shown = cli(*words, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, code)
    assert not out.exists()


def test_a_model_that_is_no_digest_is_named(
    sealed: str, home: Path, project: Project, tmp_path: Path, cli: Cli
) -> None:
    words = ("party", "disclose", "--home", home, "--plan", project.plan_path, "--record", f"{sealed}:0")
    shown = cli(*words, "--model", "the-best", "--out", tmp_path / "out.json", as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "digest.form")
    assert not (tmp_path / "out.json").exists()


def test_refusing_is_signed_and_shows_nothing(
    sealed: str, home: Path, project: Project, records: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "refusals.json"
    words = ("party", "disclose", "--refuse", "--home", home, "--plan", project.plan_path, "--record", f"{sealed}:3")
    shown = cli(*words, *MODEL, "--out", out, as_json=True).json
    assert shown == {"party": "ann", "refused": 1, "file": str(out)}
    (envelope,) = msgspec.json.decode(out.read_bytes(), type=list[Envelope])
    said = open_envelope(envelope, "refusal", load_identity(home).signer.public, Refusal, step="test")
    assert said == Refusal(record_ref=RecordRef("ann", sealed, 3), model=MODEL[1])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--url", "http://127.0.0.1:1"), (10, "option.missing")),
        (("--run", "ab" * 16), (10, "option.missing")),
        (("--refuse", "--url", "http://127.0.0.1:1", "--run", "ab" * 16), (10, "option.missing")),
        (("--url", "http://127.0.0.1:1", "--run", "ab" * 16), (17, "run.unknown")),
        (("--url", "http://127.0.0.1:1", "--run", "../ab"), (17, "run.unknown")),
    ],
)
def test_what_cannot_be_noted_is_not_written(
    words: tuple[str, ...], code: tuple[int, str], sealed: str, home: Path, project: Project, cli: Cli
) -> None:
    out = home / "disclosures.json"
    asked = ("party", "disclose", "--home", home, "--plan", project.plan_path, "--record", f"{sealed}:3", *MODEL)
    shown = cli(*asked, "--out", out, *words, as_json=True)
    assert (shown.code, shown.error["code"]) == code
    assert not out.exists()


def test_help_shows_what_stands_in_brackets_in_a_plan(cli: Cli) -> None:
    assert "trace.disclose_to" in cli("party", "reader", "--help").out


def test_the_entry_of_a_reader_opens_what_is_sealed_to_it(home: Path, cli: Cli) -> None:
    shown = cli("party", "reader", "--home", home, as_json=True).json
    again = cli("party", "reader", "--home", home, as_json=True).json
    assert shown == again
    assert shown["name"] == "ann"
    key = load_identity(home).reading_key()
    assert key.unseal(seal_to(shown["encryption_key"], b"seen", info=b"x"), info=b"x", step="test") == b"seen"
    assert load_identity(home).signer.public not in shown["encryption_key"]


@pytest.mark.parametrize("what", ["party", "join"])
def test_a_folder_without_keys_is_refused(what: str, project: Project, tmp_path: Path, cli: Cli) -> None:
    plan = ("--plan", project.plan_path)
    words: tuple[str | Path, ...] = ("party", "join", "http://127.0.0.1:1", *plan, "--policy", project.policy_path)
    if what == "party":
        words = ("party", "disclose", *plan, "--record", "x:1", *MODEL, "--out", tmp_path / "out")
    shown = cli(*words, "--home", tmp_path / "nobody", as_json=True)
    assert shown.code == 10
    assert shown.error["code"].startswith("identity.")
    assert list(tmp_path.iterdir()) == []


def test_join_without_records_or_without_a_host_is_a_named_error(tmp_path: Path, records: Path, cli: Cli) -> None:
    own = create_project(tmp_path / "project", preset="digits", parties=["ann"], users=[])
    plan, home = ("--plan", own.plan_path), ("--home", own.parties["ann"].folder)
    words = ("party", "join", "http://127.0.0.1:1", *plan, *home, "--policy", own.policy_path)
    shown = cli(*words, as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "seal.nothing")
    assert cli("party", "seal", *home, *plan, "--data", records).code == 0
    shown = cli(*words, as_json=True)
    assert (shown.code, shown.error["code"]) == (18, "host.unreachable")


@pytest.mark.parametrize(("simulated", "named"), [(True, 1), (False, 0)])
def test_join_says_that_the_enclave_is_simulated(
    simulated: bool, named: int, project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Manifest:
        run = "ab" * 16

    Manifest.simulated = simulated  # type: ignore[attr-defined]
    given: dict[str, Any] = {}

    def joined(_host: object, plan: Plan, *_: object, **options: Any) -> type[Manifest]:
        given.update(options, plan=plan)
        options["on_step"]("approved")
        return Manifest

    monkeypatch.setattr(commands, "join_run", joined)
    home = project.parties["alder"].folder
    words = ("party", "join", "http://127.0.0.1:1", "--plan", project.plan_path, "--policy", project.policy_path)
    shown = cli(*words, "--home", home, "--timeout", "7", "--allow-second-manifest")
    assert shown.out.count("simulated enclave") == named
    assert "alder: approved" in shown.out
    assert given["plan"] == parse_plan(project.plan_path.read_bytes())
    assert (given["seconds"], given["allow_second_manifest"]) == (7, True)
    assert cli(*words, "--home", home, as_json=True).json == {
        "party": "alder",
        "run": "ab" * 16,
        "folder": str(home / "runs" / ("ab" * 16)),
        "simulated": simulated,
    }


def test_a_plan_without_a_policy_has_nothing_to_assess(project: Project, cli: Cli) -> None:
    home = project.parties["alder"].folder
    words = ("party", "assess", "http://127.0.0.1:1", "--home", home, "--plan", project.plan_path)
    shown = cli(*words, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "assess.no-policy")


@pytest.mark.parametrize("once", [True, False])
def test_assess_votes_until_training_is_over(
    once: bool, project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, given = [3, 0], list[dict[str, Any]]()

    def voted(*_: object, **options: Any) -> Voted | None:
        given.append(options)
        if not left:
            return None
        front, epoch = left.pop(0), len(given) - 1
        statement = AssessedModel(
            run="ab" * 16, plan=ZEROS, epoch=epoch, front=2, model=ZEROS, sample=8, figures={}, simulated=True
        )
        report = PartyReport(model=ZEROS, budget="quick", adversary_records=8, figures={}, misses={}, front=front)
        return Voted("ab" * 16, epoch, statement, report, front)

    monkeypatch.setattr(commands, "assess_run", voted)
    home = project.parties["alder"].folder
    words = ("party", "assess", "http://127.0.0.1:1", "--home", home, "--plan", project.plan_path, "--front", "2")
    shown = cli(*words, *(["--once"] if once else []))
    assert shown.out.count("simulated enclave") == 1
    assert "alder: before epoch 1 voted for 3 layers inside" in shown.out
    assert ("alder: before epoch 2 voted for no layers inside" in shown.out) is not once
    assert [options["least"] for options in given] == [2] * (1 if once else 3)
