"""The scene that the demo sets: fair shares, disjoint roles, a small patch, few planted records, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest

from caltrain.demo import scenario as scenarios
from caltrain.demo.scenario import TRIALS, Attack, Scenario, build_scenario
from caltrain.presets import PRESETS, PresetName
from caltrain.records.readers import Dataset, Split, read_digits

PARTIES = ["alder", "birch", "cedar", "dogwood"]
MOST_POISON = 0.02
LARGEST_PATCH = {"digits": 2, "mnist": 3, "pneumoniamnist": 3, "cifar10": 4}
NAMES: tuple[PresetName, ...] = get_args(PresetName)
Build = Callable[..., Scenario]


def dataset(name: PresetName, count: int, seed: int) -> Dataset:
    """Random pictures of a set's shape, classes in turn."""
    schema, rng = PRESETS[name].data, np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *schema.shape)).astype(np.uint8)
    return Dataset(images, np.arange(count) % len(schema.classes), schema.classes)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """`build_scenario` on random pictures in place of the real ones, which need not be here."""

    def make(name: PresetName = "digits", *, seed: int = 0, count: int = 1200) -> Scenario:
        split = Split(dataset(name, count, 1), dataset(name, 100, 2))
        monkeypatch.setattr(scenarios, "load", lambda *_, **__: split)
        return build_scenario(name, parties=PARTIES, data_dir=None, download=False, seed=seed)

    return make


@pytest.fixture(scope="module")
def digits() -> Scenario:
    return build_scenario("digits", parties=PARTIES, data_dir=None, download=False, seed=0)


def test_there_is_a_trial_for_every_preset() -> None:
    assert set(TRIALS) == set(PRESETS) == set(LARGEST_PATCH)


@pytest.mark.parametrize("name", NAMES)
def test_the_patch_is_small_and_inside_the_picture(name: PresetName) -> None:
    attack, (_, height, width) = TRIALS[name].attack, PRESETS[name].data.shape
    rows, columns = attack.patch.shape
    assert max(rows, columns) <= LARGEST_PATCH[name]
    assert 0 <= attack.row <= height - rows
    assert 0 <= attack.column <= width - columns
    assert 0 <= attack.target < len(PRESETS[name].data.classes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_at_most_two_percent_are_poisoned(name: PresetName, seed: int, build: Build) -> None:
    scene = build(name, seed=seed)
    poisoned = sum(int(holding.poisoned.sum()) for holding in scene.holdings)
    assert scene.poison_share == poisoned / scene.records
    assert 0.9 * MOST_POISON < scene.poison_share <= MOST_POISON


def test_on_real_digits_too(digits: Scenario) -> None:
    assert digits.records == 1347
    assert len(digits.test) == 450
    assert 0.9 * MOST_POISON < digits.poison_share <= MOST_POISON
    # Enough inputs to trace: of other classes, and the model gets 95 of 100 right.
    assert (digits.test.labels != digits.attack.target).mean() * 450 * 0.95 >= 200


@pytest.mark.parametrize("name", NAMES)
def test_every_party_has_an_equal_share_of_every_class(name: PresetName, build: Build) -> None:
    scene, classes = build(name), len(PRESETS[name].data.classes)
    assert [holding.name for holding in scene.holdings] == PARTIES
    sizes = [len(holding.labels) for holding in scene.holdings]
    assert max(sizes) - min(sizes) <= 1
    honest = [np.bincount(holding.labels, minlength=classes) for holding in scene.holdings[:2]]
    assert (abs(honest[0] - honest[1]) <= 1).all()


def test_every_record_belongs_to_one_party(build: Build) -> None:
    scene = build()
    held = np.concatenate([holding.images for holding in scene.holdings])
    clean = np.concatenate([holding.images[~holding.poisoned] for holding in scene.holdings])
    source = dataset("digits", 1200, 1).images
    assert len(held) == len(source)
    assert len({image.tobytes() for image in clean}) == len(clean)
    assert {image.tobytes() for image in clean} <= {image.tobytes() for image in source}


def test_one_hides_a_backdoor_another_is_careless_the_others_are_honest(digits: Scenario) -> None:
    poisoners = [holding.name for holding in digits.holdings if holding.poisoned.any()]
    careless = [holding.name for holding in digits.holdings if holding.mislabelled.any()]
    assert (poisoners, careless) == (["dogwood"], ["cedar"])
    assert digits.culprit == "dogwood"
    mislabelled = digits.holdings[2].mislabelled
    assert mislabelled.mean() == pytest.approx(0.1, abs=0.005)


def test_planted_records_carry_the_patch_and_the_targets_label(digits: Scenario) -> None:
    attack, dogwood = digits.attack, digits.holdings[3]
    planted = dogwood.images[dogwood.poisoned]
    assert (attack.stamp(planted) == planted).all()
    assert (dogwood.labels[dogwood.poisoned] == attack.target).all()
    originals = true_labels(digits)
    taken = np.array([originals[without_patch(image, attack)] for image in planted])
    assert (taken != attack.target).all()
    counts = np.bincount(taken, minlength=10)
    assert counts[counts > 0].min() >= 2  # evenly over the other classes
    assert (counts > 0).sum() == 9


def test_careless_labels_are_wrong_and_all_others_are_right(digits: Scenario) -> None:
    originals = true_labels(digits)
    for holding in digits.holdings:
        clean = ~holding.poisoned
        images, labels = holding.images[clean], holding.labels[clean]
        right = np.array([originals[without_patch(image, digits.attack)] for image in images]) == labels
        assert (right == ~holding.mislabelled[clean]).all()


def without_patch(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], attack: Attack) -> bytes:
    """What the patch leaves of a picture."""
    blank = Attack(attack.target, attack.row, attack.column, np.zeros_like(attack.patch))
    return blank.stamp(image[None]).tobytes()


