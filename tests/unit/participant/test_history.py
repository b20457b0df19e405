"""A party's runs side by side: in the order of its journal, each verified, or nothing is told."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caltrain.boundary.sealed import SuspicionReport, seal_for
from caltrain.crypto.dsse import SigningKey
from caltrain.errors import CaltrainError, ConfigError, IntegrityError, LineageError
from caltrain.exposure.figures import Estimate
from caltrain.participant.history import History, history_of, hunted_run
from caltrain.participant.hunt import kept_report
from caltrain.participant.identity import Identity
from caltrain.participant.journal import kept_runs
from caltrain.participant.receive import SUSPICION, RunRecord
from caltrain.plan import Plan
from caltrain.provenance.chain import Chain
from caltrain.provenance.statements import LinkedModel
from support.courses import Course
from support.repairs import FEW
from support.samples import refused

OTHER = "sha256:" + "0" * 64


def longer(plan: Plan) -> Plan:
    """The same for two epochs."""
    return msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, epochs=2))


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Three runs of alpha's: as planned, repaired, and of another plan with fewer of its records."""
    course = Course(tmp_path_factory.mktemp("course") / "alpha")
    course.again(without=FEW)
    course.again(longer, shards=1)
    return course


class Home:
    """A copy of alpha's folder, to be changed."""

    def __init__(self, course: Course, folder: Path) -> None:
        self.course, self.world = course, course.worlds[0]
        shutil.copytree(course.alpha.folder, folder)
        self.alpha: Identity = replace(course.alpha, folder=folder)
        self.runs = [folder / "runs" / world.manifest.run for world in course.worlds]
        self.signer = self.world.run.vault.signing

    @property
    def record(self) -> RunRecord:
        """What the first run's `run.json` says."""
        return msgspec.json.decode((self.runs[0] / "run.json").read_bytes(), type=RunRecord)

    def rewrite(self, **changes: Any) -> None:
        """The first run's `run.json` with other fields."""
        (self.runs[0] / "run.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(self.record, **changes)))

    def link(self, signer: SigningKey | None = None, **changes: Any) -> None:
        """The first run's link says something else."""
        said = msgspec.structs.replace(self.world.statement("linked-model", LinkedModel), **changes)
        self.rewrite(linked=(signer or self.signer).sign("linked-model", said))

    def report(self, *, key: bytes | None = None, run: str | None = None, **changes: Any) -> None:
        """The first run's report says something else."""
        said = msgspec.structs.replace(kept_report(self.alpha, self.world.manifest.run), **changes)
        context = run or self.world.manifest.run
        sealed = seal_for(key or self.alpha.data_key, "suspicion/v1", said, context=context)
        (self.runs[0] / SUSPICION).write_bytes(sealed)

    def chain(self, *models: str) -> None:
        """A chain of the first run's enclave in which these models were hunted."""
        chain = Chain(self.signer, run=self.world.manifest.run)
        bodies = [("hunt", model) for model in models] + [("link", self.record.model)]
        lines = [msgspec.json.encode(chain.append(kind, {"model": model})) for kind, model in bodies]  # type: ignore[arg-type]
        (self.runs[0] / "chain.jsonl").write_bytes(b"\n".join(lines))
        self.rewrite(head=chain.head)

    def heads(self, **changes: Any) -> None:
        """What the party's journal keeps of the first run."""
        runs = kept_runs(self.alpha.folder)
        run = self.world.manifest.run
        kept = msgspec.structs.replace(runs[run], **changes)
        (self.alpha.folder / "heads.json").write_bytes(msgspec.json.encode(runs | {run: kept}))

    def told(self, *folders: Path) -> History:
        return history_of(self.alpha, folders)


@pytest.fixture
def home(course: Course, tmp_path: Path) -> Home:
    return Home(course, tmp_path / "alpha")


def runs(history: History) -> list[str]:
    return [run.linked.run for run in history.runs]


def test_all_runs_of_the_folder_are_told_in_the_order_of_the_journal_with_what_changed(home: Home) -> None:
    told = home.told()
    assert runs(told) == [world.manifest.run for world in home.course.worlds]
    assert [run.changed for run in told.runs] == [(), ("quarantine",), ("plan", "quarantine", "records")]
    assert [run.linked.repair.records if run.linked.repair else 0 for run in told.runs] == [0, len(FEW), 0]
    assert (told.party, told.contributors, told.without) == ("alpha", ("alpha", "beta", "gamma"), ())
    for run in told.runs:
        assert run.wrong_labels == kept_report(home.alpha, run.linked.run).wrong_labels
        assert set(run.wrong_labels) == {"alpha", "beta", "gamma"}
    kept = kept_runs(home.alpha.folder)
    (home.alpha.folder / "heads.json").write_bytes(msgspec.json.encode(dict(reversed(kept.items()))))
    assert runs(home.told()) == runs(told)[::-1]


def test_named_runs_alone_are_told_each_once_and_a_copy_is_as_good(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.runs[1], tmp_path / "backup")
    told = home.told(home.runs[2], tmp_path / "backup", home.runs[1])
    assert runs(told) == [home.course.worlds[i].manifest.run for i in (1, 2)]
    assert [run.changed for run in told.runs] == [(), ("plan", "quarantine", "records")]


def test_runs_that_were_not_received_or_have_no_report_are_named_and_not_told(home: Home) -> None:
    (home.runs[0] / SUSPICION).unlink()
    (home.runs[1] / "run.json").unlink()
    told = home.told()
    assert runs(told) == [home.course.worlds[2].manifest.run]
    assert told.without == tuple(sorted(path.name for path in home.runs[:2]))
    shutil.rmtree(home.alpha.folder / "runs")
    assert home.told() == History("alpha", ())


def test_a_party_that_followed_a_run_further_than_it_keeps_may_show_it(home: Home) -> None:
    home.heads(head=OTHER, events=1 << 10)
    assert len(home.told().runs) == 3


def overwritten(name: str, content: bytes) -> Callable[[Home], object]:
    return lambda home: (home.runs[0] / name).write_bytes(content)


def share(value: float, low: float, high: float, *, party: str = "alpha") -> Callable[[Home], None]:
    return lambda home: home.report(wrong_labels={party: Estimate(value, low, high, 9)})


def moved(name: str) -> Callable[[Home], object]:
    """Another run's file in the place of the first one's."""
    return lambda home: shutil.copy(home.runs[1] / name, home.runs[0] / name)


def manifest(home: Home) -> None:
    home.rewrite(manifest=msgspec.structs.replace(home.record.manifest, simulated=False))


Damage = dict[str, tuple[Callable[[Home], object], type[CaltrainError], str]]
DAMAGE: Damage = {
    "a record that is none": (overwritten("run.json", b"{}"), ConfigError, "remedy.no-run"),
    "no record": (lambda home: (home.runs[0] / "run.json").unlink(), ConfigError, "file.unreadable"),
    "another plan": (moved("plan.json"), ConfigError, "remedy.no-run"),
    "another manifest": (manifest, IntegrityError, "quality.other-manifest"),
    "a run never countersigned": (
        lambda home: (home.alpha.folder / "heads.json").write_bytes(b"{}"),
        LineageError,
        "run.unknown",
    ),
    "a link by somebody else": (lambda home: home.link(SigningKey()), IntegrityError, "signature.invalid"),
    "a link of another model": (lambda home: home.link(model=OTHER), IntegrityError, "quality.other-model"),
    "a link of another run": (lambda home: home.link(run="0" * 32), IntegrityError, "quality.other-model"),
    "another model": (lambda home: home.rewrite(model=OTHER), IntegrityError, "quality.other-model"),
    "a chain that is none": (overwritten("chain.jsonl", b"{}"), IntegrityError, "release.mismatch"),
    "another run's chain": (moved("chain.jsonl"), IntegrityError, "signature.invalid"),
    "no chain": (lambda home: (home.runs[0] / "chain.jsonl").unlink(), ConfigError, "file.unreadable"),
    "a chain without what was seen of it": (lambda h: h.heads(head=OTHER, events=3), LineageError, "chain.other-head"),
    "a chain without its end": (overwritten("chain.jsonl", b""), LineageError, "chain.other-head"),
    "a chain without a hunt": (lambda home: home.chain(), IntegrityError, "quality.other-model"),
    "a hunt of another model": (lambda home: home.chain(OTHER), IntegrityError, "quality.other-model"),
    "no report": (lambda home: (home.runs[0] / SUSPICION).unlink(), LineageError, "hunt.none-kept"),
    "a report that is none": (overwritten(SUSPICION, b"{}"), IntegrityError, "sealed.not-authentic"),
    "another run's report": (moved(SUSPICION), IntegrityError, "sealed.not-authentic"),
    "a report to another party": (lambda home: home.report(key=bytes(32)), IntegrityError, "sealed.not-authentic"),
    "a report of another model": (lambda home: home.report(model=OTHER), IntegrityError, "quality.other-model"),
    "a share of nobody's": (share(0.1, 0.0, 0.2, party="nobody"), IntegrityError, "quality.not-a-share"),
    "a share below zero": (share(0.1, -0.1, 0.2), IntegrityError, "quality.not-a-share"),
    "a share above one": (share(0.9, 0.8, 1.1), IntegrityError, "quality.not-a-share"),
    "a share above its interval": (share(0.3, 0.1, 0.2), IntegrityError, "quality.not-a-share"),
    "a share below its interval": (share(0.0, 0.1, 0.2), IntegrityError, "quality.not-a-share"),
    "a share that is no number": (share(math.nan, 0.0, 1.0), IntegrityError, "quality.not-a-share"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_run_that_does_not_verify_is_refused_by_name(what: str, home: Home) -> None:
    damage, family, code = DAMAGE[what]
    home.told(home.runs[0])
    damage(home)
    with refused(family, code):
        home.told(home.runs[2], home.runs[0])
    if code not in {"hunt.none-kept", "run.unknown"} and what != "no record":
        with refused(family, code):
            home.told()


def test_an_honest_hunt_beside_another_is_told(home: Home) -> None:
    home.chain(OTHER, home.record.model)
    assert hunted_run(home.alpha, home.runs[0]).linked.model == home.record.model


def test_a_repair_that_the_plan_does_not_name_is_refused(home: Home) -> None:
    repair = home.course.worlds[1].plan.repair or None
    home.link(repair=repair)
    with refused(IntegrityError, "quality.other-model"):
        home.told(home.runs[0])


def test_another_partys_folder_is_not_ours(home: Home) -> None:
    beta = home.world.parties["beta"]
    sealed = home.world.suspicion["beta"]
    (home.runs[0] / SUSPICION).write_bytes(sealed)
    with refused(IntegrityError, "sealed.not-authentic"):
        home.told(home.runs[0])
    theirs = Identity(home.alpha.folder, "beta", beta.signer, beta.data_key)
    assert isinstance(kept_report(theirs, home.world.manifest.run), SuspicionReport)


def test_a_party_is_told_of_itself_alone_where_the_plan_says_so(tmp_path: Path) -> None:
    told = history_of(Course(tmp_path / "alpha", change=lambda plan: plan).alpha)
    assert [set(run.wrong_labels) for run in told.runs] == [{"alpha"}]
    assert told.contributors == ("alpha", "beta", "gamma")
