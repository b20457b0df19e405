"""Wrong labels, where it is known which are: what is suspected, and of whom."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability import labels
from caltrain.accountability.cases import Dossier, Links
from caltrain.accountability.labels import _without_own, examine
from caltrain.accountability.quality import Shares
from support.dossiers import CLASSES, Told, around, centers, unsure

RATES = (0.0, 0.1, 0.3)


def drawn(seed: int, *, records: int = 600) -> tuple[Dossier, Tensor, Tensor]:
    """A dossier, a network's probabilities for its own records, which labels are wrong.

    Wrong labels go to the next class, mostly; the network gives in to some of them.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = centers(generator)
    truth = torch.randint(CLASSES, (records,), generator=generator)
    sources = torch.arange(records) % len(RATES)
    wrong = torch.rand(records, generator=generator) < torch.tensor(RATES)[sources]
    next_one = torch.where(torch.rand(records, generator=generator) < 0.8, 1, 2)
    labels = torch.where(wrong, (truth + next_one) % CLASSES, truth)
    links = Links(around(axes[truth], records, generator, spread=1.0), labels, sources, ("a", "b", "c"))
    table = unsure(truth, generator, noise=2.0)
    gives_in = torch.rand(records, generator=generator) < 0.3
    network = unsure(torch.where(gives_in, labels, truth), generator, noise=1.0)
    return Dossier(links, (Told(table, labels, sources),)), network, wrong


def average_precision(scores: Tensor, wrong: Tensor) -> float:
    """Mean, over the wrong labels, of the share of wrong ones among those ranked as high."""
    hits = wrong[torch.argsort(scores, descending=True, stable=True)].double()
    return float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum())


@pytest.mark.parametrize("seed", range(4))
def test_wrong_labels_are_suspected_before_right_ones_and_better_than_by_one_view(seed: int) -> None:
    dossier, network, wrong = drawn(seed)
    suspicion = examine(dossier, network).suspicion
    assert suspicion.shape == wrong.shape
    assert float(suspicion.min()) >= 0
    assert float(suspicion.max()) <= 1
    found = average_precision(suspicion, wrong)
    given = dossier.links.labels[:, None]
    assert found > average_precision(1 - dossier.said.gather(1, given)[:, 0], wrong)
    assert found > average_precision(1 - network.gather(1, given)[:, 0], wrong)
    assert found > 0.8
    # What is said to be likely is so in about as many cases.
    assert float(wrong[suspicion > 0.8].float().mean()) > 0.7
    assert float(wrong[suspicion < 0.2].float().mean()) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_the_contributors_shares_of_wrong_labels_lie_in_their_intervals(seed: int) -> None:
    dossier, network, wrong = drawn(seed)
    shares = examine(dossier, network).shares
    for contributor in range(3):
        share = float(wrong[dossier.links.sources == contributor].float().mean())
        assert float(shares.low[contributor]) <= share <= float(shares.high[contributor])
    assert shares.estimate.argsort().tolist() == [0, 1, 2]


def test_a_careless_contributors_record_is_suspected_more_than_a_careful_ones_like_it() -> None:
    """Two records that look alike to all views: the rate of their contributors is what tells them apart."""
    dossier, network, _ = drawn(0)
    links = dossier.links
    labels, prints = links.labels.clone(), links.fingerprints.clone()
    table, said = dossier.said.clone(), network.clone()
    careful, careless = 0, 5  # in one fold, of contributors 0 and 2
    assert links.sources[[careful, careless]].tolist() == [0, 2]
    for row in (careful, careless):
        labels[row], prints[row] = 1, links.fingerprints[1]
        table[row] = said[row] = torch.tensor([0.3, 0.4, 0.2, 0.1])
    alike = Links(prints, labels, links.sources, links.contributors)
    suspicion = examine(Dossier(alike, (Told(table, labels, links.sources),)), said).suspicion
    assert float(suspicion[careless]) > 2 * float(suspicion[careful])


def test_wrong_labels_fall_on_other_classes_in_proportion_to_what_was_seen() -> None:
    counts = torch.tensor([[90.0, 6.0, 2.0], [1.0, 50.0, 3.0], [5.0, 5.0, 7.0]])
    expected = torch.tensor([[0.0, 0.75, 0.25], [0.25, 0.0, 0.75], [0.5, 0.5, 0.0]])
    assert torch.allclose(_without_own(counts), expected)
    assert torch.equal(_without_own(torch.ones(1, 1)), torch.zeros(1, 1)), "one class has no other"


