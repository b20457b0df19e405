"""`caltrain remedy plan`: from evidence to a list and a plan; `remedy compare`: what the repair changed."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.auditor.bundle import TraceBundle
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import TraceStatement
from caltrain.cli.files import read_plan
from caltrain.crypto.digests import to_raw
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.enclave.run import State
from caltrain.exposure.figures import Estimate
from caltrain.exposure.open_model import save_subject
from caltrain.exposure.subject import Subject
from caltrain.participant.receive import receive, run_folder
from caltrain.plan import Plan
from caltrain.provenance.verdict import SuspectRecords, VerdictStatement
from caltrain.records.quarantine import Quarantine, Quarantined, decode_quarantine, open_quarantine
from support.bundles import bundle_of
from support.commands import Cli, Outcome
from support.disk import tree
from support.exposed import subject
from support.folders import identity_of
from support.repairs import FEW, Place, entry, leave_out, quarantine_of, repaired
from support.scripted_host import ScriptedHost
from support.verdicts import restated, verdict_bundle
from support.world import World, pictures
from support.worlds import finished_world


@cache
def mended() -> World:
    """A run that is a repair itself."""
    return repaired(epochs=1).run_to(State.LINKED)


def received(world: World, folder: Path) -> Path:
    """Alpha's folder of the run."""
    alpha = identity_of(world.parties["alpha"], folder)
    with ScriptedHost(world).client() as client:
        receive(client, world.plan, alpha, world.manifest)
    return run_folder(alpha, world.manifest.run)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run as a party keeps it."""
    return received(finished_world(), tmp_path / "alpha")


def entries(world: World, places: Iterable[Place] = FEW) -> list[Quarantined]:
    """Records of the world, with their own commitments."""
    return [entry(world, place) for place in places]


def written(path: Path, value: object) -> Path:
    """A file of evidence."""
    path.write_bytes(msgspec.json.encode(value))
    return path


def planned(folder: Path, shown: Outcome) -> tuple[Plan, Quarantine]:
    """What the command wrote, which belongs together."""
    assert shown.code == 0, shown.out + shown.err
    plan, raw = read_plan(folder / "plan.toml"), (folder / "quarantine.json").read_bytes()
    assert plan.repair
    assert shown.json["digest"] == plan.digest()
    return plan, open_quarantine(raw, plan.repair)


def traced(world: World, seed: int) -> tuple[Envelope, TraceStatement]:
    """A signed trace of the world."""
    asked = world.question("trace", pictures(1, seed=seed))
    (envelope,) = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"]).traces
    key = world.run.vault.signing.public
    return envelope, open_envelope(envelope, "trace", key, TraceStatement, step="test")


def verdict_on(world: World, records: list[Quarantined]) -> Envelope:
    """A verdict of the world, as its enclave could have signed it about these records."""
    bundle = verdict_bundle(world)
    suspects = tuple(
        SuspectRecords(
            party=own.record.party,
            shard=own.record.shard,
            leaves=(own.record.leaf,),
            commitments=base64.b64encode(to_raw(own.commitment)).decode(),
        )
        for own in records
    )
    return restated(world, bundle, suspects=suspects).trace


# --- the plan of a repair ---------------------------------------------------------------------------------------------


def test_a_list_of_records_makes_a_plan_that_leaves_them_out(run: Path, tmp_path: Path, cli: Cli) -> None:
    world, out = finished_world(), tmp_path / "out"
    records = written(tmp_path / "records.json", entries(world))
    shown = cli("remedy", "plan", run, records, "--out", out, as_json=True)
    plan, quarantine = planned(out, shown)
    assert quarantine.entries == tuple(sorted(entries(world)))
    assert (quarantine.run, quarantine.model) == (world.manifest.run, world.run.model_digest)
    assert msgspec.structs.replace(plan, repair=msgspec.UNSET) == world.plan
    assert shown.json["by_party"] == {"alpha": 1, "beta": 2, "gamma": 1}
    assert (shown.json["records"], shown.json["without"]) == (4, [])
    text = cli("remedy", "plan", run, records, "--out", out).out
    assert "the same evidence gives the same digest" in text
    assert "--quarantine" in text


def test_the_repaired_run_is_an_ordinary_run_of_that_plan(run: Path, tmp_path: Path, cli: Cli) -> None:
    records = written(tmp_path / "records.json", entries(finished_world()))
    cli("remedy", "plan", run, records, "--out", tmp_path / "out", as_json=True)
    world = World()  # other keys and salts: the list of another company does not fit
    again = entries(world)
    raw = Quarantine.of(again, run="0" * 32, model=finished_world().run.model_digest)
    leave_out(world, raw)
    world.run_to(State.LINKED)
    world = World()
    leave_out(world, decode_quarantine((tmp_path / "out" / "quarantine.json").read_bytes()))
    world.run_to(State.AGREED)
    world.refused(world.ingest(), "repair.unknown-record")


def test_all_kinds_of_evidence_name_the_same_records_in_any_order(run: Path, tmp_path: Path, cli: Cli) -> None:
    world = finished_world()
    envelope, trace = traced(world, 21)
    other, more = traced(world, 22)
    bundle = bundle_of(world)
    of_bundle = msgspec.structs.replace(bundle, trace=envelope)
    named = [Quarantined(n.record, n.commitment) for n in trace.neighbours]
    both = sorted({*named, *(Quarantined(n.record, n.commitment) for n in more.neighbours)})
    listed = Quarantine.of(both, run=world.manifest.run, model=world.run.model_digest)
    kinds: dict[str, list[object]] = {
        "records": [both[::-1]],
        "two signed traces": [envelope, other],
        "several in one": [[envelope, other]],
        "a bundle and a trace": [of_bundle, other],
        "a list": [listed],
        "all": [named, [envelope], of_bundle, other, listed],
    }
    kinds["a verdict"] = [verdict_on(world, both)]
    made = set()
    for what, values in kinds.items():
        files = [written(tmp_path / f"{what} {number}", value) for number, value in enumerate(values)]
        shown = cli("remedy", "plan", run, *files, "--out", tmp_path / what, as_json=True)
        assert planned(tmp_path / what, shown)[1].entries == tuple(both), what
        made.add((shown.json["digest"], (tmp_path / what / "quarantine.json").read_bytes()))
    assert len(made) == 1


def test_a_party_is_left_out_whole(run: Path, tmp_path: Path, cli: Cli) -> None:
    world, out = finished_world(), tmp_path / "out"
    records = written(tmp_path / "records.json", entries(world))
    words = ("remedy", "plan", run, records, "--without", "beta", "--out", out)
    plan, quarantine = planned(out, cli(*words, as_json=True))
    assert [party.name for party in plan.parties] == ["alpha", "gamma"]
    assert {found.record.party for found in quarantine.entries} == {"alpha", "gamma"}
    assert plan.repair
    (former,) = plan.repair.without
    assert (former.name, former.public_key) == ("beta", world.parties["beta"].signer.public)
    alone = ("remedy", "plan", run, "--without", "beta", "--without", "gamma", "--out", out)
    plan, quarantine = planned(out, cli(*alone, as_json=True))
    assert ([party.name for party in plan.parties], quarantine.entries) == (["alpha"], ())


def test_the_quorum_of_a_restart_does_not_outgrow_the_parties(tmp_path: Path, cli: Cli) -> None:
    def needs_all(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, resume_quorum=3)

    run = received(World(epochs=1, change=needs_all).run_to(State.LINKED), tmp_path / "alpha")
    words = ("remedy", "plan", run, "--without", "beta", "--out", tmp_path / "out")
    assert planned(tmp_path / "out", cli(*words, as_json=True))[0].resume_quorum == 2


def test_what_an_earlier_repair_left_out_stays_out(tmp_path: Path, cli: Cli) -> None:
    world = mended()
    run, out = received(world, tmp_path / "alpha"), tmp_path / "out"
    more = written(tmp_path / "more.json", entries(world, [("alpha", 0, 0)]))
    earlier = tmp_path / "earlier.json"
    earlier.write_bytes(quarantine_of(world).encode())
    given = ("--out", out, "--earlier", earlier)
    _, quarantine = planned(out, cli("remedy", "plan", run, more, *given, as_json=True))
    assert quarantine.entries == tuple(sorted(entries(world, [*FEW, ("alpha", 0, 0)])))
    plan, quarantine = planned(out, cli("remedy", "plan", run, "--without", "beta", *given, as_json=True))
    assert {found.record.party for found in quarantine.entries} == {"alpha", "gamma"}
    again = received_after(world, plan, quarantine, tmp_path / "again")
    earlier.write_bytes(quarantine.encode())
    plan, _ = planned(out, cli("remedy", "plan", again, "--without", "gamma", *given, as_json=True))
    assert plan.repair
    assert [party.name for party in plan.repair.without] == ["beta", "gamma"]


def received_after(world: World, plan: Plan, quarantine: Quarantine, folder: Path) -> Path:
    """The next repair's run folder, as if it had been run."""
    run = received(world, folder)
    record = msgspec.json.decode((run / "run.json").read_bytes())
    record["manifest"]["plan"] = plan.digest()
    record["manifest"]["parties"] = [p for p in record["manifest"]["parties"] if p["name"] != "beta"]
    written(run / "run.json", record)
    written(run / "plan.json", plan)
    return run


