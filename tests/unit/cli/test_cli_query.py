"""`caltrain predict`, `trace` and `verify`."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from caltrain.attestation.evidence import Binding, Evidence, EvidenceBundle
from caltrain.attestation.verify import Claims
from caltrain.auditor.bundle import TraceBundle, Verified, judge_bundle
from caltrain.boundary.sealed import Answers, Neighbour, TraceStatement
from caltrain.cli import files, query, verify
from caltrain.client.ask import Answered
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.enclave.run import State
from caltrain.errors import AccessError
from caltrain.models.network import build
from caltrain.models.weights import encode_state, model_digest
from caltrain.participant.disclose import disclose
from caltrain.participant.identity import create_identity
from caltrain.participant.receive import RunRecord
from caltrain.plan import ManifestParty, ManifestShard, Plan, Reader, RunManifest
from caltrain.project import Project
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure, Refusal
from caltrain.records.quarantine import Repair
from support.bundles import INPUT, bundle_of, disclosed, statement_of, traced_world, with_opinions
from support.commands import Cli
from support.folders import identity_of, policy_of
from support.repairs import FEW, entry, quarantine_of, repaired
from support.samples import SHARD, signer
from support.world import World

INPUTS = np.arange(3 * 64, dtype=np.uint8).reshape(3, 1, 8, 8)
RUN, DIGEST = "ab" * 16, "sha256:" + "0" * 64
EVIDENCE = EvidenceBundle(
    binding=Binding(
        purpose="query",
        encryption_key=HpkePrivateKey().public,
        signing_key=signer("enclave").public,
        plan=DIGEST,
        nonce="0" * 64,
    ),
    evidence=Evidence(kind="simulated", blob=""),
)
SHARD_ENTRY = ManifestShard(shard=SHARD, root=DIGEST, records=20)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    np.save(tmp_path / "inputs.npy", INPUTS)
    return tmp_path / "inputs.npy"


# --- predict with a joined model ------------------------------------------------------------------------------------


def joined(folder: Path, plan: Plan, *, simulated: bool = True) -> Path:
    """A party's run folder with a model of random weights."""
    torch.manual_seed(0)
    model = build(plan.model, input_shape=plan.data.shape)
    manifest = RunManifest(
        run=RUN,
        plan=plan.digest(),
        evidence_kind="simulated",
        simulated=simulated,
        measurement=plan.enclave.measurement,
        enclave_encryption_key=HpkePrivateKey().public,
        enclave_signing_key=signer("enclave").public,
        parties=(ManifestParty(name="alder", key_id=DIGEST, shards=(SHARD_ENTRY,)),),
    )
    state = model.state_dict()
    record = RunRecord(
        manifest=manifest,
        model=model_digest(plan.model, state),
        linked=signer("enclave").sign("linked-model", manifest),
        head=DIGEST,
    )
    folder.mkdir()
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    (folder / "run.json").write_bytes(msgspec.json.encode(record))
    (folder / "model.safetensors").write_bytes(encode_state(state))
    return folder


@pytest.mark.parametrize(("simulated", "named"), [(True, 1), (False, 0)])
def test_predict_with_a_joined_model(
    simulated: bool, named: int, project: Project, inputs: Path, tmp_path: Path, cli: Cli
) -> None:
    folder = joined(tmp_path / "run", project.plan, simulated=simulated)
    shown = cli("predict", folder, inputs, as_json=True)
    assert shown.code == 0
    found = shown.json
    assert set(found) == {"predicted", "probability", "simulated"}
    assert len(found["predicted"]) == len(found["probability"]) == 3
    assert set(found["predicted"]) <= set(project.plan.data.classes)
    assert all(0.1 <= p <= 1 for p in found["probability"])
    assert found["simulated"] is simulated
    assert cli("predict", folder, inputs).out.count("simulated enclave") == named


