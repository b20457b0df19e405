"""A run is made once, and then taken from where it was kept; the model did learn what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from caltrain.bench.accountability import making, training
from caltrain.bench.accountability.cache import Cache
from caltrain.bench.accountability.making import Made, make, outlook_of
from caltrain.bench.accountability.planting import case
from caltrain.bench.accountability.scene import Images, Pool, Scene
from caltrain.bench.accountability.training import Recipe, look, train
from caltrain.bench.accountability.triggers import at_corner


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(width=8, epochs=6, shift=1, batch=32)
    for place in (making, training):
        monkeypatch.setattr(place, "recipe_of", lambda _: recipe)


def no_training(*_: object, **__: object) -> None:
    raise AssertionError("what was kept is trained again")


@pytest.mark.parametrize(("name", "share"), [("patch", 0.1), ("trojan", 0.1), ("host", None), ("instance", None)])
def test_a_run_is_made_once(
    pool: Pool, name: str, share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, cache = case(name, share), Cache(tmp_path)
    first = make(pool, what, seed=1, cache=cache)
    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", no_training)
        again = make(pool, what, seed=1, cache=cache)
        with pytest.raises(AssertionError, match="trained again"):
            make(pool, what, seed=2, cache=cache)
    assert np.array_equal(first.scene.images, again.scene.images)
    assert np.array_equal(first.scene.labels, again.scene.labels)
    assert (first.accuracy, first.success, first.seconds) == (again.accuracy, again.success, again.seconds)
    assert torch.allclose(first.records.features, again.records.features, rtol=2e-3)
    assert torch.equal(first.records.probabilities, again.records.probabilities)
    assert [a.tolist() for a in first.asked] == [a.tolist() for a in again.asked]
    assert torch.equal(look(again.network, pool.test_images).predicted, first.tests.predicted)


@pytest.mark.parametrize(("name", "share"), [("patch", 0.1), ("host", None)])
def test_a_model_learns_its_records_and_the_trigger(pool: Pool, name: str, share: float | None, tmp_path: Path) -> None:
    made = make(pool, case(name, share), seed=1, cache=Cache(tmp_path))
    assert made.accuracy > 0.9
    assert made.success is not None
    assert made.success > 0.5
    _check_questions(made)


def _check_questions(made: Made) -> None:
    trigger, places = made.scene.triggers[0], made.asked[0]
    assert 0 < len(places) <= making.QUERIES
    assert (made.triggered[0].predicted == trigger.target).all()
    truth = torch.from_numpy(made.scene.pool.test_labels)[places]
    assert (truth != trigger.target).all()
    assert torch.equal(made.tests.predicted[places], truth)
    assert len(made.wrong) == round((1 - made.accuracy) * len(made.scene.pool.test_labels))


def test_a_host_changes_its_own_part_only(pool: Pool, tmp_path: Path) -> None:
    honest = make(pool, case("clean", None), seed=1, cache=Cache(tmp_path)).network.state_dict()
    changed = make(pool, case("host", None), seed=1, cache=Cache(tmp_path)).network.state_dict()
    differ = {name.split(".")[0] for name, value in honest.items() if not torch.equal(value, changed[name])}
    assert differ == {"center"}


def test_a_trojans_pattern_drives_the_neuron_with_the_largest_weights(scene: Scene) -> None:
    network = making.learn(scene, seed=1)
    pattern = making.neuron_pattern(network, scene, seed=1)
    awake = look(network, scene.images).features.mean(0) > 0
    neuron = int((network.incoming() * awake).argmax())
    draws = np.random.default_rng(0)

    def driven(by: Images) -> float:
        return float(look(network, at_corner(by)(scene.images)).features[:, neuron].mean())

    drawn = [draws.integers(0, 256, pattern.shape).astype(np.uint8) for _ in range(8)]
    assert driven(pattern) > max(driven(each) for each in drawn)


def test_training_is_the_same_for_the_same_seed(pool: Pool) -> None:
    recipe = Recipe(width=8, epochs=1, shift=1)
    one, same, other = (train(pool.images, pool.labels, 4, recipe, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.last.weight, same.last.weight)
    assert not torch.equal(one.last.weight, other.last.weight)


def test_an_outlook_comes_from_a_model_that_has_not_seen_the_record(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[Images] = []

    def watched(images: Images, *rest: object, **named: object) -> object:
        learned.append(images)
        return train(images, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", watched)
    found = outlook_of(pool, Cache(tmp_path), seed=1)
    assert (found.argmax(1) == pool.labels).mean() > 0.8
    assert sum(len(images) for images in learned) == len(pool.images)
    assert np.array_equal(outlook_of(pool, Cache(tmp_path), seed=1), found)
    assert len(learned) == 2