VERDICT = VerdictStatement(
    run="0" * 32,
    model="sha256:" + "0" * 64,
    method="test",
    user="una",
    nonce="0" * 64,
    inputs=1,
    input_commitment="sha256:" + "0" * 64,
    head="sha256:" + "0" * 64,
    predicted=(0,),
    outcome="cannot-tell",
    blamed=(),
    kinds=("hard",),
    found=0,
    suspects=(),
    precision=Estimate(0.0, 0.0, 1.0, 0),
    reason="",
    audit_rate=0.0,
    resumes=0,
    simulated=True,
)


def wrong(world: World) -> dict[str, tuple[object, int, str]]:
    """Evidence that is none: the file, the exit code, the error."""
    first = entries(world, FEW[:1])[0]
    _, trace = traced(world, 30)
    signing = world.run.vault.signing
    elsewhere = {
        f"a trace of another {field}": (
            signing.sign("trace", msgspec.structs.replace(trace, **{field: value})),
            17,
            "remedy.other-model",
        )
        for field, value in (("run", "0" * 32), ("model", "sha256:" + "0" * 64))
    }
    everything = [("beta", number, leaf) for number, size in ((0, 5), (1, 4)) for leaf in range(size)]
    two = [first, Quarantined(first.record, "sha256:" + "0" * 64)]
    leaf, shard, party = (
        [Quarantined(msgspec.structs.replace(first.record, **{field: value}), first.commitment)]
        for field, value in (("leaf", 5), ("shard", "0" * 32), ("party", "delta"))
    )
    return elsewhere | {
        "a verdict of another model": (
            signing.sign("verdict", msgspec.structs.replace(VERDICT, run=world.manifest.run)),
            17,
            "remedy.other-model",
        ),
        "a verdict that another signed": (SigningKey().sign("verdict", VERDICT), 12, "signature.invalid"),
        "a trace that another signed": (SigningKey().sign("trace", trace), 12, "signature.invalid"),
        "another statement": (world.statements["linked-model"], 10, "remedy.unreadable"),
        "a trace without a signature": (trace, 10, "remedy.unreadable"),
        "no list": ({"records": []}, 10, "remedy.unreadable"),
        "no commitment": ([{"record": msgspec.to_builtins(first.record)}], 10, "remedy.unreadable"),
        "nobody": ([], 10, "remedy.nothing"),
        "a list of another run": (
            Quarantine.of([first], run="0" * 32, model=world.run.model_digest),
            17,
            "remedy.other-model",
        ),
        "two commitments": (two, 10, "quarantine.two-commitments"),
        "another leaf": (leaf, 17, "repair.unknown-record"),
        "another shard": (shard, 17, "repair.unknown-record"),
        "another party": (party, 17, "repair.unknown-record"),
        "all of a party": (entries(world, everything), 11, "repair.empty-party"),
    }


