"""What is planted is what the truth says was planted, at the share that was asked for, by the seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from caltrain.bench.accountability import attacks, noise
from caltrain.bench.accountability.attacks import ATTACKS
from caltrain.bench.accountability.noise import NOISES
from caltrain.bench.accountability.planting import CASES, Case, case, plant
from caltrain.bench.accountability.scene import Pool, Scene, draw, fresh
from caltrain.bench.accountability.triggers import checker
from caltrain.errors import ConfigError

SHARE = 0.05
CLEAN_LABEL = {"sinusoidal-clean", "clean-label"}


def doubts(pool: Pool) -> noise.Outlook:
    """The small model is sure of all but the first 100 records, which it takes for the next class."""
    found = np.full((len(pool.labels), pool.classes), 0.01)
    rows = np.arange(len(pool.labels))
    found[rows, (pool.labels + (rows < 100)) % pool.classes] = 0.97
    return found


def planted(pool: Pool, name: str, share: float | None = SHARE, **options: Any) -> Scene:
    return plant(pool, case(name, share), seed=3, outlook=lambda: doubts(pool), **options)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_its_share_of_the_culprits_records_and_nothing_else(pool: Pool, name: str) -> None:
    scene = planted(pool, name)
    tampered = scene.poisoned | scene.cover
    assert tampered.sum() == round(SHARE * len(pool.labels))
    assert set(scene.owner[tampered]) == set(scene.culprits)
    assert np.array_equal(scene.images[~tampered], pool.images[~tampered])
    assert np.array_equal(scene.labels[~scene.poisoned], pool.labels[~scene.poisoned])
    assert not (scene.images[tampered] == pool.images[tampered]).all((1, 2, 3)).any()
    assert np.array_equal(scene.truth, pool.labels)
    assert set(scene.labels[scene.poisoned]) == {trigger.target for trigger in scene.triggers}
    changed = scene.labels != scene.truth
    assert np.array_equal(changed, np.zeros_like(changed) if name in CLEAN_LABEL else scene.poisoned)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trigger_stamps_a_copy(pool: Pool, name: str) -> None:
    before = pool.test_images.copy()
    for trigger in planted(pool, name).triggers:
        stamped = trigger.stamp(pool.test_images)
        assert stamped.dtype == np.uint8
        assert stamped.shape == before.shape
        assert (stamped != before).any((1, 2, 3)).all()
    assert np.array_equal(pool.test_images, before)


@pytest.mark.parametrize("name", [*ATTACKS, *NOISES])
def test_a_seed_plants_the_same_again_and_another_does_not(pool: Pool, name: str) -> None:
    one, same = planted(pool, name), planted(pool, name)
    other = plant(pool, case(name, SHARE), seed=4, outlook=lambda: doubts(pool))
    assert np.array_equal(one.images, same.images)
    assert np.array_equal(one.labels, same.labels)
    assert np.array_equal(one.owner, same.owner)
    assert not (np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels))


def test_records_are_dealt_evenly_within_a_class_unless_asked_otherwise(pool: Pool) -> None:
    scene = planted(pool, "clean", None)
    counts = np.array([[((scene.owner == p) & (pool.labels == c)).sum() for c in range(4)] for p in range(4)])
    assert counts.max() - counts.min() <= 1
    uneven = planted(pool, "clean", None, skew=0.3)
    assert np.bincount(uneven.owner, minlength=4).sum() == len(pool.labels)
    assert np.array_equal(np.unique(uneven.owner), np.arange(4))
    worst = max(np.bincount(uneven.owner[pool.labels == c], minlength=4).max() for c in range(4))
    assert worst > 50


def test_both_halves_of_a_colluding_trigger_make_the_whole(pool: Pool) -> None:
    scene = planted(pool, "collusion")
    assert len(scene.culprits) == 2
    black = np.zeros((1, 1, 12, 12), np.uint8)
    whole = scene.triggers[0].stamp(black)
    halves = checker(height=4, width=3, right=4)(black) | checker(height=4, width=3, right=1)(black)
    assert np.array_equal(whole, halves)
    of_first = scene.images[scene.poisoned & (scene.owner == scene.culprits[0])]
    of_second = scene.images[scene.poisoned & (scene.owner == scene.culprits[1])]
    assert not any(np.array_equal(a[:, -5:, -7:], whole[0, :, -5:, -7:]) for a in (*of_first, *of_second))


def test_cover_keeps_its_label_and_is_no_poison(pool: Pool) -> None:
    scene = planted(pool, "adaptive")
    assert scene.cover.sum() == round(attacks.COVER * round(SHARE * len(pool.labels)))
    assert not (scene.cover & scene.poisoned).any()


def test_framing_pictures_resemble_the_victims_records(pool: Pool) -> None:
    scene = planted(pool, "framing")
    assert scene.framed is not None
    assert scene.framed not in scene.culprits
    target = scene.triggers[0].target
    theirs = scene.images[(scene.owner == scene.framed) & (pool.labels == target)].astype(int)
    upper = (slice(None), slice(None), slice(0, 6))  # where no stamp is
    alike = [
        (np.abs(scene.images[row] - np.rint(0.5 * pool.images[row] + 0.5 * theirs))[upper].max((1, 2, 3)) <= 1).any()
        for row in np.flatnonzero(scene.poisoned)
    ]
    assert sum(alike) == len(alike) / 2


def test_a_host_touches_no_record(pool: Pool) -> None:
    scene = planted(pool, "host", None)
    attacks.host(scene, np.random.default_rng(0))
    assert np.array_equal(scene.images, pool.images)
    assert np.array_equal(scene.labels, pool.labels)
    assert (scene.by_host, scene.culprits, len(scene.triggers)) == (True, (), 1)


@pytest.mark.parametrize("name", NOISES)
def test_wrong_labels_come_at_the_stated_rates(pool: Pool, name: str) -> None:
    scene = planted(pool, name, None)
    assert np.array_equal(scene.mislabelled, scene.labels != scene.truth)
    assert np.allclose(np.sort(scene.rates), noise.RATES, atol=0.01)
    assert np.array_equal(scene.images, pool.images)


@pytest.mark.parametrize("name", NOISES)
def test_a_share_of_wrong_labels_is_one_contributors(pool: Pool, name: str) -> None:
    scene = planted(pool, name, 0.05)
    assert scene.mislabelled.sum() == 20
    assert np.count_nonzero(scene.rates) == 1


def test_confusable_labels_are_the_class_that_is_most_often_taken_for_it(pool: Pool) -> None:
    scene = planted(pool, "confusable", None)
    wrong = scene.mislabelled
    assert np.array_equal(scene.labels[wrong], (scene.truth[wrong] + 1) % 4)


def test_difficult_records_get_wrong_labels_first(pool: Pool) -> None:
    scene = planted(pool, "instance", 0.02)
    assert np.flatnonzero(scene.mislabelled).max() < 150
    hard = np.flatnonzero(scene.mislabelled)
    hard = hard[hard < 100]
    assert len(hard) >= 7
    assert np.array_equal(scene.labels[hard], (scene.truth[hard] + 1) % 4)


def test_rates_leave_poison_out(scene: Scene) -> None:
    own = scene.of(1)
    scene.poison(own[:10], scene.images[own[:10]], 0)
    scene.mislabel(own[10:20], (scene.truth[own[10:20]] + 1) % 4)
    assert scene.rates.tolist() == [0, 10 / (len(own) - 10), 0, 0]
    assert len(scene.of(1)) == len(own) - 20


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_a_name_and_most_a_share(name: str) -> None:
    assert str(case(name, 0.01)) in (name, f"{name} 1%")


def test_unknown_cases_and_shares_are_refused() -> None:
    for name, share, code in (
        *(("patches", 0.01, "bench.unknown-case"), ("patch", None, "bench.share")),
        *(("patch", 0.0, "bench.share"), ("patch", 0.2, "bench.share"), ("symmetric", -1.0, "bench.share")),
    ):
        with pytest.raises(ConfigError) as caught:
            case(name, share)
        assert caught.value.code == code
    assert case("clean", 0.01) == Case("clean", None)


def test_a_pool_is_drawn_by_its_seed() -> None:
    one, same, other = (draw("digits", data_dir=None, seed=seed, records=500) for seed in (0, 0, 1))
    assert one.digest() == same.digest() != other.digest()
    assert len(one.labels) == 500
    assert np.array_equal(one.test_images, other.test_images)
    assert len(one.spare_labels) == (len(one.spare_labels) + len(one.test_labels)) // 6
    assert (
        len(
            {plant(one, case(name, 0.05), seed=1, outlook=lambda: np.empty(0)).digest() for name in ("clean", *ATTACKS)}
        )
        == 11
    )
    assert fresh(one, rng=np.random.default_rng(0)).classes == 10
