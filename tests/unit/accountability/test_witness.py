"""The witness against slow direct computations, and what it says of pictures drawn by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.cases import doubt
from caltrain.accountability.witness import (
    LeaveOut,
    PatchFeatures,
    WitnessBuilder,
    columns,
    draw_views,
    separation,
    targets,
    witnesses,
)
from support.dossiers import pictures

NOBODY = torch.empty(0, dtype=torch.int64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def slowly(of: PatchFeatures, images: Tensor) -> Tensor:
    """Each patch is cut out, normalised, held against each filter; then the mean of each of four cells."""
    _, _, height, width = of.filters.shape
    x = (images.double() - float(of.mean)) / float(of.scale)
    places = [(i, j) for i in range(x.shape[2] - height + 1) for j in range(x.shape[3] - width + 1)]
    maps = torch.empty(len(x), 2 * len(of.filters), x.shape[2] - height + 1, x.shape[3] - width + 1).double()
    for i, j in places:
        patch = x[:, :, i : i + height, j : j + width].flatten(1)
        away = patch - patch.mean(1, keepdim=True)
        patch = away / (away.square().mean(1, keepdim=True) + 0.01).sqrt()
        response = patch @ of.filters.flatten(1).double().T + of.bias.double()
        maps[:, :, i, j] = torch.cat((F.relu(response - of.threshold), F.relu(-response - of.threshold)), 1)

    def cells(size: int) -> list[slice]:
        return [slice(c * size // of.cells, -(-(c + 1) * size // of.cells)) for c in range(of.cells)]

    pooled = [maps[:, :, a, b].mean((2, 3)) for a in cells(maps.shape[2]) for b in cells(maps.shape[3])]
    return torch.cat((torch.stack(pooled, 2).flatten(1), torch.ones(len(x), 1).double()), 1)


@pytest.mark.parametrize("shape", [(7, 1, 8, 8), (5, 3, 9, 12), (4, 1, 6, 6), (6, 2, 4, 5), (3, 1, 2, 11)])
def test_features_are_those_of_patches_cut_out_normalised_and_filtered(shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    features = PatchFeatures.draw(images, filters=5, seed=1)
    got = features.features(images)
    assert got.shape == (shape[0], features.dims) == (shape[0], 2 * 5 * 4 + 1)
    assert torch.allclose(got.double(), slowly(features, images), atol=1e-4)
    assert float(got[:, :-1].max()) > 0, "no filter ever answered"


def test_features_of_many_pictures_are_those_of_each() -> None:
    """More than are worked on at once."""
    images = noise(300, 1, 8, 8)
    features = PatchFeatures.draw(images[:50], filters=4, seed=1)
    alone = torch.cat([features.features(each[None]) for each in images[[0, 127, 128, 299]]])
    assert torch.allclose(features.features(images)[[0, 127, 128, 299]], alone, atol=1e-5)


def test_bytes_and_floats_of_the_same_pictures_have_the_same_features() -> None:
    images = noise(20, 3, 8, 8)
    of_bytes, of_floats = (PatchFeatures.draw(each, filters=6, seed=3) for each in (images, images.float()))
    assert torch.equal(of_bytes.features(images), of_floats.features(images.float()))


def test_pictures_of_another_scale_have_the_same_features() -> None:
    """0..1 instead of 0..255: the scale is the sample's."""
    images = noise(20, 3, 8, 8).float()
    near = PatchFeatures.draw(images, filters=6, seed=3).features(images)
    assert torch.allclose(PatchFeatures.draw(images / 255, filters=6, seed=3).features(images / 255), near, atol=1e-3)


def test_the_seed_draws_the_filters() -> None:
    images = noise(20, 1, 8, 8)
    first, again, other = (PatchFeatures.draw(images, filters=6, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.filters, again.filters)
    assert not torch.equal(first.filters, other.filters)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (50, 1, 1, 1), (50, 3, 1, 1), (50, 1, 8, 8)])
def test_pictures_of_one_grey_have_finite_features(shape: tuple[int, ...]) -> None:
    flat = torch.full(shape, 77, dtype=torch.uint8)
    features = PatchFeatures.draw(flat, filters=4, seed=0)
    assert bool(features.features(flat).isfinite().all())
    assert bool(features.features(noise(*shape)).isfinite().all())


