"""The demo's steps that parties and the model user take, each with the commands that people type."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.boundary.sealed import SuspicionReport, TraceStatement
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.demo.evaluate import Lineage
from caltrain.demo.processes import Background, Crew
from caltrain.demo.scenario import Holding, Scenario
from caltrain.files import write_whole
from caltrain.participant.hunt import kept_report
from caltrain.plan import RunManifest
from caltrain.project import Project
from caltrain.provenance.verdict import VerdictStatement
from caltrain.records.commitment import RecordRef

USER = "analyst"
SHOWN = 3
Classes = NDArray[np.int64]
JoinResults = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Scene:
    """What all steps share: the demo's folder, its project and records, its processes."""

    folder: Path
    project: Project
    scenario: Scenario
    members: Crew

    @property
    def plan(self) -> tuple[str, Path]:
        """The option that names the plan."""
        return "--plan", self.project.plan_path

    @property
    def policy(self) -> tuple[str, Path]:
        """The option that names the policy."""
        return "--policy", self.project.policy_path


def serve(scene: Scene) -> Background:
    """Start the host."""
    folder, root = scene.folder / "host", scene.project.operator.folder
    return scene.members.start("host", "host", "serve", *scene.plan, "--folder", folder, "--root", root, "--port", "0")


def seal(scene: Scene) -> Lineage:
    """Each party seals its own file; returns which record went where."""
    commands: dict[str, Sequence[str | Path]] = {}
    for holding in scene.scenario.holdings:
        file, home = scene.folder / "data" / f"{holding.name}.npz", scene.project.parties[holding.name].folder
        write_whole(file, _npz(holding))
        commands[f"seal-{holding.name}"] = ("party", "seal", "--home", home, *scene.plan, "--data", file)
    results = scene.members.run_all(commands)
    rows: dict[RecordRef, tuple[Holding, int]] = {}
    for holding in scene.scenario.holdings:
        row = 0
        for shard in results[f"seal-{holding.name}"]["shards"]:
            for leaf in range(shard["records"]):
                rows[RecordRef(holding.name, shard["shard"], leaf)] = (holding, row)
                row += 1
    return Lineage(rows)


def _npz(holding: Holding) -> bytes:
    """A party's records in the form that MNIST has; its one test record is not used."""
    images = holding.images.transpose(0, 2, 3, 1)
    images = images[..., 0] if images.shape[-1] == 1 else images
    out = io.BytesIO()
    np.savez(out, x_train=images, y_train=holding.labels, x_test=images[:1], y_test=holding.labels[:1])
    return out.getvalue()


def join(scene: Scene, url: str) -> dict[str, Background]:
    """Each party takes part in the run; the processes go on until it is over."""
    return {
        name: scene.members.start(
            f"join-{name}", "party", "join", url, "--home", party.folder, *scene.plan, *scene.policy
        )
        for name, party in scene.project.parties.items()
    }


def raise_failed(joining: Mapping[str, Background]) -> None:
    """Raise the error of a party that gave up."""
    for process in joining.values():
        if process.failed:
            process.result()


def predict(scene: Scene, run_folder: Path) -> tuple[Classes, Classes]:
    """Classes of the test set, and of the test set with the trigger, by a party's joined model."""
    test, classes = scene.scenario.test.images, scene.project.plan.data.classes
    inputs = _npy(scene, "test", np.concatenate((test, scene.scenario.attack.stamp(test))))
    named = scene.members.start("predict", "predict", run_folder, inputs).result()["predicted"]
    found = np.array([classes.index(name) for name in named], np.int64)
    return found[: len(test)], found[len(test) :]


def trace(scene: Scene, rows: Classes, url: str) -> list[TraceStatement]:
    """The model user sends these test records with the trigger, sealed; the traces, and bundles of the first."""
    inputs = _npy(scene, "triggered", scene.scenario.attack.stamp(scene.scenario.test.images[rows]))
    home = scene.project.users[USER].folder
    process = scene.members.start(
        *("trace", "trace", inputs, "--url", url, "--home", home, *scene.plan, *scene.policy),
        *("--out", scene.folder / "traces", "--bundles", str(SHOWN)),
    )
    return msgspec.convert(process.result()["traces"], list[TraceStatement])


def verdict(scene: Scene, manifest: RunManifest, url: str) -> VerdictStatement:
    """The model user asks who is responsible for the answers to the inputs that it traced, and has that verified."""
    home, out = scene.project.users[USER].folder, scene.folder / "verdict"
    scene.members.start(
        *("verdict", "verdict", scene.folder / "data" / "triggered.npy", "--url", url, "--home", home),
        *(*scene.plan, *scene.policy, "--out", out, "--report", out / "verdict.html"),
    ).result()
    digest = scene.project.plan.digest()
    scene.members.start(
        "verify-verdict", "verify", out / "bundle.json", "--plan-digest", digest, *scene.policy
    ).result()
    envelope = msgspec.json.decode((out / "verdict.json").read_bytes(), type=Envelope)
    return open_envelope(envelope, "verdict", manifest.enclave_signing_key, VerdictStatement, step="read verdict")


def hunts(scene: Scene, joined: JoinResults) -> dict[str, SuspicionReport]:
    """Each party's own report: only the demo sees all of them."""
    return {name: kept_report(scene.project.parties[name], result["run"]) for name, result in joined.items()}


def _npy(scene: Scene, name: str, array: NDArray[np.uint8]) -> Path:
    file, out = scene.folder / "data" / f"{name}.npy", io.BytesIO()
    np.save(out, array)
    write_whole(file, out.getvalue())
    return file
