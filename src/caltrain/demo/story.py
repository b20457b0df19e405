"""The demo from end to end: set the scene, run the protocol in real processes, look for the culprit, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.boundary.sealed import SuspicionReport, TraceStatement
from caltrain.cli.host import watch
from caltrain.cli.output import SIMULATED, say
from caltrain.demo import evaluate
from caltrain.demo.disputes import Dispute, settle
from caltrain.demo.evaluate import Lineage
from caltrain.demo.processes import Crew, crew
from caltrain.demo.result import DemoResult
from caltrain.demo.scenario import Holding, Scenario, build_scenario
from caltrain.demo.telling import assemble
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.model import load_model, predict
from caltrain.participant.receive import RunRecord, read_chain
from caltrain.plan import Plan, RunManifest
from caltrain.project import DEFAULT_PARTIES, Project, create_project
from caltrain.provenance.chain import Event, verify_chain
from caltrain.records.commitment import RecordRef
from caltrain.reports.html import write_report
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

USER = "analyst"
MAX_TRACED = 400
SHOWN = 3
_SECONDS = 3600


@dataclass(frozen=True)
class Finished:
    """What the processes of a demo left behind."""

    project: Project
    scenario: Scenario
    manifest: RunManifest
    lineage: Lineage
    run_folder: Path
    run_seed: bytes
    predicted: NDArray[np.int64]
    predicted_triggered: NDArray[np.int64]
    traced_inputs: NDArray[np.int64]
    traces: list[TraceStatement]
    suspicion: dict[RecordRef, float]
    disputes: list[Dispute]
    events: tuple[Event, ...]
    sandbox: dict[str, str]


def tell(data: str, *, data_dir: Path | None, download: bool, out: Path, form: str, seed: int) -> DemoResult:
    """Run the demo into a new folder under `out`. Raises a CaltrainError at the first thing that fails."""
    began = time.monotonic()
    say(f"[bold]CalTrain demo[/] on {data}, {form}. {SIMULATED}")
    scenario = build_scenario(data, parties=DEFAULT_PARTIES, data_dir=data_dir, download=download, seed=seed)
    folder = _new_folder(out, data)
    project = create_project(
        folder / "project",
        preset=data,
        parties=DEFAULT_PARTIES,
        users=[USER],
        two_way=form == "two-way",
        reveal_seed=True,
        budget=MAX_TRACED,
    )
    say(f" 1. plan {project.plan.digest()[:23]}… for {', '.join(DEFAULT_PARTIES)}; model user: {USER}")
    with crew(folder / "logs") as members:
        finished = _run(members, folder, project, scenario)
    say("    plain PyTorch on the same records and seed, for comparison")
    plain = _train_plainly(finished)
    result = _result(finished, plain, data=data, seconds=time.monotonic() - began, report=folder / "report.html")
    write_report(folder / "report.html", assemble(finished, result))
    say(f"12. report: {result.report}")
    return result


def _new_folder(out: Path, data: str) -> Path:
    number = 1
    while (folder := out / f"{data}-{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder.resolve()


def _run(members: Crew, folder: Path, project: Project, scenario: Scenario) -> Finished:
    """Steps 2 to 11, in processes."""
    plan = ("--plan", project.plan_path)
    policy = ("--policy", project.policy_path)
    host_process = members.start(
        "host", "host", "serve", *plan, "--folder", folder / "host", "--root", project.operator.folder, "--port", "0"
    )
    sealed = _seal(members, folder, project, scenario)
    say(f" 2. {scenario.records} records sealed by their owners")
    url = str(host_process.first_line()["url"])
    joining = {
        name: members.start(f"join-{name}", "party", "join", url, "--home", party.folder, *plan, *policy)
        for name, party in project.parties.items()
    }
    say(" 3. parties approve the plan, verify the (simulated) evidence, hand over their keys")
    with HostClient(url) as host:
        host.wait_for({"start"}, seconds=_SECONDS, on_poll=lambda: _raise_failed(joining))
        say(" 4. all parties countersigned the run manifest")
        host.post("/v1/run/start", None, RunStatus)
        status = watch(host, seconds=_SECONDS)
        say(" 5. - 8. ingested, trained, released, linked")
        joined = {name: process.result() for name, process in joining.items()}
        first = next(iter(project.parties))
        run_folder = Path(joined[first]["folder"])
        record = msgspec.json.decode((run_folder / "run.json").read_bytes(), type=RunRecord)
        lineage = _lineage(sealed, scenario)
        predicted, triggered = _predict(members, folder, scenario, run_folder)
        inputs = evaluate.triggered_inputs(scenario, predicted)[:MAX_TRACED]
        traces = _trace(members, folder, project, scenario, inputs, url)
        say(f" 9. {len(traces)} triggered inputs traced by {USER}")
        disputes = settle(members, folder, project, record.manifest, traces[:SHOWN], url)
        refused, disclosed = sum(d.refused for d in disputes), sum(len(d.records) for d in disputes)
        say(f"10. {disclosed} records disclosed and verified offline, {refused} substitutes refused")
        chain = read_chain(host.artifact("chain.jsonl"))
    key = record.manifest.enclave_signing_key
    events = verify_chain(chain, run=record.manifest.run, signing_key=key, head=record.head)
    say(f"11. {len(events)} events in the chain, which passes through the head that the parties kept")
    return Finished(
        project=project,
        scenario=scenario,
        manifest=record.manifest,
        lineage=lineage,
        run_folder=run_folder,
        run_seed=bytes.fromhex(record.run_seed),
        predicted=predicted,
        predicted_triggered=triggered,
        traced_inputs=inputs,
        traces=traces,
        suspicion=_suspicion(joined),
        disputes=disputes,
        events=events,
        sandbox=status.sandbox,
    )


def _raise_failed(joining: dict[str, Any]) -> None:
    for process in joining.values():
        if process.failed:
            process.result()


def _seal(members: Crew, folder: Path, project: Project, scenario: Scenario) -> dict[str, list[dict[str, Any]]]:
    """Each party seals its own file; the shards of each, in order."""
    commands: dict[str, Sequence[str | Path]] = {}
    for holding in scenario.holdings:
        file = folder / "data" / f"{holding.name}.npz"
        _write_npz(file, holding)
        home = project.parties[holding.name].folder
        commands[holding.name] = ("party", "seal", "--home", home, "--plan", project.plan_path, "--data", file)
    results = members.run_all({f"seal-{name}": words for name, words in commands.items()})
    return {name.removeprefix("seal-"): result["shards"] for name, result in results.items()}


def _write_npz(file: Path, holding: Holding) -> None:
    """A party's records in the form that MNIST has; its one test record is not used."""
    file.parent.mkdir(exist_ok=True)
    images = holding.images.transpose(0, 2, 3, 1)
    images = images[..., 0] if images.shape[-1] == 1 else images
    np.savez(file, x_train=images, y_train=holding.labels, x_test=images[:1], y_test=holding.labels[:1])