@pytest.mark.parametrize("seed", range(4))
def test_where_wrong_labels_have_fallen_so_far_helps_to_find_the_others(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against a belief that they fall anywhere alike."""
    dossier, network, wrong = drawn(seed)
    found = average_precision(examine(dossier, network).suspicion, wrong)
    monkeypatch.setattr(labels, "_without_own", lambda counts: _without_own(torch.ones_like(counts)))
    assert found > average_precision(examine(dossier, network).suspicion, wrong)


def without_flips(dossier: Dossier, network: Tensor) -> tuple[Dossier, Tensor]:
    links = dossier.links
    table = torch.softmax(5 * F.one_hot(links.labels, CLASSES).float(), 1)
    return Dossier(links, (Told(table, links.labels, links.sources),)), table


def test_labels_that_both_views_agree_with_are_not_suspected() -> None:
    dossier, network = without_flips(*drawn(2)[:2])
    assert float(examine(dossier, network).suspicion.max()) < 0.05


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("records", [1, 2, 12])
@pytest.mark.parametrize("contributors", [1, 3])
def test_few_records_classes_and_contributors_are_examined_too(classes: int, records: int, contributors: int) -> None:
    labels, sources = torch.arange(records) % classes, torch.arange(records) % contributors
    links = Links(F.normalize(torch.randn(records, 8), dim=1), labels, sources, ("a", "b", "c")[:contributors])
    for table in (torch.full((records, classes), 1 / classes), F.one_hot(labels, classes).float()):
        found = examine(Dossier(links, (Told(table, labels, sources),)), table)
        assert bool(found.suspicion.isfinite().all())
        assert float(found.suspicion.min()) >= 0
        assert float(found.suspicion.max()) <= 1
        assert bool(found.shares.estimate.isfinite().all())


def by_the_definition(believed: Tensor, given: list[int], rates: list[float]) -> list[float]:
    """Suspicion record by record: three rounds, five wrong labels of each class taken to fall anywhere."""
    classes = range(believed.shape[1])
    flips = [[0.0 if t == y else 1 / (len(classes) - 1) for y in classes] for t in classes]
    found = [0.0] * len(given)
    for _ in range(3):
        counts = [[5 / len(classes)] * len(classes) for _ in classes]
        for row, (label, rate) in enumerate(zip(given, rates, strict=True)):
            odds = [float(believed[row, t]) * flips[t][label] * rate for t in classes]
            odds[label] = float(believed[row, label]) * (1 - rate)
            for t in classes:
                counts[t][label] += odds[t] / sum(odds)
            found[row] = 1 - odds[label] / sum(odds)
        others = [sum(counts[t]) - counts[t][t] for t in classes]
        flips = [[0.0 if t == y else counts[t][y] / others[t] for y in classes] for t in classes]
    return found


def test_suspicion_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    dossier, network, _ = drawn(3, records=60)
    links, fitted, viewed = dossier.links, [], []
    shares = torch.tensor([0.001, 0.3, 0.97])  # more careful, and more careless, than anybody is taken to be

    def out_of_fold(x: Tensor, targets: Tensor, *, decay: float) -> Tensor:
        fitted.append((x, decay))
        assert torch.equal(targets, F.one_hot(links.labels, CLASSES).float())
        return 0.5 * x[:, :CLASSES]

    def shares_of_wrong_labels(view: Tensor, given: Tensor, sources: Tensor, contributors: int) -> Shares:
        viewed.append(view)
        assert torch.equal(given, links.labels)
        assert torch.equal(sources, links.sources)
        return Shares(shares, torch.zeros(contributors), torch.ones(contributors))

    monkeypatch.setattr(labels, "out_of_fold", out_of_fold)
    monkeypatch.setattr(labels, "shares_of_wrong_labels", shares_of_wrong_labels)
    found = examine(dossier, network)
    (heard, one), (seen, other) = fitted
    assert torch.allclose(heard, dossier.said.log())
    assert torch.equal(seen, links.fingerprints)
    assert one == other == 1e-4
    # The shares are told by what never saw the labels, suspicion by the network too.
    assert torch.allclose(viewed[0], (0.5 * heard + 0.5 * seen[:, :CLASSES]).softmax(1))
    believed = (0.5 * heard + network.log()).softmax(1)
    rates = [(0.02, 0.3, 0.9)[source] for source in links.sources.tolist()]
    expected = by_the_definition(believed, links.labels.tolist(), rates)
    assert found.suspicion.tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(found.shares.estimate, shares)


def test_what_a_view_rules_out_is_unlikely_and_not_impossible() -> None:
    """A view may say 0; its logarithm is then that of one in a thousand million."""
    dossier, _, _ = drawn(2)
    links, certain = dossier.links, F.one_hot(dossier.links.labels, CLASSES).float()
    said = examine(Dossier(links, (Told(certain, links.labels, links.sources),)), certain).suspicion
    assert bool(said.isfinite().all())
    assert float(said.max()) < 0.05
