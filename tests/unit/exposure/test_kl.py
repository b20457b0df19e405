"""The papers' measure: against sums by hand, sampled against all maps, and the papers' rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import CaltrainError, ConfigError, DataError, IntegrityError
from caltrain.exposure.figures import Estimate, KlFigures
from caltrain.exposure.kl import assess_kl, papers_cut
from caltrain.exposure.maps import map_count, maps_of
from caltrain.exposure.subject import Cut, Live, Subject, candidate_cuts
from caltrain.exposure.validator import Validator, generator_as_validator
from caltrain.models.layers import AvgPool, Conv, Linear
from caltrain.models.spec import ModelSpec
from caltrain.records.schema import DataSchema
from support.exposed import drawn, subject
from support.samples import refused

JUDGE = ModelSpec(layers=(Conv(filters=8), Conv(filters=8), AvgPool(), Linear(units=4)))


def sharp(model: Subject) -> Validator:
    """A judge of the model's pictures with random weights that is sure of what it says."""
    channels, height, width = model.shape
    judge = drawn(JUDGE, DataSchema(shape=(channels, height, width), classes=("a", "b", "c", "d")), seed=5)
    weight = judge.module.get_parameter("3.linear.weight")
    weight.mul_(200)
    return Validator(judge)


def shown(model: Subject, count: int) -> Tensor:
    small = torch.rand(count, model.shape[0], 3, 3, generator=torch.Generator().manual_seed(3))
    return F.interpolate(small, size=model.shape[1:], mode="bilinear")


