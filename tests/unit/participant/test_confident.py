"""Confident learning at the party: what cleanlab makes of the enclave's predictions and the party's own labels."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from caltrain.accountability.cases import Dossier, Links
from caltrain.accountability.labels import examine
from caltrain.boundary.sealed import SuspicionReport, seal_for
from caltrain.errors import IntegrityError
from caltrain.participant import confident
from caltrain.participant.confident import Confident, confident_learning
from caltrain.participant.hunt import fetch_plan, fetch_report, kept_plan, kept_report
from caltrain.participant.identity import Identity, create_identity
from caltrain.participant.receive import SUSPICION, run_folder
from caltrain.participant.seal import seal_records, shard_path
from caltrain.records.schema import DataSchema
from support.courses import Course
from support.dossiers import CLASSES, Told, around, centers, unsure
from support.samples import quick, refused
from support.scripted_host import ScriptedHost

filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
RUN, MODEL = "ab" * 16, "sha256:" + "0" * 64
SCHEMA = DataSchema(shape=(1, 1, 4), classes=("a", "b", "c", "d"))
RECORDS = 200
Rows = NDArray[np.float16]


@cache
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three contributors' labels (3 RECORDS,), the hunt's view of them (3 RECORDS, C), which of them are wrong."""
    generator = torch.Generator().manual_seed(5)
    axes = centers(generator)
    truth = torch.randint(CLASSES, (3 * RECORDS,), generator=generator)
    sources = torch.arange(3).repeat_interleave(RECORDS)
    wrong = torch.rand(len(truth), generator=generator) < torch.tensor([0.0, 0.25, 0.05])[sources]
    labels = torch.where(wrong, (truth + 1) % CLASSES, truth)
    order = torch.randperm(len(truth), generator=generator)  # as a pool is in
    links = Links(
        around(axes[truth], len(truth), generator, spread=0.9)[order], labels[order], sources[order], tuple("abc")
    )
    table = unsure(truth, generator, noise=1.5)[order]
    found = examine(Dossier(links, (Told(table, links.labels, links.sources),)), table)
    return labels, found.view[order.argsort()], wrong


class Party:
    """The second of them: its records sealed in four shards, its report beside them."""

    def __init__(self, folder: Path) -> None:
        own = slice(RECORDS, 2 * RECORDS)
        labels, view, wrong = (each[own].numpy() for each in drawn())
        self.labels, self.view, self.wrong = labels, view.astype(np.float16), wrong
        self.identity: Identity = create_identity(folder, "birch")
        images = np.random.default_rng(0).integers(0, 256, (RECORDS, 1, 1, 4)).astype(np.uint8)
        sealed = seal_records(self.identity, SCHEMA, images, labels, shard_records=60)
        self.row = {
            (h.shard, leaf): row
            for h, rows in zip(sealed.headers, sealed.rows, strict=True)
            for leaf, row in enumerate(rows)
        }
        self.rows = {h.shard: list(rows) for h, rows in zip(sealed.headers, sealed.rows, strict=True)}
        self.report = self.reported({shard: self.view[rows] for shard, rows in self.rows.items()})

    def reported(self, view: dict[str, Rows]) -> SuspicionReport:
        """Sealed by the enclave, opened by the party."""
        report = SuspicionReport(
            model=MODEL, scores={}, out_of_fold={shard: rows.tobytes() for shard, rows in view.items()}
        )
        path = run_folder(self.identity, RUN) / SUSPICION
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(seal_for(self.identity.data_key, "suspicion/v1", report, context=RUN))
        return kept_report(self.identity, RUN)

    def asked(self, report: SuspicionReport | None = None) -> Confident:
        """What it is told."""
        return confident_learning(self.identity, report or self.report, lambda: SCHEMA)

    def edited(self, raw: bytes) -> SuspicionReport:
        """With other predictions for the first shard."""
        first = next(iter(self.rows))
        return msgspec.structs.replace(self.report, out_of_fold=self.report.out_of_fold | {first: raw})


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Party:
    return Party(tmp_path_factory.mktemp("party") / "birch")


def test_planted_wrong_labels_are_found_from_the_sealed_report(party: Party) -> None:
    told = party.asked()
    rows = [party.row[s.shard, s.leaf] for s in told.wrong]
    assert (told.outcome, told.why, told.records) == ("found", "", RECORDS)
    assert party.wrong[rows].mean() > 0.9
    assert party.wrong[rows].sum() > 0.9 * party.wrong.sum()
    assert told.share == round(len(rows) / RECORDS, 3) == pytest.approx(party.wrong.mean(), abs=0.04)
    doubt = [1 - float(party.view[row, party.labels[row]]) for row in rows]
    assert [s.score for s in told.wrong] == pytest.approx(doubt, abs=1e-3)
    assert doubt == sorted(doubt, reverse=True)


