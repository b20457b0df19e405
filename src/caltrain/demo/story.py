"""The demo from end to end: set the scene, run the protocol in real processes, look for the culprit, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from caltrain.demo import evaluate, steps
from caltrain.demo.compare import Finished, figures, train_plainly
from caltrain.demo.disputes import settle
from caltrain.demo.processes import crew
from caltrain.demo.result import DemoResult
from caltrain.demo.scenario import Scenario, build_scenario
from caltrain.demo.steps import USER, Scene
from caltrain.demo.telling import assemble
from caltrain.errors import DataError
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.receive import RunRecord, read_chain
from caltrain.presets import PresetName
from caltrain.project import DEFAULT_PARTIES, Project, create_project
from caltrain.provenance.chain import verify_chain
from caltrain.provenance.verdict import VerdictStatement
from caltrain.reports.html import write_report
from caltrain.reports.progress import training_figures, watch
from caltrain.reports.terminal import in_words, simulated_note, step_line

MAX_TRACED = 400
_SECONDS = 3600
Form = Literal["ternary", "two-way"]


def tell(
    data: PresetName,
    *,
    console: Console,
    out: Path,
    data_dir: Path | None = None,
    download: bool = False,
    form: Form = "ternary",
    seed: int = 0,
    epochs: int | None = None,
) -> DemoResult:
    """Run the demo into a new folder under `out`. Raises a CaltrainError at the first thing that fails.

    `epochs` replaces the preset's; fewer make a quick trial whose figures are worse. For the main thread.
    """
    began = time.monotonic()
    console.print(f"[bold]CalTrain demo[/] on {data}, {form} form", simulated_note(), sep="\n", end="\n\n")
    scenario = build_scenario(data, parties=DEFAULT_PARTIES, data_dir=data_dir, download=download, seed=seed)
    folder = _new_folder(out, data)
    project = create_project(
        folder / "project",
        preset=data,
        parties=DEFAULT_PARTIES,
        users=[USER],
        two_way=form == "two-way",
        reveal_seed=True,
        budget=2 * MAX_TRACED,  # each input is traced, and judged
        epochs=epochs,
    )
    names = ", ".join(DEFAULT_PARTIES)
    console.print(step_line(1, "plan", f"{project.plan.digest()[:23]}… of {names}"))
    with crew(folder / "logs") as members:
        finished = _run(Scene(folder, project, scenario, members), console)
    plain = train_plainly(finished)
    console.print(step_line(13, "report", "compared with plain PyTorch on the same records and seed\n"))
    report = folder / "report.html"
    result = figures(finished, plain, data=data, seconds=time.monotonic() - began, report=report)
    write_report(report, assemble(finished, result, plain))
    return result


def _new_folder(out: Path, data: PresetName) -> Path:
    number = 1
    while (folder := out / f"{data}-{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder.resolve()


def _run(scene: Scene, console: Console) -> Finished:
    """Steps 2 to 12, in processes."""

    def say(number: int, name: str, text: str) -> None:
        console.print(step_line(number, name, text))

    host_process = steps.serve(scene)
    lineage = steps.seal(scene)
    say(2, "seal", f"{scene.scenario.records:,} records, sealed by their owners")
    url = str(host_process.first_line()["url"])
    joining = steps.join(scene, url)
    with HostClient(url) as host:
        host.wait_for({"start"}, seconds=_SECONDS, on_poll=lambda: steps.raise_failed(joining))
        say(3, "attest", "each party verified the simulated enclave, then sent it its key")
        say(4, "manifest", "signed by the enclave, countersigned by each party")
        host.post("/v1/run/start", None, RunStatus)
        status = watch(host, seconds=_SECONDS, console=console)
        joined = {name: process.result() for name, process in joining.items()}
        _tell_of_training(status, scene.project, say)
        run_folder = Path(joined[DEFAULT_PARTIES[0]]["folder"])
        record = msgspec.json.decode((run_folder / "run.json").read_bytes(), type=RunRecord)
        predicted, triggered = steps.predict(scene, run_folder)
        rows = _rows_to_trace(scene.scenario, predicted)
        traces = steps.trace(scene, rows, url)
        say(9, "trace", f"{len(traces)} triggered inputs, sealed, by the model user {USER}")
        verdict = steps.verdict(scene, record.manifest, url)
        say(10, "verdict", _verdict_in_words(verdict))
        disputes = settle(scene, record.manifest, traces[: steps.SHOWN], url)
        refused, disclosed = sum(d.refused for d in disputes), sum(len(d.records) for d in disputes)
        say(11, "disclose", f"{disclosed} records verified offline, {refused} substitutes refused")
        chain = read_chain(host.artifact("chain.jsonl"))
    key = record.manifest.enclave_signing_key
    events = verify_chain(chain, run=record.manifest.run, signing_key=key, head=record.head)
    say(12, "chain", f"{len(events)} signed events, through the head that the parties kept")
    return Finished(
        project=scene.project,
        scenario=scene.scenario,
        manifest=record.manifest,
        lineage=lineage,
        run_folder=run_folder,
        run_seed=bytes.fromhex(record.run_seed),
        predicted=predicted,
        predicted_triggered=triggered,
        traced_inputs=rows,
        traces=traces,
        verdict=verdict,
        hunts=steps.hunts(scene, joined),
        disputes=disputes,
        events=events,
        sandbox=status.sandbox,
    )


def _tell_of_training(status: RunStatus, project: Project, say: Callable[[int, str, str], None]) -> None:
    plan = project.plan
    inside = "FrontNet, HeadNet" if plan.partition.head else "FrontNet"
    say(5, "ingest", "shards authenticated, opened and checked in the enclave")
    say(6, "train", f"{status.epochs} epochs, {inside} inside; {training_figures(status)}")
    say(7, "release", f"{inside} sealed to each party, CenterNet in clear")
    say(8, "link", "a fingerprint of each record; the model is named by its digest")


def _verdict_in_words(said: VerdictStatement) -> str:
    if not said.responsible:
        return f"cannot tell who is responsible: {said.reason}"
    names, p_value = " and ".join(said.responsible), max(b.adjusted for b in said.blamed if b.responsible)
    records = f"{said.found} records, estimated precision {in_words(said.precision)}"
    return f"responsible: {names} (p at most {p_value:g}), by {records}"


def _rows_to_trace(scenario: Scenario, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = evaluate.triggered_inputs(scenario, predicted)[:MAX_TRACED]
    if not len(rows):
        raise DataError(
            "demo.nothing-to-trace",
            "the model gets no test record of another class right",
            step="trace",
            fix="Train for more epochs.",
        )
    return rows
