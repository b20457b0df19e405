"""The cheapest cut that keeps to the policy, and what is said where there is none."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.errors import ConfigError, DataError
from caltrain.exposure.choice import Choice, choose
from caltrain.exposure.figures import Estimate
from caltrain.exposure.policy import Bound, Policy, parse_policy

SSIM = "whitebox.ssim"
COSTS = {1: 0.1, 2: 0.3, 3: 0.6, 4: 0.6}


def ssim_of(*values: float, half: float = 0.02, n: int = 100) -> dict[int, dict[str, Estimate]]:
    return {cut: {SSIM: Estimate(v, v - half, v + half, n)} for cut, v in enumerate(values, 1)}


def chosen(figures: dict[int, dict[str, Estimate]], text: str = "ssim<=0.3", **changes: object) -> Choice:
    policy = msgspec.structs.replace(parse_policy(text), **changes)
    return choose(policy, figures, costs=COSTS)


def test_the_cheapest_cut_that_meets_the_policy() -> None:
    found = chosen(ssim_of(0.8, 0.25, 0.2))
    assert (found.front, found.nearest, found.advice) == (2, None, ())
    assert (found.misses[2], found.misses[3]) == ((), ())
    (miss,) = found.misses[1]
    assert (miss.key, miss.limit, miss.mean, miss.by_mean) == (SSIM, 0.3, 0.8, True)
    assert miss.reached == pytest.approx(0.82)
    assert miss.by == pytest.approx(0.52)


def test_cost_decides_not_depth_and_of_equal_cost_the_deeper() -> None:
    policy, figures = parse_policy("ssim<=0.3"), ssim_of(0.1, 0.1, 0.1)
    assert choose(policy, figures, costs={1: 0.5, 2: 0.4, 3: 0.9}).front == 2
    assert choose(policy, figures, costs={1: 0.5, 2: 0.4, 3: 0.4}).front == 3


def test_the_far_end_of_the_interval_has_to_meet_it_or_the_mean() -> None:
    unsure = ssim_of(0.8, 0.29)
    assert chosen(unsure).front is None
    assert chosen(unsure, use="mean").front == 2
    kl = {1: {"kl_ratio": Estimate(1.1, 0.9, 1.3, 50)}}
    assert chosen(kl, "kl_ratio>=1").front is None
    assert chosen(kl, "kl_ratio>=1", use="mean").front == 1
    assert chosen(kl, "kl_ratio>=0.9").front == 1  # just met


def test_a_deeper_cut_that_fails_makes_a_shallow_one_suspicious() -> None:
    figures = ssim_of(0.8, 0.2, 0.5)
    found = chosen(figures)
    assert found.front is None
    assert found.nearest == 2
    assert "cut 2 meets the policy" in found.advice[0]
    assert chosen(figures, all_deeper=False).front == 2
    assert chosen(ssim_of(0.8, 0.5, 0.2, 0.1)).front == 4


def test_all_bounds_have_to_be_met() -> None:
    figures = ssim_of(0.2, 0.1)
    for cut, ratio in ((1, 0.5), (2, 1.5)):
        figures[cut]["kl_ratio"] = Estimate(ratio, ratio, ratio, 100)
    found = chosen(figures, "ssim<=0.3, kl_ratio>=1")
    assert found.front == 2
    assert [miss.key for miss in found.misses[1]] == ["kl_ratio"]
    assert chosen(figures, "ssim<=0.3").front == 1


def test_weaker_attacks_count_for_a_stronger_adversary_and_not_the_other_way_round() -> None:
    figures = ssim_of(0.2)
    figures[1]["inverter.ssim"] = Estimate(0.6, 0.5, 0.7, 100)
    (miss,) = chosen(figures).misses[1]
    assert miss.key == "inverter.ssim"
    figures[1]["inverter.ssim"], figures[1][SSIM] = figures[1][SSIM], figures[1]["inverter.ssim"]
    assert chosen(figures, "inverter.ssim<=0.3").front == 1


@pytest.mark.parametrize(
    ("text", "key", "run"),
    [
        ("ssim<=0.3, shadow.ssim<=0.3", "shadow.ssim", "shadow"),
        ("inverter.psnr<=20", "inverter.psnr", "inverter"),
        ("psnr<=20", "whitebox.psnr", "whitebox"),
        ("kl_ratio>=1", "kl_ratio", "kl"),
        ("label_purity<=0.5", "label_purity", "labels"),
        ("channel_correlation<=0.5", "channel_correlation", "measures inside"),
    ],
)
def test_a_bound_on_what_was_not_measured(text: str, key: str, run: str) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen(ssim_of(0.1, 0.1), text)
    assert refused.value.code == "policy.not-measured"
    assert f"{key}, which" in refused.value.what
    assert run in refused.value.fix


def test_no_cut_at_all() -> None:
    with pytest.raises(ConfigError) as refused:
        chosen({})
    assert refused.value.code == "policy.not-measured"


def _rate(n: int, high: float = 0.019) -> dict[int, dict[str, Estimate]]:
    return {1: {"whitebox.reidentification": Estimate(0.0, 0.0, high, n)}}


def test_too_few_records_for_the_rate_that_is_asked() -> None:
    with pytest.raises(DataError) as refused:
        chosen(_rate(188), "reidentification<=0.02")
    assert refused.value.code == "exposure.too-few-for-policy"
    assert "at least 189 records" in refused.value.fix
    assert chosen(_rate(189), "reidentification<=0.02").front == 1
    assert chosen(_rate(9), "reidentification<=0.02", use="mean").front == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_that_is_not_a_number_meets_nothing(bad: float) -> None:
    for text, key in (("ssim<=0.3", SSIM), ("kl>=1", "kl")):
        low = bad if math.isnan(bad) else -bad
        figures = {1: {key: Estimate(0.5, low, bad, 9)}, 2: {key: Estimate(bad, bad, bad, 9)}}
        found = choose(parse_policy(text), {1: figures[1]}, costs=COSTS)
        assert found.front is None
        if math.isnan(bad):
            assert choose(parse_policy(text), figures, costs=COSTS).front is None


def test_advice_when_only_the_interval_misses() -> None:
    found = chosen(ssim_of(0.25, half=0.1))
    assert found.advice[0] == "at cut 1 the mean meets whitebox.ssim: assess about 400 records"
    assert not any("noise" in line for line in found.advice)


@pytest.mark.parametrize(
    ("mean", "high", "records"),
    [(0.3, 0.4, 100_000_000), (0.0, 5e-324, 100_000_000), (-1e308, 1e308, None)],
    ids=["mean at the limit", "least number there is", "wider than a number can be"],
)
def test_advice_on_intervals_at_the_edge_of_what_numbers_can_say(mean: float, high: float, records: int | None) -> None:
    policy = Policy(bounds=(Bound(measure="ssim", at_most=max(mean, 0.0)),))
    found = choose(policy, {1: {SSIM: Estimate(mean, mean, high, 100)}}, costs=COSTS)
    assert found.front is None
    assert any("assess about" in line for line in found.advice) == (records is not None)
    assert records is None or f"about {records} records" in found.advice[0]


def test_advice_when_the_mean_misses() -> None:
    found = chosen(ssim_of(0.9, 0.8, 0.7))
    assert found.nearest == 3
    assert [line.split(":")[0] for line in found.advice] == [
        "at cut 3 add noise, or cross fewer channels or fewer bits",
        "cut 3 is the deepest that was assessed",
    ]


def test_advice_for_labels() -> None:
    found = chosen({1: {"label_purity": Estimate(0.9, 0.8, 1.0, 50)}}, "label_purity<=0.5")
    assert found.advice[0].startswith("train in the ternary form")
    assert not any("noise" in line for line in found.advice)


def test_no_advice_to_assess_deeper_where_a_shallower_cut_stands_in_the_way() -> None:
    found = chosen(ssim_of(0.35, 0.7, 0.4), all_deeper=False)
    assert found.nearest == 1
    assert [line.split(":")[0] for line in found.advice] == [
        "at cut 1 add noise, or cross fewer channels or fewer bits"
    ]


def test_a_choice_travels_as_json() -> None:
    found = chosen(ssim_of(0.9, 0.8))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Choice) == found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.floats(0, 1), st.booleans(), st.booleans())
def test_a_chosen_cut_meets_everything_and_if_none_is_then_none_does(
    values: list[float], limit: float, mean: bool, all_deeper: bool
) -> None:
    policy = Policy(
        bounds=(Bound(measure="ssim", at_most=limit),), use="mean" if mean else "bound", all_deeper=all_deeper
    )
    found = choose(policy, ssim_of(*values), costs=COSTS)
    meets = [v + (0 if mean else 0.02) <= limit for v in values]
    fit = [cut for cut in range(1, len(values) + 1) if all(meets[cut - 1 :] if all_deeper else meets[cut - 1 : cut])]
    if found.front is None:
        assert fit == []
        assert found.nearest in found.misses
        assert found.advice
    else:
        assert found.front in fit
        assert COSTS[found.front] == min(COSTS[cut] for cut in fit)
    assert [bool(found.misses[cut]) for cut in found.misses] == [not ok for ok in meets]