@pytest.mark.parametrize(
    ("shape", "shrinks"),
    [((5, 1, 4, 4), [1]), ((5, 1, 11, 40), [1]), ((5, 3, 12, 13), [1, 2]), ((5, 1, 24, 24), [1, 2, 4])],
)
def test_every_scale_is_looked_at_that_holds_a_whole_patch(shape: tuple[int, ...], shrinks: list[int]) -> None:
    images = noise(*shape)
    views = draw_views(images, filters=3, seed=2)
    assert [view.shrink for view in views] == shrinks
    for view in views:
        coarse = F.avg_pool2d(images.float(), view.shrink)
        assert torch.allclose(view.features(images).double(), slowly(view, coarse), atol=1e-4)


def test_features_by_several_views_stand_beside_each_other_and_teach_a_witness_each() -> None:
    images, labels, sources, _ = drawn(records=60)
    views = draw_views(images, filters=4, seed=0)
    builder = WitnessBuilder(views, contributors=3, classes=3)
    x = builder.add(images, labels, sources)
    assert len(views) == len(builder.done()) == 2
    for view, own, model in zip(views, columns(views), builder.done(), strict=True):
        assert torch.equal(x[:, own], view.features(images))
        said = model.predict(x[:, own], without=frozenset({2}), forget=None)
        left = sources != 2
        assert torch.allclose(said.double(), ridge(x[left][:, own], labels[left], x[:, own], classes=3), atol=2e-4)


def test_what_was_asked_before_is_answered_the_same() -> None:
    images, labels, sources, _ = drawn(records=60)
    witness = witnesses(images, labels, sources, classes=3, seed=0, filters=4)[0]
    rows = torch.arange(60)
    first = {without: witness.testify(rows, without=frozenset(without)) for without in ((), (0,), (1,), (0, 1))}
    for without, said in first.items():
        assert torch.equal(witness.testify(rows, without=frozenset(without)), said)
        assert not torch.equal(witness.testify(rows, without=frozenset(without), forget=rows[:30]), said)


def ridge(x: Tensor, labels: Tensor, rows: Tensor, *, classes: int) -> Tensor:
    """The regression itself, in double precision, from records."""
    x, y = x.double(), targets(labels, classes).double()
    gram = x.T @ x
    weights = torch.linalg.solve(gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y)
    return torch.softmax(4.0 * rows.double() @ weights, 1)