def test_one_input_needs_no_batch(project: Project, inputs: Path, tmp_path: Path, cli: Cli) -> None:
    folder, one = joined(tmp_path / "run", project.plan), tmp_path / "one.npy"
    np.save(one, INPUTS[1])
    both = [cli("predict", folder, path, as_json=True).json["predicted"] for path in (inputs, one)]
    assert both[1] == both[0][1:2]


def test_a_folder_without_a_model_is_refused(inputs: Path, tmp_path: Path, cli: Cli) -> None:
    shown = cli("predict", tmp_path, inputs, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "model.unreadable")


# --- inputs ---------------------------------------------------------------------------------------------------------


def npy(header: bytes, data: bytes = b"") -> bytes:
    """A .npy file with any header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def header(shape: str, descr: str = "'|u1'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()


def pickled(path: Path) -> None:
    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=INPUTS)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"")


class Bomb:
    """Whoever unpickles this is heard."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("exploded"),))


BAD_FILES: dict[str, bytes | Callable[[Path], None]] = {
    "absent": lambda _: None,
    "empty": b"",
    "pickled objects": pickled,
    "an archive": archive,
    "a zip": zipped,
    "no array": b"hello",
    "cut short": npy(header("(3, 1, 8, 8)"), b"\0" * 191),
    "announces a terabyte": npy(header("(1000000000000,)"), b"\0" * 64),
    "announces more than there are numbers for": npy(header("(" + "9" * 40 + ",)")),
    "a negative size": npy(header("(-3, 8, 8)"), b"\0" * 64),
    "a header of nonsense": npy(b"{'descr':"),
    "a header that nests": npy(b"(" * 3000),
    "an unhashable key": npy(b"{[]: 1}"),
    "a header of 60 kB": npy(header("(3, 1, 8, 8)") + b" " * 60_000, b"\0" * 192),
    "Python 2 numbers": npy(header("(3L, 1L, 8L, 8L)"), b"\0" * 192),
    "a single number": npy(header("()"), b"\0"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_no_plain_array_is_refused(
    what: str, project: Project, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, path, content = joined(tmp_path / "run", project.plan), tmp_path / "bad.npy", BAD_FILES[what]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    shown = cli("predict", folder, path, as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "input.unreadable")
    assert "u8" in shown.error["fix"]
    assert cli("trace", path, *asking(project), as_json=True).error["code"] == "input.unreadable"
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_would_explode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled(tmp_path / "bad.npy")
    np.load(tmp_path / "bad.npy", allow_pickle=True)
    assert (tmp_path / "exploded").exists()


def test_a_file_over_the_limit_is_not_read(
    project: Project, inputs: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_INPUT_BYTES", inputs.stat().st_size - 1)
    shown = cli("predict", joined(tmp_path / "run", project.plan), inputs, as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "input.unreadable")


@pytest.mark.parametrize("array", [INPUTS[:, :, :7], INPUTS.astype(np.float32), INPUTS[0, 0], INPUTS[:, 0, 0, 0]])
def test_inputs_of_another_shape_or_type_are_refused(
    array: np.ndarray[Any, Any], project: Project, tmp_path: Path, cli: Cli
) -> None:
    np.save(tmp_path / "inputs.npy", array)
    folder = joined(tmp_path / "run", project.plan)
    shown = cli("predict", folder, tmp_path / "inputs.npy", as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "predict.shape")


# --- questions to an enclave ----------------------------------------------------------------------------------------

EVIDENCE_OPTIONS = ("--url", "--home", "--plan", "--policy")


def asking(project: Project, *, leave_out: str = "") -> list[str | Path]:
    """The options that every question needs, without one of them."""
    user = project.users["analyst"].folder
    values: tuple[str | Path, ...] = ("http://127.0.0.1:1", user, project.plan_path, project.policy_path)
    words: list[str | Path] = []
    for option, value in zip(EVIDENCE_OPTIONS, values, strict=True):
        words += [option, value] if option != leave_out else []
    return words


def commands(project: Project, inputs: Path, *, leave_out: str = "") -> dict[str, list[str | Path]]:
    """Both questions that a user can put to an enclave, without one of the options."""
    words = asking(project, leave_out=leave_out)
    without_url = words[2:] if leave_out != "--url" else words
    return {"predict": ["predict", "http://127.0.0.1:1", inputs, *without_url], "trace": ["trace", inputs, *words]}


@pytest.mark.parametrize(
    ("command", "leave_out"),
    [("trace", option) for option in EVIDENCE_OPTIONS if option != "--url"]
    + [("predict", option) for option in ("--home", "--plan", "--policy")],
)
def test_a_question_needs_keys_plan_and_policy(
    command: str, leave_out: str, project: Project, inputs: Path, cli: Cli
) -> None:
    shown = cli(*commands(project, inputs, leave_out=leave_out)[command], as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "option.missing")


def test_a_question_without_a_host_is_a_named_error(project: Project, inputs: Path, cli: Cli) -> None:
    for words in commands(project, inputs).values():
        shown = cli(*words, as_json=True)
        assert (shown.code, shown.error["code"]) == (18, "host.unreachable")


def test_inputs_from_several_files_are_asked_about_in_their_order(
    project: Project, inputs: Path, tmp_path: Path, cli: Cli
) -> None:
    folder, one = joined(tmp_path / "run", project.plan), tmp_path / "one.npy"
    np.save(one, INPUTS[1])
    found = cli("predict", folder, one, inputs, as_json=True).json["predicted"]
    assert found[1:] == cli("predict", folder, inputs, as_json=True).json["predicted"]
    assert found[0] == found[2]


def test_pictures_are_inputs(project: Project, inputs: Path, tmp_path: Path, cli: Cli) -> None:
    folder = joined(tmp_path / "run", project.plan)
    for number, picture in enumerate(INPUTS):
        Image.fromarray(picture[0]).save(tmp_path / f"{number}.png")
    by_picture = cli("predict", folder, *(tmp_path / f"{number}.png" for number in range(3)), as_json=True)
    assert by_picture.json == cli("predict", folder, inputs, as_json=True).json


def test_files_that_do_not_go_together_are_refused(project: Project, inputs: Path, tmp_path: Path, cli: Cli) -> None:
    folder, other = joined(tmp_path / "run", project.plan), tmp_path / "other.npy"
    np.save(other, INPUTS.astype(np.float32))
    shown = cli("predict", folder, inputs, other, as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "input.mixed")


def answered(kind: str, count: int, *, simulated: bool = True) -> Answered:
    """What a verified answer looks like."""
    statements = tuple(
        TraceStatement(
            run=RUN,
            model=DIGEST,
            user="analyst",
            nonce="0" * 64,
            index=index,
            input_commitment=DIGEST,
            head=DIGEST,
            predicted=7,
            any_label=False,
            contributors=(),
            neighbours=tuple(
                Neighbour(
                    rank=rank,
                    record=RecordRef(party, SHARD, index),
                    label=7,
                    distance=0.25,
                    commitment=DIGEST,
                    unusual=0.97,
                )
                for rank, party in ((1, "birch"), (2, "alder"), (3, "birch"))
            ),
            basis="held-out",
            references=100,
            audit_rate=0.0,
            resumes=0,
            simulated=simulated,
        )
        for index in range(count if kind == "trace" else 0)
    )
    scores = tuple((0.0,) * 7 + (0.9, 0.1, 0.0) for _ in range(count))
    return Answered(
        claims=Claims(kind="simulated", simulated=simulated, measurement="", report_data=b""),
        evidence=EVIDENCE,
        answers=Answers(model=DIGEST, predicted=(7,) * count, scores=scores, budget_left=5),
        traces=statements,
        envelopes=tuple(signer("enclave").sign("trace", statement) for statement in statements),
    )


@pytest.fixture
def enclave(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers every question; keeps what was asked. `simulated` can be changed."""
    asked: dict[str, Any] = {"simulated": True}

    def ask(_host: object, plan: Plan, _policy: object, **options: Any) -> Answered:
        asked.update(options, plan=plan)
        return answered(options["kind"], len(options["inputs"]), simulated=asked["simulated"])

    monkeypatch.setattr(query, "ask", ask)
    return asked


@pytest.mark.parametrize(("simulated", "named"), [(True, 1), (False, 0)])
def test_predict_asks_the_enclave(
    simulated: bool, named: int, project: Project, inputs: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    enclave["simulated"] = simulated
    shown = cli(*commands(project, inputs)["predict"], as_json=True)
    assert shown.json == {"predicted": ["7"] * 3, "probability": [0.9] * 3, "simulated": simulated}
    assert (enclave["kind"], enclave["user"], enclave["plan"]) == ("predict", "analyst", project.plan)
    assert (enclave["inputs"] == INPUTS).all()
    assert cli(*commands(project, inputs)["predict"]).out.count("simulated enclave") == named


@pytest.mark.parametrize(("simulated", "named"), [(True, 1), (False, 0)])
def test_trace_names_the_records_behind_a_prediction(
    simulated: bool, named: int, project: Project, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    enclave["simulated"] = simulated
    np.save(tmp_path / "inputs.npy", np.concatenate([INPUTS, INPUTS]))
    found = cli("trace", tmp_path / "inputs.npy", *asking(project), as_json=True).json
    assert (found["traced"], found["budget_left"], found["model"], found["method"]) == (6, 5, DIGEST, "fingerprint")
    assert found["simulated"] is simulated
    assert [trace["neighbours"][0]["record"]["leaf"] for trace in found["traces"]] == [*range(6)]
    text = cli("trace", tmp_path / "inputs.npy", *asking(project)).out
    assert text.count("simulated enclave") == named
    assert "inputs.npy:2: predicted 7; nearest: birch 2, alder 1\n" in text
    assert f"1. birch {SHARD}:2 distance 0.25 unusual 0.97\n" in text
    assert text.count("unusual: share of 100 held-out queries that are at most as far") == 3
    assert text.count("center not audited") == 1
    assert f"{SHARD}:3" not in text
    assert "the first 3 of 6; --out keeps all" in text
    assert query.OPINION not in text


def test_traces_are_kept_before_anything_else_can_fail(
    project: Project, inputs: Path, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    shown = cli("trace", inputs, *asking(project), "--out", tmp_path / "out", as_json=True)
    assert (shown.code, shown.error["code"]) == (18, "host.unreachable")  # the bundles' other parts are the host's
    kept = json.loads((tmp_path / "out" / "traces.json").read_bytes())
    assert [trace["index"] for trace in kept["traces"]] == [0, 1, 2]
    assert kept["inputs"] == [f"{inputs}:{row}" for row in range(3)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["traces.json"]
    assert enclave["kind"] == "trace"


# --- many inputs, in parts -------------------------------------------------------------------------------------------


def folder_of_inputs(folder: Path) -> Path:
    """Two pictures, two arrays and something else, by name."""
    folder.mkdir()
    np.save(folder / "b.npy", INPUTS[:2])
    np.save(folder / "d.npy", INPUTS[2])
    for name in ("a.png", "c.PNG"):
        Image.fromarray(INPUTS[0, 0]).save(folder / name, format="png")
    (folder / "notes.txt").write_text("not an input")
    return folder


def test_a_folder_is_asked_about_file_by_file_and_answers_keep_their_file(
    project: Project, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    folder = folder_of_inputs(tmp_path / "inputs")
    found = cli("trace", folder, *asking(project), as_json=True).json
    names = ["a.png", "b.npy:0", "b.npy:1", "c.PNG", "d.npy"]
    assert found["inputs"] == [str(folder / name) for name in names]
    assert (enclave["inputs"] == INPUTS[[0, 0, 1, 0, 2]]).all()
    again = cli("trace", folder / "d.npy", folder / "b.npy", *asking(project), as_json=True).json
    assert again["inputs"] == [str(folder / name) for name in ("d.npy", "b.npy:0", "b.npy:1")]


def test_a_folder_without_inputs_is_named(project: Project, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    shown = cli("trace", tmp_path, *asking(project), as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "input.none")


def test_inputs_of_different_kinds_are_refused_before_anything_is_asked(
    project: Project, tmp_path: Path, enclave: dict[str, Any], cli: Cli
) -> None:
    folder = folder_of_inputs(tmp_path / "inputs")
    np.save(folder / "e.npy", INPUTS.astype(np.float32))
    shown = cli("trace", folder, *asking(project), as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "input.mixed")
    assert "kind" not in enclave


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two inputs a question. How many each question held; what is below 0 in it fails instead."""
    sizes: list[int] = []
    monkeypatch.setattr(query, "most_at_once", lambda _: 2)
    return sizes


def in_parts(monkeypatch: pytest.MonkeyPatch, sizes: list[int], *, fails_at: int = 99) -> None:
    def ask(_host: object, _plan: Plan, _policy: object, **options: Any) -> Answered:
        if len(sizes) == fails_at:
            raise AccessError("user.too-fast", "too fast", step="query", fix="Ask again in 9 seconds.")
        sizes.append(len(options["inputs"]))
        return answered("trace", len(options["inputs"]))

    monkeypatch.setattr(query, "ask", ask)


def test_more_than_one_question_holds_are_asked_in_parts(
    project: Project, inputs: Path, tmp_path: Path, parts: list[int], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch, parts)
    np.save(tmp_path / "five.npy", np.concatenate([INPUTS, INPUTS[:2]]))
    found = cli("trace", tmp_path / "five.npy", *asking(project), as_json=True).json
    assert parts == [2, 2, 1]
    assert (found["traced"], len(found["traces"]), len(found["inputs"])) == (5, 5, 5)
    assert [trace["index"] for trace in found["traces"]] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_answered_before_a_part_failed_is_not_lost(
    kept: bool,
    project: Project,
    tmp_path: Path,
    parts: list[int],
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_parts(monkeypatch, parts, fails_at=2)
    np.save(tmp_path / "five.npy", np.concatenate([INPUTS, INPUTS[:2]]))
    options = ("--out", tmp_path / "out") if kept else ()
    shown = cli("trace", tmp_path / "five.npy", *asking(project), *options)
    assert shown.code == 16
    assert "Ask again in 9 seconds." in shown.err
    assert shown.out.count("predicted 7") == (3 if kept else 4)
    if kept:
        left = json.loads((tmp_path / "out" / "traces.json").read_bytes())
        assert left["inputs"] == [f"{tmp_path / 'five.npy'}:{row}" for row in range(4)]
        assert len(left["traces"]) == 4


def test_filters_are_asked_for(project: Project, inputs: Path, enclave: dict[str, Any], cli: Cli) -> None:
    cli("trace", inputs, *asking(project), as_json=True)
    assert (enclave["any_label"], list(enclave["contributors"])) == (False, [])
    words = ("--any-label", "--contributor", "alder", "--contributor", "birch")
    cli("trace", inputs, *asking(project), *words, as_json=True)
    assert (enclave["any_label"], list(enclave["contributors"])) == (True, ["alder", "birch"])


def test_a_trace_without_neighbours_and_one_of_any_class_say_so(project: Project, capsys: Any) -> None:
    (full,) = answered("trace", 1).traces
    for n in ("any", "none"):
        changes: dict[str, Any] = {"any_label": True} if n == "any" else {"neighbours": ()}
        statement = msgspec.structs.replace(full, **changes)
        traced = query._Traced("one.npy", statement, answered("trace", 1).envelopes[0], EVIDENCE)
        query._say_traces([traced], project.plan, all_of_them=False)
    out = capsys.readouterr().out
    assert f"birch {SHARD}:0 label 7 distance 0.25" in out
    assert "one.npy: predicted 7; nearest: no record counts" in out


def test_a_second_opinion_is_asked_for_by_name_and_says_what_it_is_not(
    project: Project, inputs: Path, enclave: dict[str, Any], cli: Cli, capsys: Any
) -> None:
    found = cli("trace", inputs, *asking(project), "--method", "trak", as_json=True).json
    assert (enclave["method"], found["method"]) == ("trak", "trak")
    assert cli("trace", inputs, *asking(project), "--method", "magic").code == 2
    (full,) = answered("trace", 1).traces
    alone = tuple(msgspec.structs.replace(n, distance=None, unusual=None) for n in full.neighbours)
    statement = msgspec.structs.replace(full, method="gradient", neighbours=alone)
    traced = query._Traced("one.npy", statement, answered("trace", 1).envelopes[0], EVIDENCE)
    query._say_traces([traced], project.plan, all_of_them=False)
    out = capsys.readouterr().out
    assert "one.npy: predicted 7; first by gradient: birch 2, alder 1\n" in out
    assert f"1. birch {SHARD}:0\n" in out
    assert out.count("a second opinion is no evidence of guilt") == 1


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced() -> tuple[World, TraceBundle]:
    return traced_world()


@pytest.fixture
def bundle(traced: tuple[World, TraceBundle], tmp_path: Path) -> Path:
    (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(traced[1]))
    return tmp_path / "bundle.json"


def test_verify_says_what_a_bundle_proves(traced: tuple[World, TraceBundle], bundle: Path, cli: Cli) -> None:
    world, found = traced
    trace, head = statement_of(found), world.chain()[-1].digest()
    shown = cli("verify", bundle, "--plan-digest", world.plan.digest(), "--head", head, as_json=True)
    assert shown.code == 0
    assert shown.json == {
        "verified": True,
        "run": world.run.vault.run,
        "model": world.run.model_digest,
        "method": "fingerprint",
        "predicted": world.plan.data.classes[trace.predicted],
        "input": None,
        "outcomes": {f"{r.party}/{r.shard}/{r.leaf}": "undisclosed" for r in (n.record for n in trace.neighbours)},
        "neighbours": [f"{n.rank}: {n.record.party}" for n in trace.neighbours],
        "disclosed": 0,
        "undisclosed": len(trace.neighbours),
        "events": len(found.chain),
        "head": head,
        "simulated": True,
        "evidence": "not appraised",
        "center_audited": False,
        "front_public": False,
        "repair": None,
        "left_out": [],
    }
    text = cli("verify", bundle, "--plan-digest", world.plan.digest()).out
    assert query.OPINION not in text
    assert text.count("simulated enclave") == 1
    assert text.count("center not audited") == 1
    assert "public weights" not in text


def test_verify_takes_a_second_opinion_for_what_it_is(tmp_path: Path, cli: Cli) -> None:
    world, found = traced_world(change=with_opinions, method="trak")
    named = [neighbour.record for neighbour in statement_of(found).neighbours]
    (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(found))
    (tmp_path / "answer.json").write_bytes(msgspec.json.encode([disclosed(world, named[0])]))
    words = ("verify", tmp_path / "bundle.json", "--plan-digest", world.plan.digest())
    shown = cli(*words, "--disclosures", tmp_path / "answer.json", as_json=True).json
    assert (shown["method"], shown["disclosed"], shown["undisclosed"]) == ("trak", 1, len(named) - 1)
    assert cli(*words).out.count("a second opinion is no evidence of guilt") == 1


def test_verify_says_that_the_front_net_is_no_secret(
    traced: tuple[World, TraceBundle], bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def public(found: TraceBundle, **anchors: Any) -> Verified:
        return msgspec.structs.replace(judge_bundle(found, **anchors), front_public=True)

    monkeypatch.setattr("caltrain.cli.verify.judge_bundle", public)
    words = ("verify", bundle, "--plan-digest", traced[0].plan.digest())
    assert cli(*words).out.count("training began from public weights: the FrontNet is no secret") == 1
    assert cli(*words, as_json=True).json["front_public"] is True


@cache
def mended() -> tuple[World, TraceBundle]:
    """A run that left out some records, and a bundle of it."""
    world = repaired(epochs=1).run_to(State.LINKED)
    return world, bundle_of(world)


def test_verify_shows_that_a_record_was_left_out(tmp_path: Path, cli: Cli) -> None:
    world, found = mended()
    (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(found))
    (tmp_path / "list.json").write_bytes(quarantine_of(world).encode())
    words = ("verify", tmp_path / "bundle.json", "--plan-digest", world.plan.digest())
    repair = world.plan.repair
    assert repair
    assert msgspec.convert(cli(*words, as_json=True).json["repair"], Repair) == repair
    assert repair.in_words() in cli(*words).out
    out, used = (entry(world, place).commitment for place in (FEW[0], ("alpha", 0, 0)))
    given = (*words, "--quarantine", tmp_path / "list.json")
    assert cli(*given, as_json=True).json["left_out"] == []
    assert cli(*given, "--left-out", out, as_json=True).json["left_out"] == [out]
    assert f"not used: the record with the commitment {out}" in cli(*given, "--left-out", out).out
    shown = cli(*given, "--left-out", out, "--left-out", used, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "quarantine.not-listed")
    shown = cli(*words, "--left-out", out, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "option.missing")
    (tmp_path / "list.json").write_bytes(quarantine_of(world, FEW[:3]).encode())
    shown = cli(*given, as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "quarantine.other-list")


def test_verify_counts_what_was_disclosed(
    traced: tuple[World, TraceBundle], bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    world, found = traced
    words: list[str | Path] = []
    for number, neighbour in enumerate(statement_of(found).neighbours):
        path = tmp_path / f"{number}.json"
        path.write_bytes(msgspec.json.encode([disclosed(world, neighbour.record)]))
        words += ["--disclosures", path]
    shown = cli("verify", bundle, "--plan-digest", world.plan.digest(), *words[:4], as_json=True).json
    assert (shown["disclosed"], shown["undisclosed"]) == (2, len(statement_of(found).neighbours) - 2)
    shown = cli("verify", bundle, "--plan-digest", world.plan.digest(), *words, as_json=True).json
    assert shown["undisclosed"] == 0


def test_verify_refuses_a_substituted_record(
    traced: tuple[World, TraceBundle], bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    world, found = traced
    reference, path = statement_of(found).neighbours[0].record, tmp_path / "disclosures.json"
    honest = msgspec.json.decode(base64.b64decode(disclosed(world, reference).payload), type=Disclosure)
    forged = bytearray(base64.b64decode(honest.record))
    forged[-1] ^= 1
    path.write_bytes(msgspec.json.encode([disclosed(world, reference, record=bytes(forged))]))
    shown = cli("verify", bundle, "--plan-digest", world.plan.digest(), "--disclosures", path, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "disclosure.substituted")


def test_verify_appraises_the_evidence_with_a_policy(
    traced: tuple[World, TraceBundle], bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    world = traced[0]
    words = ("verify", bundle, "--plan-digest", world.plan.digest())
    assert "was not appraised" in cli(*words).out
    accepted, other = policy_of(world), SigningKey().public
    for roots, code in ((accepted.simulated_roots, 0), ((other,), 13)):
        policy = msgspec.structs.replace(accepted, simulated_roots=roots)
        (tmp_path / "policy.toml").write_bytes(msgspec.toml.encode(policy))
        shown = cli(*words, "--policy", tmp_path / "policy.toml", as_json=True)
        assert shown.code == code
        if not code:
            assert shown.json["evidence"] == "accepted"
            assert "appraised" not in cli(*words, "--policy", tmp_path / "policy.toml").out


def test_verify_checks_the_input_that_a_user_shows(
    traced: tuple[World, TraceBundle], bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    words = ("verify", bundle, "--plan-digest", traced[0].plan.digest(), "--input", tmp_path / "shown.npy")
    np.save(tmp_path / "shown.npy", np.concatenate([INPUT[:, :, ::-1], INPUT]))
    assert cli(*words, as_json=True).json["input"] == 1
    assert f"the trace is of the input {tmp_path / 'shown.npy'}:1" in cli(*words).out
    np.save(tmp_path / "shown.npy", INPUT[:, :, ::-1])
    shown = cli(*words, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "bundle.other-input")


def test_verify_says_for_each_record_what_was_decided_though_one_is_false(
    traced: tuple[World, TraceBundle], bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    world, found = traced
    named = [n.record for n in statement_of(found).neighbours]
    other = world.parties[named[0].party].shards[0].records[0][::-1]
    refusal = Refusal(record_ref=named[1], model=world.run.model_digest)
    answers = [
        disclosed(world, named[0], record=other),
        world.parties[named[1].party].signer.sign("refusal", refusal),
        disclosed(world, named[2]),
    ]
    (tmp_path / "true.json").write_bytes(msgspec.json.encode(answers[1:]))
    sound = ("verify", bundle, "--plan-digest", world.plan.digest(), "--disclosures", tmp_path / "true.json")
    counted = cli(*sound, as_json=True).json
    assert (counted["disclosed"], counted["undisclosed"]) == (1, len(named) - 2)  # a refusal is an answer
    (tmp_path / "answers.json").write_bytes(msgspec.json.encode(answers))
    words = ("verify", bundle, "--plan-digest", world.plan.digest(), "--disclosures", tmp_path / "answers.json")
    shown = cli(*words)
    assert shown.code == 17
    for rank, outcome in enumerate(("substituted", "refused", "disclosed", "undisclosed"), 1):
        assert f"{rank}. {verify._place(named[rank - 1])}: {outcome}\n" in shown.out


def test_verify_opens_what_is_disclosed_to_its_reader(tmp_path: Path, cli: Cli) -> None:
    reader = create_identity(tmp_path / "una", "una")
    create_identity(tmp_path / "eve", "eve")
    entry = Reader(name="una", encryption_key=reader.reading_key().public)
    world, found = traced_world(
        change=lambda plan: msgspec.structs.replace(
            plan, trace=msgspec.structs.replace(plan.trace, disclose_to=(entry,))
        )
    )
    (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(found))
    named = statement_of(found).neighbours[0].record
    owner = identity_of(world.parties[named.party], tmp_path / "owner")
    envelope, _ = disclose(owner, world.plan, named, model=world.run.model_digest)
    (tmp_path / "answers.json").write_bytes(msgspec.json.encode([envelope]))
    files = (tmp_path / "bundle.json", "--disclosures", tmp_path / "answers.json")
    words = ("verify", *files, "--plan-digest", world.plan.digest())
    place = verify._place(named)
    assert cli(*words, as_json=True).json["outcomes"][place] == "sealed"
    assert cli(*words, "--home", tmp_path / "una", as_json=True).json["outcomes"][place] == "disclosed"
    shown = cli(*words, "--home", tmp_path / "eve", as_json=True)
    assert (shown.code, shown.error["code"]) == (16, "disclosure.not-a-reader")


def test_verify_refuses_another_plan_and_another_head(
    traced: tuple[World, TraceBundle], bundle: Path, cli: Cli
) -> None:
    shown = cli("verify", bundle, "--plan-digest", DIGEST, as_json=True)
    assert (shown.code, shown.error["code"]) == (17, "bundle.other-plan")
    words = ("verify", bundle, "--plan-digest", traced[0].plan.digest(), "--head", DIGEST)
    assert cli(*words, as_json=True).code == 17


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'[{"payload":1}]', b"[" * 100_000, b"\xff"])
def test_files_that_are_no_bundle_and_no_disclosures_are_refused(
    content: bytes, traced: tuple[World, TraceBundle], bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)
    shown = cli("verify", bad, "--plan-digest", DIGEST, as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "bundle.malformed")
    if content != b"[]":
        words = ("verify", bundle, "--plan-digest", traced[0].plan.digest(), "--disclosures", bad)
        shown = cli(*words, as_json=True)
        assert (shown.code, shown.error["code"]) == (12, "disclosure.unreadable")