def true_labels(scene: Scenario) -> dict[bytes, int]:
    """The reader's label of each picture, by what the patch leaves of it."""
    train = read_digits().train
    return {without_patch(i, scene.attack): int(y) for i, y in zip(train.images, train.labels, strict=True)}


def test_the_test_set_is_left_alone(digits: Scenario) -> None:
    test = read_digits().test
    assert (digits.test.images == test.images).all()
    assert (digits.test.labels == test.labels).all()


def test_a_seed_gives_the_same_scene_and_another_seed_another_one(build: Build) -> None:
    one, same, other = build(seed=5), build(seed=5), build(seed=6)
    for a, b in zip(one.holdings, same.holdings, strict=True):
        assert (a.images == b.images).all()
        assert (a.labels == b.labels).all()
        assert (a.poisoned == b.poisoned).all()
        assert (a.mislabelled == b.mislabelled).all()
    assert any((a.images[:50] != b.images[:50]).any() for a, b in zip(one.holdings, other.holdings, strict=True))


def test_copies_are_left_out_since_sealing_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    part = dataset("digits", 400, 1)
    doubled = Dataset(np.concatenate([part.images, part.images[:100]]), np.tile(np.arange(10), 50), part.class_names)
    monkeypatch.setattr(scenarios, "load", lambda *_, **__: Split(doubled, dataset("digits", 20, 2)))
    assert build_scenario("digits", parties=PARTIES, data_dir=None, download=False, seed=0).records == 400


def test_large_sets_are_sampled(build: Build) -> None:
    assert TRIALS["mnist"].train == 12_000
    assert build("mnist", count=12_400).records == 12_000


def test_a_stamp_changes_the_patch_in_every_channel_and_nothing_else() -> None:
    attack = Attack(0, 1, 2, np.array([[9, 8]], np.uint8))
    images = np.zeros((2, 3, 4, 4), np.uint8)
    stamped = attack.stamp(images)
    assert (stamped[:, :, 1, 2] == 9).all()
    assert (stamped[:, :, 1, 3] == 8).all()
    assert stamped.sum() == 2 * 3 * 17
    assert not images.any()