def drawn(seed: int = 0, *, records: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, labels, sources, what the pictures show; contributor 1 labels stripes down as across, 20 times."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (records,), generator=generator)
    sources = torch.randint(3, (records,), generator=generator)
    shown = labels.clone()
    shown[(labels == 0).nonzero().squeeze(1)[:20]] = 1
    sources[shown != labels] = 1
    return pictures(shown, generator), labels, sources, shown


@pytest.mark.parametrize("without", [frozenset(), {0}, {1}, {0, 2}])
@pytest.mark.parametrize("forget", [None, [], [3], list(range(40, 90))])
def test_leaving_out_is_a_regression_on_the_records_that_are_left(without: set[int], forget: list[int] | None) -> None:
    images, labels, sources, _ = drawn()
    features = PatchFeatures.draw(images, filters=6, seed=0)
    witness, _ = witnesses(images, labels, sources, classes=3, seed=0, filters=6)
    builder = WitnessBuilder([features], contributors=3, classes=3)
    x = torch.cat([builder.add(images[i : i + 77], labels[i : i + 77], sources[i : i + 77]) for i in range(0, 300, 77)])
    assert torch.allclose(x, features.features(images), atol=1e-5)

    left = ~torch.isin(sources, torch.tensor(sorted(without), dtype=torch.int64))
    lost = None
    if forget is not None:
        kept = torch.tensor([row for row in forget if left[row]], dtype=torch.int64)
        lost = x[kept], labels[kept]
        left[kept] = False
    (model,) = builder.done()
    said = model.predict(x[:50], without=frozenset(without), forget=lost)
    assert torch.allclose(said.double(), ridge(x[left], labels[left], x[:50], classes=3), atol=2e-4)

    # The witness has drawn its filters from a sample in another order: it is held against its own features.
    rows = torch.arange(50)
    own = witness.features(torch.arange(300))
    told = witness.testify(
        rows, without=frozenset(without), forget=None if forget is None else torch.tensor(forget, dtype=torch.int64)
    )
    assert torch.allclose(told.double(), ridge(own[left], labels[left], own[rows], classes=3), atol=2e-4)


def test_a_witness_without_a_contributor_does_not_depend_on_its_records() -> None:
    images, labels, sources, _ = drawn()
    features = PatchFeatures.draw(images, filters=6, seed=0)

    def said(labels: Tensor) -> Tensor:
        builder = WitnessBuilder([features], contributors=3, classes=3)
        x = builder.add(images, labels, sources)
        (model,) = builder.done()
        return model.predict(x, without=frozenset({1}), forget=None)

    lied = torch.where(sources == 1, (labels + 1) % 3, labels)
    assert torch.equal(said(labels), said(lied))


def test_without_anybody_every_class_is_as_likely() -> None:
    images, labels, sources, _ = drawn(records=60)
    witness = witnesses(images, labels, sources, classes=4, seed=0, filters=4)[0]
    said = witness.testify(torch.arange(60), without=frozenset({0, 1, 2}))
    assert torch.allclose(said, torch.full((60, 4), 0.25))


def test_a_contributor_without_records_may_be_left_out() -> None:
    images, labels, sources, _ = drawn(records=60)
    witness = witnesses(images, labels, sources, classes=3, seed=0, filters=4)[0]
    rows = torch.arange(60)
    assert torch.equal(witness.testify(rows, without=frozenset({7})), witness.testify(rows))
    assert witness.testify(NOBODY).shape == (0, 3)


@pytest.mark.parametrize("seed", range(3))
def test_pictures_that_contradict_their_labels_are_doubted_and_others_are_not(seed: int) -> None:
    images, labels, sources, shown = drawn(seed)
    witness = witnesses(images, labels, sources, classes=3, seed=seed, filters=16)[0]
    wrong = shown != labels
    for heard in (
        witness.testify(torch.arange(300), without=frozenset({1})),
        witness.testify(torch.arange(300), forget=wrong.nonzero().squeeze(1)),
    ):
        doubts = doubt(heard, labels)
        assert float((doubts[wrong] > 0).float().mean()) >= 0.95
        assert float((doubts[~wrong] > 0).float().mean()) <= 0.05
        assert torch.allclose(heard.sum(1), torch.ones(300), atol=1e-5)


def test_targets_are_one_more_for_the_label_and_zero_on_average() -> None:
    assert torch.allclose(targets(torch.tensor([1, 0]), 2), torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))
    assert torch.allclose(targets(torch.arange(5), 5).sum(1), torch.zeros(5), atol=1e-6)


def test_singular_sums_are_solved_too() -> None:
    """One record tells little, but what it tells is a number."""
    x, y = torch.tensor([[1.0, 2.0, 1.0]]), targets(torch.tensor([1]), 2)
    model = LeaveOut((x.T @ x)[None], (x.T @ y)[None])
    assert torch.allclose(
        model.predict(x, without=frozenset(), forget=None)[0], torch.tensor([0.018, 0.982]), atol=2e-3
    )


def test_separation_is_how_often_one_ranks_above_the_other_by_a_fit_to_the_other_half() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn((90, 4), generator=generator), torch.randn((60, 4), generator=generator)
    shifted = one + torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert separation(one + 9, other) == 1.0
    assert 0.35 < separation(one, other) < 0.65, "by a fit to the same records it would be more"
    assert 0.65 < separation(shifted, other) < 0.9
    assert separation(other, shifted) == pytest.approx(separation(shifted, other), abs=0.05)


def test_the_witness_tells_apart_what_looks_different_and_not_what_looks_alike() -> None:
    images, labels, sources, _ = drawn()
    images[200:] = noise(100, 1, 12, 12)
    witness = witnesses(images, labels, sources, classes=3, seed=0, filters=8)[0]
    assert witness.tells_apart(torch.arange(200, 300), torch.arange(100)) > 0.9
    assert witness.tells_apart(torch.arange(0, 200, 2), torch.arange(1, 200, 2)) < 0.65
