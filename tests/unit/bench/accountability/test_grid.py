"""The grid does each case once, goes on where it was, judges anew what changed, and reports every key."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console

from caltrain.bench.accountability import jobs, making, remedy, training
from caltrain.bench.accountability.cache import Cache
from caltrain.bench.accountability.grid import MORE, AccountabilityReport, jobs_of, rounds, run
from caltrain.bench.accountability.jobs import OURS, Job, Where, perform, sources
from caltrain.bench.accountability.making import make
from caltrain.bench.accountability.planting import BACKDOORS, CASES, case
from caltrain.bench.accountability.questions import Answer, Question
from caltrain.bench.accountability.remedy import repaired
from caltrain.bench.accountability.scene import Pool
from caltrain.bench.accountability.telling import tables
from caltrain.bench.accountability.training import Recipe
from caltrain.errors import ConfigError

KEYS = {
    *("precision_at_9", "poison_precision", "poison_recall", "contributor_accuracy", "false_accusation_rate"),
    *("cannot_tell_rate", "mislabel_average_precision", "noise_rate_error"),
}
PEERS = {"tracin", "trak", "activation-clustering", "spectral-signature", "random"}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Where:
    return Where("digits", None, 400, str(tmp_path_factory.mktemp("kept")))


@pytest.fixture(scope="module")
def report(where: Where) -> AccountabilityReport:
    """One case, in a process of its own, and its repair."""
    ticks: list[tuple[int, int]] = []
    found = run(
        where, [Job("patch", 0.05, 0)], processes=1, remedy=True, on_round=lambda done, of: ticks.append((done, of))
    )
    assert ticks == [(1, 2), (2, 2)]
    return found


def test_every_key_is_reported_for_us_and_for_the_peers(report: AccountabilityReport) -> None:
    (found,) = msgspec.to_builtins(report)["cases"]
    assert found.keys() >= KEYS
    assert found["peers"].keys() >= PEERS
    assert all(peer.keys() >= KEYS for peer in found["peers"].values())
    assert (found["case"], found["share"], found["runs"]) == ("patch", 0.05, 1)
    assert found["accuracy"] > 0.8


def test_a_table_for_people_names_every_method(report: AccountabilityReport) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables(report):
        console.print(table)
    text = console.export_text()
    assert "digits, patch 5%: 1 runs" in text
    assert all(name in text for name in (OURS, *PEERS))
    assert "labels AP" not in text
    assert "never poisoned" in text


def test_what_was_done_is_not_done_again(
    report: AccountabilityReport, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(training, "fit", again)
    monkeypatch.setattr(jobs, "judged", again)
    done = perform(where, Job("patch", 0.05, 0))
    assert done.accuracy == report.cases[0].accuracy
    with pytest.raises(AssertionError, match="done again"):
        perform(where, Job("patch", 0.05, 1))
    monkeypatch.setattr(jobs, "sources", lambda _: "other code")
    with pytest.raises(AssertionError, match="done again"):
        perform(where, Job("patch", 0.05, 0))


def test_code_is_told_apart_by_its_bytes() -> None:
    ours = sources(("bench/accountability/peer.py",))
    assert ours == sources(("bench/accountability/peer.py",)) != sources(("bench/accountability/ours.py",))
    assert len({sources((folder,)) for folder in ("accountability", "crypto")}) == 2


def test_the_usual_grid_is_every_case_once() -> None:
    found = jobs_of()
    assert [job.name for job in found] == [name for name in CASES if name not in MORE]
    assert {job.share for job in found if job.name in BACKDOORS} == {0.01, None}
    assert {job.seed for job in found} == {0}
    assert rounds(found, remedy=False) == len(found) + 1
    assert rounds(found, remedy=True) == 2 * len(found) + 1


def test_the_full_grid_has_all_shares_three_seeds_and_ten_clean_runs() -> None:
    found = jobs_of(full=True)
    assert len(found) == len(set(found))
    assert {job.name for job in found} == set(CASES)
    assert sum(job.name == "clean" for job in found) == 10
    assert {job.seed for job in found if job.name == "patch"} == {0, 1, 2}
    assert {job.share for job in found if job.name == "instance"} == {None, 0.001, 0.01, 0.05}
    assert jobs_of(cases=["patch"], shares=[0.02], seeds=2) == [Job("patch", 0.02, 0), Job("patch", 0.02, 1)]
    with pytest.raises(ConfigError, match="no case"):
        jobs_of(cases=["pach"])


class _Named:
    """Blames the records it was given."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def answer(self, question: Question) -> Answer:
        return Answer((0,), self.rows, self.rows[:0].expand(len(question.predicted), 0))

    def labels(self) -> None:
        return None


def test_a_model_without_all_poison_is_the_one_that_never_saw_it(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "recipe_of", lambda _: Recipe(width=8, epochs=6, shift=1, batch=32))
    cache = Cache(tmp_path)
    made = make(pool, case("patch", 0.1), seed=1, cache=cache)
    whole = repaired(made, _Named(torch.from_numpy(np.flatnonzero(made.scene.poisoned))), cache, {}, seed=1)
    assert whole is not None
    assert whole.repaired == whole.never_poisoned
    assert whole.left_out == made.scene.poisoned.sum()
    assert whole.poisoned.attack_success > whole.repaired.attack_success + 0.3
    monkeypatch.setattr(remedy, "learn", None)  # both are kept
    assert repaired(made, _Named(torch.from_numpy(np.flatnonzero(made.scene.poisoned))), cache, {}, seed=1) == whole


def test_nothing_is_repaired_where_nobody_planted_anything(pool: Pool, tmp_path: Path) -> None:
    made = make(pool, case("clean", None), seed=1, cache=Cache(tmp_path))
    assert repaired(made, _Named(torch.arange(3)), Cache(tmp_path), {}, seed=1) is None