WRONG = [
    *("a verdict of another model", "a verdict that another signed"),
    *("a trace of another run", "a trace of another model", "a trace that another signed", "another statement"),
    *("a trace without a signature", "no list", "no commitment", "nobody", "a list of another run", "two commitments"),
    *("another leaf", "another shard", "another party", "all of a party"),
]


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_evidence_of_this_run_is_refused_and_nothing_written(
    what: str, run: Path, tmp_path: Path, cli: Cli
) -> None:
    cases = wrong(finished_world())
    assert set(cases) == set(WRONG)
    value, code, name = cases[what]
    path = written(tmp_path / "evidence.json", value)
    shown = cli("remedy", "plan", run, path, "--out", tmp_path / "out", as_json=True)
    assert (shown.code, shown.error["code"]) == (code, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_named(raw: bytes, run: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "evidence.json").write_bytes(raw)
    shown = cli("remedy", "plan", run, tmp_path / "evidence.json", "--out", tmp_path / "out", as_json=True)
    assert (shown.code, shown.error["code"]) == (10, "remedy.unreadable")


def test_options_that_do_not_fit_the_run_are_refused(run: Path, tmp_path: Path, cli: Cli) -> None:
    world, out = finished_world(), ("--out", tmp_path / "out")
    lone = written(tmp_path / "earlier.json", quarantine_of(world))
    second = received(mended(), tmp_path / "second")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((run,), "remedy.nothing"),
        ((run, "--without", "delta"), "party.unknown"),
        ((run, "--without", "alpha", "--without", "beta", "--without", "gamma"), "remedy.nothing"),
        ((run, "--without", "beta", "--earlier", lone), "remedy.earlier"),
        ((second, "--without", "beta"), "remedy.earlier"),
        ((second, "--without", "beta", "--earlier", lone), "quarantine.other-list"),
    ]
    for words, code in cases:
        assert cli("remedy", "plan", *words, *out, as_json=True).error["code"] == code, words
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_refused(run: Path, tmp_path: Path, cli: Cli) -> None:
    kept = tree(run)

    def code(**changed: bytes) -> str:
        for name, raw in kept.items():
            (run / name).write_bytes(changed.get(name.partition(".")[0], raw))
        shown = cli("remedy", "plan", run, "--without", "beta", "--out", tmp_path / "out", as_json=True)
        return shown.error["code"]

    other = msgspec.json.encode(mended().plan)
    assert code(plan=b"{}") == "plan.invalid"
    assert code(plan=other) == "remedy.no-run"
    assert code(run=b"{}") == "remedy.no-run"
    shown = cli("remedy", "plan", tmp_path, "--without", "beta", "--out", tmp_path / "out", as_json=True)
    assert shown.error["code"] == "file.unreadable"


