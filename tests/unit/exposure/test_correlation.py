"""What an IR shows as it is: known correlations, and IRs from which nothing can be measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.errors import DataError, IntegrityError
from caltrain.exposure.correlation import channel_correlation, distance_correlation


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _smooth(count: int, side: int = 16) -> Tensor:
    return torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), size=(side, side), mode="bilinear")


def test_the_most_telling_plane_counts_for_each_record() -> None:
    pictures = torch.rand((6, 3, 9, 9), generator=torch.Generator().manual_seed(1))
    noise = _draw(6, 5, 9, 9)
    grey = pictures.mean(1)
    noise[2, 4] = 3 - 2 * grey[2]  # a negative shows as much
    noise[3, 0] = grey[3] + 0.1 * noise[3, 0]
    found = channel_correlation((noise,), pictures)
    alone = [max(abs(np.corrcoef(p.flatten(), grey[i].flatten())[0, 1]) for p in noise[i]) for i in range(6)]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    assert float(found[2]) == pytest.approx(1, abs=1e-5)


def test_planes_are_resized_and_all_live_tensors_count() -> None:
    pictures = _smooth(4)
    small = torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 2)
    assert float(channel_correlation((_draw(4, 3, 5, 5), small), pictures).min()) > 0.95
    assert float(channel_correlation((_draw(4, 3, 5, 5),), pictures).max()) < 0.8


def test_planes_that_are_flattened_show_as_much() -> None:
    """Else a policy would be met by cutting one layer later, behind a layer that only renames places."""
    pictures = _smooth(3)
    planes = torch.nn.functional.avg_pool2d(pictures, 2)
    flat = channel_correlation((planes.flatten(1),), pictures)
    assert bool((flat >= channel_correlation((planes,), pictures) - 1e-6).all())


def test_tokens_have_places_and_short_vectors_have_none() -> None:
    pictures = _smooth(3)
    tokens = torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 4).flatten(2).transpose(1, 2)
    assert float(channel_correlation((tokens,), pictures).min()) > 0.8
    assert channel_correlation((_draw(3, 7),), pictures).tolist() == [0, 0, 0]


def test_a_constant_plane_or_picture_correlates_with_nothing() -> None:
    pictures = _smooth(3)
    pictures[1] = 0.25
    planes = torch.stack([pictures.mean(1), torch.full((3, 16, 16), 4.0)], dim=1)
    planes[2, 0] = -1e4
    assert channel_correlation((planes,), pictures).tolist() == [pytest.approx(1, abs=1e-5), 0, 0]


def test_many_planes_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, planes = _smooth(5), _draw(5, 7, 8, 8)
    whole = channel_correlation((planes,), pictures)
    monkeypatch.setattr("caltrain.exposure.correlation._AT_ONCE", 256 * 3)
    assert torch.allclose(channel_correlation((planes,), pictures), whole)


CONSTANT = {
    "dead": torch.zeros(4, 3, 5, 5),
    "one value per channel": torch.tensor([1.0, -2.0, 1e6])[None, :, None, None].expand(4, 3, 5, 5),
    "one vector for all": torch.tensor([1.0, -2.0, 3.0]).expand(4, 3),
    "one vector of equal values": torch.full((1, 3), 2.0),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_an_ir_in_which_nothing_varies_is_refused(name: str) -> None:
    live = CONSTANT[name]
    with pytest.raises(IntegrityError) as refused:
        channel_correlation((live,), torch.rand(len(live), 1, 5, 5))
    assert refused.value.code == "exposure.constant-ir"
    if len(live) >= 5:
        with pytest.raises(IntegrityError) as again:
            distance_correlation(live, torch.rand(len(live), 1, 5, 5))
        assert again.value.code == "exposure.constant-ir"


def test_one_live_tensor_that_varies_is_enough() -> None:
    pictures = _smooth(4)
    found = channel_correlation((torch.zeros(4, 2, 5, 5), pictures), pictures)
    assert float(found.min()) > 0
    assert channel_correlation((_draw(1, 7),), pictures[:1]).tolist() == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_ir_that_is_not_finite_is_refused(bad: float) -> None:
    live = _draw(5, 2, 5, 5)
    live[3, 1, 4, 4] = bad
    for measure in (lambda: channel_correlation((live,), _smooth(5)), lambda: distance_correlation(live, _smooth(5))):
        with pytest.raises(IntegrityError) as refused:
            measure()
        assert refused.value.code == "exposure.not-finite"


def _slow_distance_correlation(x: Tensor, y: Tensor) -> float:
    def centred(samples: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        n = len(samples)
        far = np.array([[float((p - q).double().norm()) for q in samples] for p in samples])
        out = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    margins = far[i].sum() / (n - 2) + far[:, j].sum() / (n - 2)
                    out[i, j] = far[i, j] - margins + far.sum() / ((n - 1) * (n - 2))
        return out

    a, b = centred(x), centred(y)
    return math.sqrt(max(0.0, float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))))


def test_distance_correlation_is_that_of_the_formula() -> None:
    x = _draw(12, 3, 4, 4)
    y = x[:, :1] + 0.3 * _draw(12, 1, 4, 4, seed=1)
    assert distance_correlation(x, y).value == pytest.approx(_slow_distance_correlation(x, y), abs=1e-4)
    assert distance_correlation(x, y).value > 0.3


def test_distance_correlation_of_the_same_is_1_and_of_independent_samples_about_0() -> None:
    x = _draw(64, 500)
    assert distance_correlation(5 - 3 * x, x).value == pytest.approx(1, abs=1e-4)
    assert distance_correlation(x, _draw(64, 500, seed=1)).value < 0.3  # the plain estimate gives about 0.98


def test_an_ir_that_is_the_same_for_all_records_is_not_correlated() -> None:
    assert distance_correlation(_draw(1, 3, 4, 4).expand(8, -1, -1, -1), _smooth(8)).value == 0


def test_four_records_are_too_few() -> None:
    with pytest.raises(DataError) as refused:
        distance_correlation(_draw(4, 5), _smooth(4))
    assert refused.value.code == "exposure.too-few"
    assert 0 <= distance_correlation(_draw(5, 5), _smooth(5)).value <= 1


def test_an_estimate_below_zero_is_none() -> None:
    x = _draw(12, 3, 4, 4)
    assert distance_correlation(x, x[:, :1].abs() + 0.3 * _draw(12, 1, 4, 4, seed=1)).value == 0


def test_the_jackknifes_interval_covers_what_more_records_show() -> None:
    x = _draw(400, 6)
    y = x + 2 * _draw(400, 6, seed=1)
    whole = distance_correlation(x, y).value
    parts = [distance_correlation(x[at : at + 40], y[at : at + 40]) for at in range(0, 400, 40)]
    assert sum(part.low <= whole <= part.high for part in parts) >= 8
    assert all(0 < part.high - part.low < 0.6 for part in parts)
