"""A party reads what the hunt found of its own records: before the release, or as it was kept."""

from __future__ import annotations

from pathlib import Path

from caltrain.boundary.sealed import LEFT_OUT, SuspicionReport, seal_for
from caltrain.errors import IntegrityError, LineageError
from caltrain.participant.hunt import Suspicious, fetch_report, kept_report, most_suspicious
from caltrain.participant.journal import KeptRun, keep_run
from caltrain.participant.receive import SUSPICION, receive, run_folder
from support.disk import tree
from support.folders import identity_of
from support.samples import refused
from support.scripted_host import Edit, ScriptedHost
from support.world import World
from support.worlds import finished_world

A, B = "aa" * 16, "bb" * 16
DIGEST = "sha256:" + "0" * 64


def little(*scores: int) -> bytes:
    return b"".join(score.to_bytes(2, "little") for score in scores)


REPORT = SuspicionReport(
    model=DIGEST,
    scores={"labels": {A: little(5, LEFT_OUT, 900), B: little(1000, 5)}, "spectral": {A: little(1, 2, 3), B: b""}},
)


def test_the_most_suspicious_of_all_shards_come_first() -> None:
    found = most_suspicious(REPORT, "labels", top=3)
    assert found == [Suspicious(B, 0, 1.0), Suspicious(A, 2, 0.9), Suspicious(A, 0, 0.005)]
    assert len(most_suspicious(REPORT, "labels", top=99)) == 4
    assert most_suspicious(REPORT, "spectral", top=1) == [Suspicious(A, 2, 0.003)]


class Hunted:
    """Alpha, once the hunt is over."""

    def __init__(self, folder: Path, *, countersigned: bool = True) -> None:
        self.world: World = finished_world()
        self.host = ScriptedHost(self.world)
        self.alpha = identity_of(self.world.parties["alpha"], folder)
        manifest = self.world.manifest
        if countersigned:
            kept = KeptRun(
                plan=manifest.plan,
                manifest=manifest.digest(),
                signing_key=manifest.enclave_signing_key,
                head=DIGEST,
            )
            keep_run(folder, manifest.run, kept)

    def fetch(self) -> tuple[str, SuspicionReport]:
        with self.host.client() as client:
            return fetch_report(client, self.alpha, seconds=1)


def test_a_party_gets_the_report_of_its_own_records(tmp_path: Path) -> None:
    hunted = Hunted(tmp_path / "alpha")
    run, report = hunted.fetch()
    assert run == hunted.world.manifest.run
    assert report.model == hunted.world.run.model_digest
    assert set(report.scores["labels"]) == {shard.header.shard for shard in hunted.world.parties["alpha"].shards}
    assert [path for path in tree(tmp_path / "alpha") if "suspicion" in str(path)] == []


def test_a_run_that_the_party_did_not_countersign_is_refused(tmp_path: Path) -> None:
    with refused(LineageError, "run.unknown"):
        Hunted(tmp_path / "alpha", countersigned=False).fetch()


def test_a_report_that_is_not_ours_or_was_touched_is_refused(tmp_path: Path) -> None:
    hunted = Hunted(tmp_path / "alpha")
    changes: list[Edit] = [lambda _: hunted.world.suspicion["beta"], lambda own: own[:-1]]
    for change in changes:
        hunted.host.edit["/v1/artifacts/suspicion/alpha"] = change
        with refused(IntegrityError, "sealed.not-authentic"):
            hunted.fetch()


def test_the_kept_report_is_the_one_that_came_with_the_model(tmp_path: Path) -> None:
    hunted = Hunted(tmp_path / "alpha")
    manifest = hunted.world.manifest
    hunted.host.edit.clear()
    (tmp_path / "alpha" / "heads.json").unlink()
    with hunted.host.client() as client:
        receive(client, hunted.world.plan, hunted.alpha, manifest)
    keep_run(
        tmp_path / "alpha",
        manifest.run,
        KeptRun(plan=manifest.plan, manifest=manifest.digest(), signing_key=manifest.enclave_signing_key, head=DIGEST),
    )
    assert kept_report(hunted.alpha, manifest.run) == hunted.fetch()[1]


def test_a_run_that_was_not_received_has_no_report(tmp_path: Path) -> None:
    hunted = Hunted(tmp_path / "alpha")
    with refused(LineageError, "hunt.none-kept"):
        kept_report(hunted.alpha, hunted.world.manifest.run)


def test_a_kept_report_that_was_changed_or_is_not_of_this_run_and_party_is_refused(tmp_path: Path) -> None:
    hunted = Hunted(tmp_path / "alpha")
    run, own = hunted.world.manifest.run, hunted.world.suspicion["alpha"]
    folder = run_folder(hunted.alpha, run)
    folder.mkdir(parents=True)
    elsewhere = seal_for(hunted.alpha.data_key, "suspicion/v1", REPORT, context="0" * 32)
    for content in (b"", b"{}", own[:-1], own[:9] + bytes([own[9] ^ 1]) + own[10:], elsewhere):
        (folder / SUSPICION).write_bytes(content)
        with refused(IntegrityError, "sealed.not-authentic"):
            kept_report(hunted.alpha, run)
    (folder / SUSPICION).write_bytes(hunted.world.suspicion["beta"])
    with refused(IntegrityError, "sealed.not-authentic"):
        kept_report(hunted.alpha, run)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / SUSPICION).write_bytes(own)
    assert kept_report(hunted.alpha, run, folder=tmp_path / "copy") == hunted.fetch()[1]