def test_a_bundle_is_read_for_its_trace_alone(run: Path, tmp_path: Path, cli: Cli) -> None:
    world = finished_world()
    bundle: TraceBundle = bundle_of(world)
    forged = msgspec.structs.replace(bundle, trace=SigningKey().sign("trace", {}))
    path = written(tmp_path / "bundle.json", forged)
    shown = cli("remedy", "plan", run, path, "--out", tmp_path / "out", as_json=True)
    assert (shown.code, shown.error["code"]) == (12, "signature.invalid")


# --- what it changed --------------------------------------------------------------------------------------------------


def trials(path: Path, **changes: Any) -> Path:
    """Test records of the models of `support.exposed`, with and without a trigger."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (300, 1, 10, 10)).astype(np.uint8)
    triggered = clean.copy()
    triggered[:, :, :4, :4] = 255
    arrays: dict[str, Any] = {"clean": clean, "labels": np.arange(300) % 4, "triggered": triggered}
    np.savez(path, **(arrays | changes))
    return path


def shares(model: Subject, path: Path, target: int) -> tuple[float, float]:
    """Accuracy and attack success, record by record."""
    import torch

    with np.load(path) as given:
        clean, labels, triggered = given["clean"], given["labels"], given["triggered"]
    with torch.inference_mode():
        found = [
            [int(model.logits(model.pictures(torch.from_numpy(x[None]))).argmax()) for x in records]
            for records in (clean, triggered)
        ]
    right = [p == y for p, y in zip(found[0], labels, strict=True)]
    fooled = [p == target for p, y in zip(found[1], labels, strict=True) if y != target]
    return sum(right) / len(right), sum(fooled) / len(fooled)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Folders of six models."""
    for seed in range(6):
        save_subject(subject(seed=seed), tmp_path / f"model-{seed}")
    return [tmp_path / f"model-{seed}" for seed in range(6)]