def _lineage(sealed: dict[str, list[dict[str, Any]]], scenario: Scenario) -> Lineage:
    rows: dict[RecordRef, tuple[Holding, int]] = {}
    for holding in scenario.holdings:
        row = 0
        for shard in sealed[holding.name]:
            for leaf in range(shard["records"]):
                rows[RecordRef(holding.name, shard["shard"], leaf)] = (holding, row)
                row += 1
    return Lineage(rows)


def _predict(
    members: Crew, folder: Path, scenario: Scenario, run_folder: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes of the test set, and of the test set with the trigger, by a party's joined model."""
    test = scenario.test.images
    np.save(folder / "data" / "test.npy", np.concatenate((test, scenario.attack.stamp(test))))
    process = members.start("predict", "predict", folder / "data" / "test.npy", "--model", run_folder)
    classes = load_model_classes(run_folder)
    found = np.array([classes.index(name) for name in process.result()["predicted"]], np.int64)
    return found[: len(test)], found[len(test) :]


def load_model_classes(run_folder: Path) -> tuple[str, ...]:
    """Class names of a joined model's plan."""
    plan = msgspec.json.decode((run_folder / "plan.json").read_bytes(), type=Plan)
    return plan.data.classes


def _trace(
    members: Crew, folder: Path, project: Project, scenario: Scenario, inputs: NDArray[np.int64], url: str
) -> list[TraceStatement]:
    file = folder / "data" / "triggered.npy"
    np.save(file, scenario.attack.stamp(scenario.test.images[inputs]))
    process = members.start(
        *("trace", "trace", file, "--url", url, "--home", project.users[USER].folder),
        *("--plan", project.plan_path, "--policy", project.policy_path, "--out", folder / "traces"),
        *("--bundles", str(SHOWN)),
    )
    return msgspec.convert(process.result()["traces"], list[TraceStatement])


def _suspicion(joined: dict[str, dict[str, Any]]) -> dict[RecordRef, float]:
    """Each party's own report, put together: only the demo sees all of them."""
    scores: dict[RecordRef, float] = {}
    for name, result in joined.items():
        raw = (Path(result["folder"]) / "suspicion.json").read_bytes()
        for shard, values in msgspec.json.decode(raw, type=SuspicionReport).scores.items():
            scores |= {RecordRef(name, shard, leaf): value / 1000 for leaf, value in enumerate(values)}
    return scores


def _train_plainly(finished: Finished) -> torch.nn.Sequential:
    """The plain loop on the same records in the manifest's order, with the seed that the enclave revealed."""
    rows = finished.lineage.rows
    refs = [
        RecordRef(party.name, shard.shard, leaf)
        for party in finished.manifest.parties
        for shard in party.shards
        for leaf in range(shard.records)
    ]
    plan = finished.project.plan
    return train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=torch.from_numpy(np.stack([rows[r][0].images[rows[r][1]] for r in refs])),
        labels=torch.from_numpy(np.array([rows[r][0].labels[rows[r][1]] for r in refs])),
        seeds=RunSeeds.from_run_seed(finished.run_seed),
    )


