"""Groups, names and properties: counted rightly, found where they are, and guessed where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.attacks.labels import (
    Groups,
    assess_labels,
    gradient_groups,
    gradients,
    head_groups,
    in_majority,
    ir_groups,
    label_groups,
    property_accuracy,
    reduced,
    share_named,
)
from caltrain.exposure.material import Material
from caltrain.exposure.subject import Cut, Defence, Subject, subject_of, undefended
from caltrain.models.layers import Conv, Flatten, Linear
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec, embedding_layer
from caltrain.models.weights import state_of
from caltrain.records.schema import DataSchema
from caltrain.training.seeds import initialise
from support.samples import refused

CLASSES = ("cat", "dog", "owl")
DATA = DataSchema(shape=(1, 6, 6), classes=CLASSES, mean=(0.5,), std=(0.25,))
MODEL = ModelSpec(
    layers=(Conv(filters=4), Conv(filters=4), Flatten(), Linear(units=8, activation="relu"), Linear(units=3))
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    network = build(MODEL, input_shape=DATA.shape)
    initialise(network, bytes(32))
    return subject_of(MODEL, DATA, state_of(network))


def drawn(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed))


def balanced(count: int) -> Tensor:
    return torch.arange(count) % len(CLASSES)


def material(*, labelled: bool) -> Material:
    """120 pictures for each side, whose class is a bright row if `labelled`, else nothing that can be seen."""
    (own, own_labels), (others, labels) = (_side(seed, labelled=labelled) for seed in (1, 2))
    return Material(own, own_labels, others, labels, candidates=others)


def _side(seed: int, *, labelled: bool) -> tuple[Tensor, Tensor]:
    pictures, labels = drawn(120, *DATA.shape, seed=seed), balanced(120)
    pictures *= drawn(120, 1, 1, 1, seed=seed + 10)
    if labelled:
        pictures[torch.arange(120), 0, 2 * labels] = 1.0
    return pictures, labels


def by_known(groups: Groups) -> dict[int, float]:
    return {named.known: named.right.value for named in groups.named}


# --- groups ---------------------------------------------------------------------------------------------------------


def test_majorities_and_names_are_counted_rightly() -> None:
    labels, rng = np.array([0, 0, 0, 1, 1, 1]), np.random.default_rng(0)
    assert in_majority(labels, labels) == 6
    assert in_majority(np.zeros(6, np.int64), labels) == 3
    assert in_majority(np.array([0, 0, 1, 1, 1, 1]), labels) == 5
    assert share_named(1 - labels, labels, known=1, rng=rng) == 1
    assert share_named(np.arange(6), labels, known=1, rng=rng) == 0, "what nobody names is not named rightly"


def test_of_a_small_class_at_most_half_are_known_so_that_others_are_left() -> None:
    labels, rng = np.array([0, 0, 1, 1]), np.random.default_rng(0)
    assert share_named(labels, labels, known=100, rng=rng) == 1


def test_groups_that_lie_apart_are_found_and_one_known_label_names_each() -> None:
    labels = balanced(60)
    rows = torch.eye(3)[labels] + 0.01 * drawn(60, 3)
    groups = label_groups(rows, labels.numpy(), classes=3)
    assert (groups.purity.value, groups.purity.n) == (1, 60)
    assert groups.floor < 0.6
    assert by_known(groups) == {1: 1.0, 5: 1.0}


def test_rows_are_compared_by_direction_so_length_hides_nothing() -> None:
    labels = balanced(60)
    rows = torch.eye(3)[labels] * (1 + 1000 * drawn(60, 1))
    assert label_groups(rows, labels.numpy(), classes=3).purity.value == 1


def test_rows_that_know_nothing_of_the_labels_give_about_the_floor() -> None:
    groups = label_groups(drawn(600, 5), balanced(600).numpy(), classes=3, known=(1, 5, 50))
    assert abs(groups.purity.value - groups.floor) < 0.05
    assert groups.purity.low <= groups.floor + 0.05
    assert list(by_known(groups)) == [1, 5, 50]
    assert all(abs(right - 1 / 3) < 0.15 for right in by_known(groups).values())


def test_rows_that_are_all_alike_are_one_group() -> None:
    groups = label_groups(torch.ones(30, 4), balanced(30).numpy(), classes=3)
    assert groups.purity.value == groups.floor == 1 / 3


def test_the_seed_decides_everything() -> None:
    rows, labels = drawn(90, 5), balanced(90).numpy()
    first, again, other = (label_groups(rows, labels, classes=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_fewer_records_than_twice_the_classes_are_refused() -> None:
    assert label_groups(drawn(6, 2), balanced(6).numpy(), classes=3).purity.n == 6
    with pytest.raises(DataError, match=r"^exposure\.too-few: "):
        label_groups(drawn(5, 2), balanced(5).numpy(), classes=3)


# --- probes ---------------------------------------------------------------------------------------------------------


def test_a_property_that_is_in_the_rows_is_told_and_one_that_is_not_is_guessed() -> None:
    own, others = drawn(200, 6, seed=1), drawn(200, 6, seed=2)
    seen = property_accuracy(own, own[:, 3] > 0.5, others, others[:, 3] > 0.5)
    assert seen.right.value > 0.95
    assert seen.floor < 0.6
    coin = [drawn(200, 1, seed=seed)[:, 0] > 0.5 for seed in (3, 4)]
    unseen = property_accuracy(own, coin[0], others, coin[1])
    assert abs(unseen.right.value - 0.5) < 0.15


def test_the_floor_is_the_most_frequent_answer() -> None:
    rows = drawn(8, 2)
    found = property_accuracy(rows, [0] * 8, rows, [0, 0, 0, 0, 0, 0, 1, 2])
    assert (found.right.value, found.floor) == (0.75, 0.75), "whose own are all alike says just that"


# --- what crosses ---------------------------------------------------------------------------------------------------


def test_planes_are_averaged_to_at_most_so_many_numbers() -> None:
    large = drawn(2, 128, 32, 32)
    rows = reduced((large,))
    assert rows.shape == (2, 128 * 5 * 5)
    assert torch.allclose(rows.reshape(2, 128, 25).mean(2), large.mean((2, 3)), atol=0.02)
    small = drawn(2, 4, 6, 6)
    assert torch.equal(reduced((small,)), small.flatten(1))
    assert reduced((drawn(2, 5000, 2, 2),)).shape == (2, 5000)


def test_the_gradient_at_a_cut_is_what_the_chain_rule_gives(subject: Subject) -> None:
    """Behind the last cut is one linear layer: (softmax - label) times its weights; one ReLU layer before, its mask."""
    pictures, labels = drawn(5, *DATA.shape), torch.tensor([0, 1, 2, 0, 1])
    assert embedding_layer(MODEL) == 4
    head = Cut(subject, 4)
    wrong = torch.softmax(subject.logits(pictures), 1) - torch.eye(3)[labels]
    by_hand = wrong @ subject.module.get_parameter("4.linear.weight")
    assert torch.allclose(gradients(head, pictures, labels)[0], by_hand, atol=1e-7)
    through = by_hand * (head.ir(pictures)[0] > 0) @ subject.module.get_parameter("3.linear.weight")
    (found,) = gradients(Cut(subject, 2), pictures, labels)
    assert torch.allclose(found.flatten(1), through, atol=1e-7)


def test_gradients_give_groups_away_even_where_pictures_have_nothing_to_do_with_labels(subject: Subject) -> None:
    groups = gradient_groups(Cut(subject, 4), material(labelled=False), seed=0)
    assert groups.purity.value > 0.95
    assert by_known(groups)[1] > 0.95
    assert head_groups(subject, material(labelled=False), seed=0) == groups, "what leaves a HeadNet of one layer"


def test_a_gradient_that_overflows_is_refused() -> None:
    """The IRs of this model are finite, its answers are not."""
    network = build(MODEL, input_shape=DATA.shape)
    initialise(network, bytes(32))
    state = state_of(network)
    state["4.linear.weight"] *= 1e38
    state["3.linear.bias"] += 100
    with refused(IntegrityError, "exposure.not-finite"):
        gradient_groups(Cut(subject_of(MODEL, DATA, state), 2), material(labelled=False), seed=0)


def test_an_assessment_tells_what_the_ir_tells(subject: Subject) -> None:
    told: list[tuple[int, int]] = []
    found = assess_labels(
        Cut(subject, 1), material(labelled=True), seed=0, on_step=lambda done, of: told.append((done, of))
    )
    assert found.probe.right.value > 0.9
    assert found.bright.right.value > 0.9
    assert found.probe.right.n == found.bright.right.n == found.purity.n == 120
    assert found.probe.floor == found.rest.floor == 1 / 3
    groups = ir_groups(Cut(subject, 1), material(labelled=True), seed=0)
    assert groups == Groups(purity=found.purity, floor=found.floor, named=found.named)
    assert found.gradients == gradient_groups(Cut(subject, 1), material(labelled=True), seed=0) != groups
    answers = subject.logits(material(labelled=True).targets).argmax(1)
    assert found.rest.right.value == pytest.approx(float((answers == balanced(120)).float().mean()))
    assert told == [(n, 4) for n in (1, 2, 3, 4)]


def test_where_nothing_crosses_nothing_is_told(subject: Subject) -> None:
    silent: Defence = lambda live: tuple(torch.zeros_like(x) for x in undefended(live))  # noqa: E731
    found = assess_labels(Cut(subject, 1, silent), material(labelled=True), seed=0)
    assert found.probe.right.value <= 0.4
    assert found.bright.right.value <= 0.6
    assert found.purity.value == found.floor == pytest.approx(1 / 3)