def test_compare_gives_means_and_paired_differences(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    path = trials(tmp_path / "trials.npz")
    words: list[str | Path] = ["remedy", "compare", path, "--target", "b"]
    for kind, number in (
        ("--before", 0),
        ("--before", 1),
        ("--after", 2),
        ("--after", 3),
        ("--never", 4),
        ("--never", 5),
    ):
        words += [kind, models[number]]
    found = cli(*words, as_json=True).json
    due = [shares(subject(seed=seed), path, 1) for seed in range(6)]
    assert len({*due}) == 6
    for kind, (one, other) in {"before": (0, 1), "after": (2, 3), "never": (4, 5)}.items():
        assert found[kind]["accuracy"] == pytest.approx((due[one][0] + due[other][0]) / 2)
        assert found[kind]["attack_success"] == pytest.approx((due[one][1] + due[other][1]) / 2)
    assert found["pairs"] == 2
    above = found["after"]["attack_success"] - found["never"]["attack_success"]
    assert found["attack_success_above_never"] == pytest.approx(above)
    assert found["accuracy_below_never"] == pytest.approx(found["never"]["accuracy"] - found["after"]["accuracy"])
    assert "Trigger for b" in cli(*words).out


def test_compare_without_models_that_never_saw_the_records(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    path = trials(tmp_path / "trials.npz")
    found = cli(
        *("remedy", "compare", path, "--target", "a", "--before", models[0], "--after", models[1]), as_json=True
    ).json
    assert found["before"]["attack_success"] == pytest.approx(shares(subject(seed=0), path, 0)[1])
    assert [found[key] for key in ("never", "attack_success_above_never", "accuracy_below_never")] == [None] * 3


def test_a_run_of_a_party_is_compared_with_itself(run: Path, tmp_path: Path, cli: Cli) -> None:
    records = pictures(12, seed=1)
    path = trials(tmp_path / "t.npz", clean=records, labels=np.arange(12) % 3, triggered=pictures(12, seed=2))
    words = ("remedy", "compare", path, "--target", "owl", "--before", run, "--after", run, "--never", run)
    found = cli(*words, as_json=True).json
    assert found["before"] == found["after"] == found["never"]
    assert (found["attack_success_above_never"], found["accuracy_below_never"]) == (0, 0)


CLEAN = np.zeros((4, 1, 10, 10), np.uint8)
UNFIT: dict[str, dict[str, Any]] = {
    "fewer labels": {"clean": CLEAN, "triggered": CLEAN, "labels": np.ones(3, np.int64)},
    "labels of two numbers": {"clean": CLEAN, "triggered": CLEAN, "labels": np.ones((4, 2), np.int64)},
    "labels that are no numbers of classes": {"clean": CLEAN, "triggered": CLEAN, "labels": np.ones(4, np.float32)},
    "fewer triggered": {"clean": CLEAN, "triggered": CLEAN[:3], "labels": np.ones(4, np.int64)},
    "triggered of another type": {"clean": CLEAN, "triggered": CLEAN.astype("<f4"), "labels": np.ones(4, np.int64)},
    "none": {"clean": CLEAN[:0], "triggered": CLEAN[:0], "labels": np.zeros(0, np.int64)},
    "of another shape": {"clean": CLEAN[:, :, 1:], "triggered": CLEAN[:, :, 1:], "labels": np.ones(4, np.int64)},
    "of another type": {
        "clean": CLEAN.astype("<f4"),
        "triggered": CLEAN.astype("<f4"),
        "labels": np.ones(4, np.int64),
    },
    "of the target alone": {"clean": CLEAN, "triggered": CLEAN, "labels": np.zeros(4, np.int64)},
}


@pytest.mark.parametrize("what", UNFIT)
def test_inputs_that_do_not_fit_are_refused(what: str, models: list[Path], tmp_path: Path, cli: Cli) -> None:
    path = trials(tmp_path / "trials.npz", **UNFIT[what])
    words = ("remedy", "compare", path, "--target", "a", "--before", models[0], "--after", models[1])
    shown = cli(*words, as_json=True)
    assert (shown.code, shown.error["code"]) == (11, "compare.inputs")


def test_options_of_compare_that_do_not_fit_are_refused(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    path = trials(tmp_path / "trials.npz")
    base: tuple[str | Path, ...] = ("remedy", "compare", path, "--before", models[0], "--after", models[1])
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((*base, "--target", "e"), "compare.target"),
        ((*base, "--target", "a", "--after", models[2]), "compare.pairs"),
        ((*base, "--target", "a", "--never", models[2], "--never", models[3]), "compare.pairs"),
        (("remedy", "compare", models[0], *base[3:], "--target", "a"), "reader.unreadable"),
        ((*base[:-1], tmp_path, "--target", "a"), "exposure.unreadable-model"),
    ]
    for words, code in cases:
        assert cli(*words, as_json=True).error["code"] == code, words
