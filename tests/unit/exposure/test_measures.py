"""Measures of pictures against independent computations, and scores that cannot be had by a constant guess."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.material import Material
from caltrain.exposure.measures import floors, psnr, reidentify, score, ssim
from caltrain.exposure.perceptual import edge_distance


def random_pictures(count: int, shape: tuple[int, int, int] = (3, 16, 16), *, seed: int = 0) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed))


def some_material(count: int = 32, candidates: int = 100) -> Material:
    drawn = random_pictures(candidates, seed=1)
    labels = torch.zeros(count, dtype=torch.long)
    return Material(random_pictures(64, seed=2), torch.zeros(64, dtype=torch.long), drawn[:count], labels, drawn)


def slow_ssim(a: Tensor, b: Tensor) -> float:
    """By the formula, place by place, in float64."""
    sizes = [n - (n + 1) % 2 for n in (min(11, side) for side in a.shape[1:])]
    axes = [np.exp(-((np.arange(n) - n // 2) ** 2) / (2 * 1.5**2)) for n in sizes]
    window = np.outer(*axes) / np.outer(*axes).sum()
    found = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        for i in range(x.shape[0] - sizes[0] + 1):
            for j in range(x.shape[1] - sizes[1] + 1):
                p, q = (t[i : i + sizes[0], j : j + sizes[1]] for t in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                light = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
                found.append(light * (2 * cov + 9e-4) / (vp + vq + 9e-4))
    return float(np.mean(found))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 14), (2, 8, 5), (1, 1, 20)])
def test_ssim_is_that_of_the_formula(shape: tuple[int, int, int]) -> None:
    a = random_pictures(2, shape, seed=3)
    b = (0.6 * a + 0.3 * random_pictures(2, shape, seed=4)).clamp(0, 1)
    expected = [slow_ssim(x, y) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_a_negative_is_low_and_of_the_same_is_1() -> None:
    a = random_pictures(4)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 4)
    assert float(ssim(a, 1 - a).max()) < -0.5


def test_psnr_in_decibels_with_a_cap() -> None:
    a = torch.full((1, 3, 4, 4), 0.5)
    assert float(psnr(a, a + 0.1)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))) == 0.0
    assert float(psnr(a, a)) == pytest.approx(100.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
def test_psnr_and_ssim_are_symmetric(seed: int, channels: int, height: int, width: int) -> None:
    a, b = random_pictures(4, (channels, height, width), seed=seed).chunk(2)
    assert torch.allclose(psnr(a, b), psnr(b, a))
    assert torch.allclose(ssim(a, b), ssim(b, a), atol=1e-5)
    assert bool((ssim(a, b).abs() <= 1 + 1e-4).all())


def test_each_picture_is_found_again_whatever_is_done_to_all_alike() -> None:
    known = random_pictures(100)
    spoilt = 0.2 * known[:40] + random_pictures(1, seed=9)
    assert bool(reidentify(spoilt, known).all())


def test_a_picture_of_another_is_not_found() -> None:
    known = random_pictures(50)
    assert not bool(reidentify(known[1:11], known).any())


@pytest.mark.parametrize("guess", [torch.full((3, 16, 16), 0.5), random_pictures(1)[0]])
def test_a_constant_guess_hits_nothing(guess: Tensor) -> None:
    assert not bool(reidentify(guess.expand(20, -1, -1, -1), random_pictures(50)).any())


def test_a_copy_of_the_true_candidate_does_not_make_it_a_miss() -> None:
    known = torch.cat([random_pictures(40), random_pictures(40)[:1]])
    assert bool(reidentify(known[:20], known).all())


def test_a_tie_of_two_candidates_is_a_miss() -> None:
    u, v = torch.tensor([[[1.0, -1], [1, -1]]]), torch.tensor([[[1.0, 1], [-1, -1]]])
    known = torch.stack([u, v, -u, -v])
    assert bool(reidentify(torch.stack([u + 0.9 * v, v - 0.9 * u, -u - 0.9 * v, 0.9 * u - v]), known).all())
    assert not bool(reidentify(torch.stack([u + v, v - u, -u - v, u - v]), known).any())


def test_many_reconstructions_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    known = random_pictures(30)
    spoilt = (known[:20] + 2 * random_pictures(20, seed=5)).roll(1, dims=3)
    whole = reidentify(torch.cat([known[:9], spoilt[9:]]), known)
    monkeypatch.setattr("caltrain.exposure.measures._AT_ONCE", 30 * 7)
    assert torch.equal(reidentify(torch.cat([known[:9], spoilt[9:]]), known), whole)
    assert 9 <= int(whole.sum()) < 20


def test_a_perfect_attack_scores_best_and_worse_ones_worse() -> None:
    material = some_material()
    best = score(material.targets, material, edge_distance)
    assert [best.psnr.value, best.ssim.value, best.perceptual.value] == pytest.approx([100, 1, 0], abs=1e-5)
    assert best.reidentification.value == 1.0
    assert (best.candidates, best.psnr.n, best.reidentification.n) == (100, 32, 32)
    worse = score(material.targets[:20] + 0.2 * random_pictures(20, seed=8), material, edge_distance)
    assert worse.psnr.value < 30
    assert worse.ssim.high < 1
    assert worse.perceptual.low > 0
    assert worse.reidentification.n == 20


def test_reconstructions_are_clamped_and_their_gradients_dropped() -> None:
    material = some_material()
    beyond = torch.where(material.targets > 0.5, 7.0, -7.0).requires_grad_()
    clamped = (material.targets > 0.5).float()
    assert score(beyond, material, edge_distance) == score(clamped, material, edge_distance)


def test_the_seed_of_a_score_is_that_of_its_intervals() -> None:
    material = some_material()
    guess = random_pictures(32, seed=6)
    one, other = score(guess, material, edge_distance, seed=1), score(guess, material, edge_distance, seed=2)
    assert one.psnr.value == other.psnr.value
    assert one.psnr.low != other.psnr.low


@pytest.mark.parametrize("shape", [(32, 1, 16, 16), (33, 3, 16, 16), (32, 3, 16, 15)])
def test_reconstructions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError) as refused:
        score(torch.rand(shape), some_material(), edge_distance)
    assert refused.value.code == "exposure.shapes"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reconstruction_that_is_not_finite_is_refused(bad: float) -> None:
    guess = random_pictures(32)
    guess[3, 0, 0, 0] = bad
    with pytest.raises(IntegrityError) as refused:
        score(guess, some_material(), edge_distance)
    assert refused.value.code == "exposure.not-finite"


def test_the_floors_are_the_mean_image_and_an_own_draw() -> None:
    material = some_material()
    found = floors(material, edge_distance, seed=3)
    assert list(found) == ["mean image", "own draw"]
    mean = material.own.mean(0, keepdim=True)
    assert found["mean image"].psnr.value == pytest.approx(float(psnr(mean, material.targets).mean()), rel=1e-5)
    assert found["mean image"].reidentification.value == 0
    assert found["own draw"].psnr.value < found["mean image"].psnr.value
    assert found["own draw"].reidentification.value < 0.2
    assert found == floors(material, edge_distance, seed=3)
    assert found["own draw"].psnr.value != floors(material, edge_distance, seed=4)["own draw"].psnr.value