def by_hand(
    model: Subject, front: int, judge: Validator, pictures: Tensor
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """KL (N, maps), one map after the other."""
    maps = maps_of(Cut(model, front).ir(pictures), judge.size)
    truth = judge.log_probabilities(pictures).double()
    each = [judge.log_probabilities(maps[:, [number]]).double() for number in range(maps.shape[1])]
    return torch.stack([(truth.exp() * (truth - one)).sum(1) for one in each], dim=1).numpy()


def test_figures_are_those_by_hand() -> None:
    model = subject("resnet18")  # two tensors cross at cut 2
    judge, pictures = sharp(model), shown(model, 20)
    assert len(Cut(model, 2).ir(pictures)) == 2
    found, table = assess_kl(model, [2], judge, pictures)[2], by_hand(model, 2, judge, pictures)
    least, truth = table.min(1), judge.log_probabilities(pictures).double()
    uniform = math.log(4) + (truth.exp() * truth).sum(1).numpy()
    assert found.channels == found.maps_used == table.shape[1]
    assert found.sampling_error is None
    assert found.kl.value == pytest.approx(least.mean(), rel=0.02, abs=0.01)
    assert found.uniform.value == pytest.approx(uniform.mean(), rel=0.01)
    assert found.ratio.value == pytest.approx(found.kl.value / found.uniform.value)
    assert found.ratio.low < found.ratio.value < found.ratio.high
    assert found.below.value == pytest.approx((least < uniform).mean(), abs=0.051)
    assert found.quantiles == pytest.approx(np.quantile(least, [0.05, 0.25, 0.5, 0.75, 0.95]), rel=0.05, abs=0.02)
    assert found.most_telling == np.bincount(table.argmin(1)).argmax()
    assert found.kl.value <= table.mean(0).min() + 0.01


def test_a_map_that_is_the_input_tells_all_of_it_and_that_of_another_does_not() -> None:
    model = subject()
    weight = model.module.get_parameter("0.conv.weight")
    weight[3] = 0
    weight[3, :, 1, 1] = 1
    model.module.get_parameter("0.conv.bias")[3] = 10  # above zero, where the activation passes all
    pictures = shown(model, 12)
    low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
    found = assess_kl(model, [1], sharp(model), (pictures - low) / (high - low))[1]
    assert 0 <= found.quantiles[0] <= found.kl.value < 0.01
    assert found.most_telling == 3
    assert found.unrelated.value > 10 * found.kl.value + 0.05


@pytest.mark.parametrize("name", ["tiny", "18-layer", "vit"])
def test_every_cut_has_figures_and_none_is_negative(name: str) -> None:
    model = subject(name)
    pictures, cuts = shown(model, 8), candidate_cuts(model.spec)
    found = assess_kl(model, cuts, generator_as_validator(model), pictures)
    assert tuple(found) == cuts
    for one in found.values():
        assert min(one.kl.value, one.uniform.value, one.ratio.low, one.unrelated.value, *one.quantiles) >= 0
        assert math.isfinite(one.ratio.high)


def test_flattening_hides_nothing() -> None:
    model = subject()
    found = assess_kl(model, [3, 4], sharp(model), shown(model, 10))
    assert found[3] == found[4]
    assert found[4].channels == 4


def test_what_crosses_at_two_cuts_is_shown_once() -> None:
    model, steps = subject("18-layer"), list[tuple[int, int]]()
    pictures = shown(model, 18)
    found = assess_kl(model, [4, 5, 6], sharp(model), pictures, on_step=lambda done, total: steps.append((done, total)))
    maps = map_count(Cut(model, 4).ir(pictures)) + map_count(Cut(model, 6).ir(pictures))
    assert found[4] == found[5]  # behind a dropout, which passes all on
    assert steps[-1] == (18 * maps, 18 * maps)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_a_sampled_minimum_lies_above_the_true_one_by_about_the_error_shown() -> None:
    model, steps = subject("18-layer"), list[tuple[int, int]]()
    judge, pictures, cuts = sharp(model), shown(model, 64), [1, 6, 11]
    exact = assess_kl(model, cuts, judge, pictures, seed=1)
    few = assess_kl(
        model, cuts, judge, pictures, maps=4, seed=1, on_step=lambda done, total: steps.append((done, total))
    )
    for cut in cuts:
        gap, error = few[cut].kl.value - exact[cut].kl.value, few[cut].sampling_error
        assert (few[cut].channels, few[cut].maps_used) == (exact[cut].channels, 4)
        assert error is not None
        assert gap > 0
        assert error.n == 32
        assert error.low / 3 <= gap <= 3 * error.high
    assert steps[-1] == (32 * sum(exact[cut].channels for cut in cuts) + 32 * 12,) * 2
    again = assess_kl(model, cuts, judge, pictures, maps=4, seed=1)
    assert again == few
    assert assess_kl(model, cuts, judge, pictures, maps=4, seed=2) != few


@pytest.mark.parametrize(("inputs", "maps"), [(32, 2), (40, 16)])
def test_no_sampling_where_it_saves_nothing(inputs: int, maps: int) -> None:
    model = subject("18-layer")
    pictures = shown(model, inputs)
    found = assess_kl(model, [1], sharp(model), pictures, maps=maps)
    assert found == assess_kl(model, [1], sharp(model), pictures)
    assert found[1].sampling_error is None


def test_a_defence_is_applied_before_anything_is_shown() -> None:
    def narrow(live: Live) -> Live:
        return tuple(tensor[:, :2] for tensor in live)

    model = subject()
    assert assess_kl(model, [1], sharp(model), shown(model, 9), defence=narrow)[1].channels == 2


def test_a_validator_that_knows_nothing_gives_a_finite_ratio() -> None:
    model = subject()
    judge = sharp(model)
    judge.subject.module.get_parameter("3.linear.weight").zero_()
    judge.subject.module.get_parameter("3.linear.bias").zero_()
    found = assess_kl(model, [1], judge, shown(model, 9))[1]
    assert found.uniform.value == pytest.approx(0, abs=1e-6)
    assert math.isfinite(found.ratio.value)


def _zeroed(model: Subject) -> None:
    model.module.get_parameter("0.conv.weight").zero_()


def _not_finite(model: Subject) -> None:
    model.module.get_parameter("0.conv.weight").fill_(math.nan)


def test_a_cut_that_lets_nothing_through_or_no_numbers_is_refused() -> None:
    for spoil, code in ((_zeroed, "exposure.constant-ir"), (_not_finite, "exposure.not-finite")):
        model, steps = subject(), list[int]()
        spoil(model)
        with refused(IntegrityError, code):
            assess_kl(model, [1], sharp(model), shown(model, 9), on_step=lambda done, _, s=steps: s.append(done))  # type: ignore[misc]
        assert not steps


@pytest.mark.parametrize(
    ("cut", "inputs", "maps", "family", "code"),
    [
        (9, 9, None, ConfigError, "exposure.cut"),
        (1, 9, 0, ConfigError, "exposure.maps"),
        (1, 7, None, DataError, "exposure.too-few"),
    ],
)
def test_what_cannot_be_assessed_is_refused(
    cut: int, inputs: int, maps: int | None, family: type[CaltrainError], code: str
) -> None:
    model = subject()
    with refused(family, code):
        assess_kl(model, [1, cut], sharp(model), shown(model, inputs), maps=maps)


def figures(ratio: float) -> KlFigures:
    one = Estimate(ratio, ratio, ratio, 9)
    return KlFigures(
        channels=1,
        maps_used=1,
        kl=one,
        uniform=one,
        ratio=one,
        below=one,
        unrelated=one,
        quantiles=(0, 0, 0, 0, 0),
        sampling_error=None,
        most_telling=0,
    )


@pytest.mark.parametrize(
    ("ratios", "tolerance", "cut"),
    [
        ([0.1, 0.5, 1.0, 1.2], 1.0, 3),
        ([0.1, 1.5, 0.9, 1.2], 1.0, 4),  # what is safe before a cut that is not, does not count
        ([0.1, 1.5, 0.9, 1.2], 0.8, 2),
        ([1.1, 1.5, 1.9], 1.0, 1),
        ([1.1, 1.5, 0.9], 1.0, None),
        ([], 1.0, None),
        ([1.1, float("nan"), 1.9], 1.0, 3),  # what is not a number is not safe
        ([1.1, 1.5], float("nan"), None),
    ],
)
def test_the_papers_cut_is_the_first_from_which_on_all_are_safe(
    ratios: list[float], tolerance: float, cut: int | None
) -> None:
    table = {front: figures(ratio) for front, ratio in enumerate(ratios, 1)}
    assert papers_cut(table, tolerance=tolerance) == cut
    assert papers_cut(dict(reversed(table.items())), tolerance=tolerance) == cut