def test_it_is_what_cleanlab_says_of_these_labels_and_predictions(party: Party) -> None:
    expected = filters.find_label_issues(party.labels, party.view.astype(np.float32), n_jobs=1)
    assert {party.row[s.shard, s.leaf] for s in party.asked().wrong} == set(expected.nonzero()[0].tolist())


def test_labels_go_by_shard_and_leaf_in_whatever_order_the_report_has_the_shards(party: Party) -> None:
    turned = dict(reversed(party.report.out_of_fold.items()))
    told = party.asked(msgspec.structs.replace(party.report, out_of_fold=turned))
    assert set(told.wrong) == set(party.asked().wrong)


def test_records_that_were_left_out_are_in_no_figure_and_move_no_other(party: Party) -> None:
    first = next(iter(party.rows))
    view = {shard: party.view[rows] for shard, rows in party.rows.items()}
    view[first].view(np.uint16)[:7] = 0xFFFF
    told = party.asked(party.reported(view))
    assert told.records == RECORDS - 7
    assert not [s for s in told.wrong if s.shard == first and s.leaf < 7]
    kept = np.array([(shard, leaf) not in {(first, n) for n in range(7)} for shard, leaf in party.row])
    rows = np.array(list(party.row.values()))[kept]
    issues = filters.find_label_issues(party.labels[rows], party.view[rows].astype(np.float32), n_jobs=1)
    assert {party.row[s.shard, s.leaf] for s in told.wrong} == set(rows[issues].tolist())


# --- nothing to say ---------------------------------------------------------------------------------------------------


def unasked() -> DataSchema:
    raise AssertionError("nobody needed the schema")


def test_a_report_without_predictions_is_told_as_such(party: Party) -> None:
    without = msgspec.structs.replace(party.report, out_of_fold={})
    told = confident_learning(party.identity, without, unasked)
    assert (told.outcome, told.share, told.wrong) == ("no-predictions", None, ())


def test_a_report_of_an_older_version_still_opens(party: Party) -> None:
    older = msgspec.to_builtins(msgspec.structs.replace(party.report, out_of_fold={}), builtin_types=(bytes,))
    del older["out_of_fold"]
    assert msgspec.convert(older, SuspicionReport).out_of_fold == {}


def test_predictions_that_the_enclave_could_not_work_out_are_told_as_such(party: Party) -> None:
    unknown = {shard: b"\xff" * (2 * CLASSES * len(rows)) for shard, rows in party.rows.items()}
    told = party.asked(msgspec.structs.replace(party.report, out_of_fold=unknown))
    assert (told.outcome, told.records, told.share) == ("no-predictions", 0, None)


def test_without_cleanlab_a_line_says_how_to_install_it(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    told = confident_learning(party.identity, party.report, unasked)
    assert (told.outcome, told.share) == ("not-installed", None)
    assert "pip install 'caltrain[accountability]'" in told.why


def test_a_shard_that_the_party_does_not_keep_any_more_is_named(tmp_path: Path) -> None:
    party = Party(tmp_path / "birch")
    gone = list(party.rows)[2]
    shard_path(party.identity, gone).unlink()
    told = party.asked()
    assert (told.outcome, told.share) == ("no-labels", None)
    assert gone in told.why


def test_a_shard_of_ours_that_is_damaged_or_of_another_schema_is_refused(tmp_path: Path) -> None:
    party = Party(tmp_path / "birch")
    path = shard_path(party.identity, next(iter(party.rows)))
    other = msgspec.structs.replace(SCHEMA, classes=("b", "a", "c", "d"))
    with refused(IntegrityError, "shard.damaged"):
        confident_learning(party.identity, party.report, lambda: other)
    path.write_bytes(path.read_bytes()[:-1])
    with refused(IntegrityError, "shard.damaged"):
        party.asked()


def test_classes_beyond_what_cleanlab_has_room_for_are_not_computed(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confident, "_MOST_CLASSES", CLASSES)
    assert party.asked().outcome == "found"
    monkeypatch.setattr(confident, "_MOST_CLASSES", CLASSES - 1)
    assert party.asked().outcome == "not-computable"


@pytest.mark.parametrize("error", [ValueError, IndexError, ZeroDivisionError])
def test_cleanlab_that_fails_fails_nothing_else(
    error: type[Exception], party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_given: object, **_more: object) -> None:
        raise error("cannot")

    monkeypatch.setattr(filters, "find_label_issues", fails)
    told = party.asked()
    assert (told.outcome, told.share) == ("not-computable", None)


@quick
@given(st.data())
def test_few_records_and_classes_without_any_end_in_an_outcome(data: st.DataObject) -> None:
    records, classes = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=records, max_size=records)), np.int64)
    spread, seed = data.draw(st.sampled_from((0.01, 0.3, 3.0))), data.draw(st.integers(0, 99))
    view = np.random.default_rng(seed).dirichlet(np.full(classes, spread), records).astype(np.float32)
    places = np.stack((np.zeros(records, np.int64), np.arange(records)), 1)
    told = confident._judged(confident._Own(places, labels, view), ["cd" * 16])
    if len(set(labels.tolist())) > 1:
        assert told.outcome == "found"
    else:
        assert (told.outcome, told.why) == ("not-computable", "all our records are of one class")
    assert len(told.wrong) <= records