def _result(finished: Finished, plain: torch.nn.Sequential, *, data: str, seconds: float, report: Path) -> DemoResult:
    scenario, plan = finished.scenario, finished.project.plan
    test = scenario.test
    culprit = evaluate.culprit_of(scenario)
    plain_predicted = predict(plain, plan, test.images).argmax(1)
    plain_triggered = predict(plain, plan, scenario.attack.stamp(test.images)).argmax(1)
    ours = load_model(finished.run_folder).module.state_dict()
    theirs = plain.state_dict()
    identical = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    disputes = finished.disputes
    return DemoResult(
        data=data,
        records=scenario.records,
        form=plan.partition.form,
        simulated=finished.manifest.simulated,
        accuracy=float((finished.predicted == test.labels).mean()),
        plain_accuracy=float((plain_predicted == test.labels).mean()),
        weights_identical=identical,
        attack_success=evaluate.attack_success(scenario, finished.predicted_triggered),
        plain_attack_success=evaluate.attack_success(scenario, plain_triggered),
        poison_share=scenario.poison_share,
        triggered_inputs=len(finished.traces),
        trace_precision_at_9=evaluate.trace_precision(finished.traces, finished.lineage),
        trace_contributor_accuracy=evaluate.trace_contributor_accuracy(finished.traces, culprit),
        culprit=culprit,
        mislabel_auroc=evaluate.mislabel_auroc(finished.suspicion, finished.lineage),
        disclosures=sum(len(d.trace.neighbours) for d in disputes),
        disclosures_verified=sum(len(d.records) for d in disputes),
        substitutions=sum(d.substitutes for d in disputes),
        substitutions_refused=sum(d.refused for d in disputes),
        center_audited=False,
        events=len(finished.events),
        chain_head=finished.events[-1].digest(),
        model=finished.traces[0].model,
        seconds=round(seconds, 1),
        report=str(report),
    )