# --- a report that no honest enclave makes ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2 * CLASSES * 60 - 2, 2 * CLASSES * 60 + 2, 2 * CLASSES * 61, 2 * 60])
def test_predictions_of_another_number_of_records_or_classes_are_refused(length: int, party: Party) -> None:
    with refused(IntegrityError, "hunt.other-records"):
        party.asked(party.edited(bytes(length)))


ODD: dict[str, list[float]] = {
    "NaN": [0.5, np.nan, 0.25, 0.25],
    "infinity": [0.5, np.inf, 0, 0],
    "both infinities": [np.inf, -np.inf, 0.5, 0.5],
    "below zero": [0.75, -0.25, 0.25, 0.25],
    "above one": [1.5, -0.5, 0, 0],
    "sum below one": [0.25, 0.25, 0.25, 0.24],
    "sum above one": [0.25, 0.25, 0.25, 0.26],
    "nothing": [0, 0, 0, 0],
}


@pytest.mark.parametrize("row", ODD)
def test_what_is_no_share_of_one_is_refused(row: str, party: Party) -> None:
    view = party.view[next(iter(party.rows.values()))].copy()
    view[17] = ODD[row]
    with refused(IntegrityError, "hunt.not-probabilities"):
        party.asked(party.edited(view.tobytes()))


def test_a_record_is_known_in_all_classes_or_in_none(party: Party) -> None:
    view = party.view[next(iter(party.rows.values()))].copy()
    view.view(np.uint16)[17, 1:] = 0xFFFF
    with refused(IntegrityError, "hunt.not-probabilities"):
        party.asked(party.edited(view.tobytes()))


@quick
@given(
    st.lists(
        st.sampled_from((b"\xff" * 8, b"\0\x3c" + bytes(6))) | st.binary(min_size=8, max_size=8), min_size=3, max_size=3
    ).map(b"".join)
)
def test_any_bytes_are_probabilities_unknown_or_refused(raw: bytes) -> None:
    rows = np.frombuffer(raw, "<u2").reshape(3, 4)
    known = (rows != 0xFFFF).any(1)
    shares = rows[known].view("<f2").astype(np.float64)
    if bool(((shares >= 0) & (shares <= 1)).all()) and bool((np.abs(shares.sum(1) - 1) < 1e-3).all()):
        assert np.array_equal(confident._decoded("cd" * 16, raw, records=3, classes=4)[0], known)
    else:
        with refused(IntegrityError, "hunt.not-probabilities"):
            confident._decoded("cd" * 16, raw, records=3, classes=4)


@quick
@given(classes=st.sampled_from((2, 10, 1000, 10_000)), sharp=st.floats(0, 8), seed=st.integers(0, 999))
def test_what_float16_makes_of_probabilities_is_taken(classes: int, sharp: float, seed: int) -> None:
    view = (torch.randn((2, classes), generator=torch.Generator().manual_seed(seed)) * sharp).softmax(1).half().numpy()
    known, found = confident._decoded("cd" * 16, view.tobytes(), records=2, classes=classes)
    assert known.all()
    assert np.array_equal(found, view.astype(np.float32))


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_party_of_a_run_looks_with_the_plan_of_that_run_before_the_release_and_later(tmp_path: Path) -> None:
    course = Course(tmp_path / "alpha")
    world, alpha = course.worlds[0], course.alpha
    run = world.manifest.run
    assert kept_plan(alpha, run) == world.plan
    later = confident_learning(alpha, kept_report(alpha, run), lambda: kept_plan(alpha, run).data)
    host = ScriptedHost(world)
    with host.client() as client:
        told = confident_learning(
            alpha, fetch_report(client, alpha, seconds=1)[1], lambda: fetch_plan(client, alpha).data
        )
        assert told == later
        assert (told.outcome, told.records) == ("found", 9)
        host.edit["/v1/plan"] = lambda plan: plan.replace(b'"epochs":1', b'"epochs":2')
        with refused(IntegrityError, "rejoin.other-manifest"):
            fetch_plan(client, alpha)
