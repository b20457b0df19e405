"""A policy reads the same from TOML and from a line of text, and one that makes no sense is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.digests import canonical_json
from caltrain.errors import ConfigError
from caltrain.exposure.policy import (
    ADVERSARIES,
    LEAST_RATE,
    MEASURES,
    Adversary,
    Bound,
    Policy,
    attack_bounds,
    check_policy,
    inside_bounds,
    key_of,
    parse_policy,
    weaker_adversary,
)
from caltrain.exposure.statistics import records_to_show
from caltrain.plan import parse_toml

TOML = """
use = "bound"
[[bounds]]
measure = "reidentification"
at_most = 0.02
[[bounds]]
measure = "ssim"
at_most = 0.3
adversary = "inverter"
[[bounds]]
measure = "kl_ratio"
at_least = 1
"""
TEXT = "reidentification<=0.02, inverter.ssim <= 0.3,kl_ratio>=1"


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse_policy(text)
    return error.value


def test_toml_and_text_say_the_same() -> None:
    policy = parse_policy(TEXT)
    assert check_policy(parse_toml(TOML.encode(), Policy, what="policy")) == policy
    assert (policy.use, policy.all_deeper) == ("bound", True)
    assert [key_of(bound) for bound in policy.bounds] == ["whitebox.reidentification", "inverter.ssim", "kl_ratio"]
    assert [bound.limit for bound in policy.bounds] == [0.02, 0.3, 1.0]
    assert msgspec.json.decode(canonical_json(policy), type=Policy) == policy


def test_bounds_are_checked_inside_or_by_attacks_and_none_by_nobody() -> None:
    policy = parse_policy(TEXT + ", label_purity<=0.5, channel_correlation<=0.4")
    assert [bound.measure for bound in inside_bounds(policy)] == ["kl_ratio", "channel_correlation"]
    assert [bound.measure for bound in attack_bounds(policy)] == ["reidentification", "ssim", "label_purity"]
    every = Policy(bounds=tuple(Bound(measure=name) for name in MEASURES))
    assert len(inside_bounds(every)) + len(attack_bounds(every)) == len(MEASURES)


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    name = draw(st.sampled_from(sorted(MEASURES)))
    measure = MEASURES[name]
    limit = round(draw(st.floats(measure.least, measure.most)), 6)
    limit = limit or 0.5  # a rate of 0 would be refused
    adversary: Adversary = draw(st.sampled_from(ADVERSARIES)) if measure.run == "attack" else "whitebox"
    if measure.side == "at_most":
        return Bound(measure=name, at_most=limit, adversary=adversary)
    return Bound(measure=name, at_least=limit, adversary=adversary)


@given(st.lists(bounds(), min_size=1, max_size=16, unique_by=key_of))
def test_text_and_back(found: list[Bound]) -> None:
    signs = [f"{key_of(b)}{'>=' if b.at_most is None else '<='}{b.limit:.6f}" for b in found]
    assert parse_policy(", ".join(signs)) == Policy(bounds=tuple(found))


def test_an_unknown_measure_is_named_beside_the_known_ones() -> None:
    error = refused("ssim<=0.3, beauty<=0.5")
    assert error.code == "policy.unknown-measure"
    assert "'beauty'" in error.what
    assert all(name in error.fix for name in MEASURES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssim",
        "ssim<0.3",
        "ssim<=",
        "ssim=0.3",
        "ssim<=nan",
        "ssim<=1e-1",
        "ssim<=\u0663",
        "ssim<=0.3,",
        "ssim<=0.3;kl>=1",
        "friend.ssim<=0.3",
        "a.b.ssim<=0.3",
        f"{'s' * 41}<=0.3",
        ", ".join(["ssim<=0.3"] * 17),
        "ssim<=0.3" + " " * 2000,
    ],
)
def test_a_line_that_cannot_be_read(text: str) -> None:
    error = refused(text)
    assert error.code == "policy.malformed"
    assert "whitebox, inverter, shadow" in error.fix


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ssim<=0.3, kl>=1, ssim<=0.4", "2 bounds on whitebox.ssim"),
        ("ssim>=0.3", "at_most"),
        ("kl_ratio<=1", "at_least"),
        ("perceptual<=1", "at_least"),
        ("reidentification<=1.5", "0..1"),
        ("reidentification<=-0.5", "0..1"),
        ("ssim<=-1.1", "-1..1"),
        ("kl>=101", "0..100"),
        ("inverter.kl>=1", "without an adversary"),
        ("shadow.label_purity<=0.5", "without an adversary"),
        ("reidentification<=0", "a rate under 0.000001"),
        ("reidentification<=0.000000999", "a rate under 0.000001"),
    ],
)
def test_a_policy_that_makes_no_sense(text: str, why: str) -> None:
    error = refused(text)
    assert error.code == "policy.contradiction"
    assert why in error.what


@pytest.mark.parametrize(
    "bound",
    [
        Bound(measure="ssim"),
        Bound(measure="ssim", at_most=0.3, at_least=0.1),
        Bound(measure="ssim", at_most=float("nan")),
        Bound(measure="kl", at_least=float("inf")),
    ],
)
def test_one_finite_limit_is_needed(bound: Bound) -> None:
    with pytest.raises(ConfigError) as error:
        check_policy(Policy(bounds=(bound,)))
    assert error.value.code == "policy.contradiction"


@pytest.mark.parametrize("rate", [5e-324, 1e-160, 1e-7])
def test_a_rate_whose_records_cannot_be_counted_is_refused_before_anybody_counts(rate: float) -> None:
    with pytest.raises(ConfigError) as error:
        check_policy(Policy(bounds=(Bound(measure="reidentification", at_most=rate),)))
    assert error.value.code == "policy.contradiction"
    assert records_to_show(LEAST_RATE) < 4_000_000


def test_a_rate_of_0_may_be_asked_of_the_mean() -> None:
    policy = Policy(bounds=(Bound(measure="reidentification", at_most=0.0),), use="mean")
    assert check_policy(policy) == policy


def test_the_same_measure_by_two_adversaries_is_no_contradiction() -> None:
    assert len(parse_policy("ssim<=0.5, inverter.ssim<=0.3").bounds) == 2


@pytest.mark.parametrize(
    "toml",
    [
        "",
        "bounds = []",
        'bounds = [{measure = "ssim", at_most = 0.3, hope = 1}]',
        'bounds = [{measure = "ssim", at_most = "0.3"}]',
        'bounds = [{measure = "ssim", at_most = 0.3, adversary = "friend"}]',
        'use = "luck"\nbounds = [{measure = "ssim", at_most = 0.3}]',
        "bounds = [" + "{measure = 'kl', at_least = 1}," * 17 + "]",
    ],
)
def test_toml_of_another_form_is_refused(toml: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_toml(toml.encode(), Policy, what="policy")
    assert error.value.code.startswith("policy.")


@pytest.mark.parametrize(
    ("text", "assumed"),
    [
        ("ssim<=0.3", []),
        ("ssim<=0.3, inverter.ssim<=0.3", []),
        ("ssim<=0.3, inverter.ssim<=0.2", ["FrontNet: it has own pictures"]),
        ("perceptual>=0.5, inverter.perceptual>=0.4", []),
        ("perceptual>=0.5, inverter.perceptual>=0.6", ["bound on perceptual"]),
        ("inverter.ssim<=0.3, inverter.psnr<=15, psnr<=20", ["bound on ssim, psnr"]),
        ("shadow.ssim<=0.3, inverter.psnr<=15", ["their IRs, which", "no picture with its IR"]),
        ("kl_ratio>=1", ["no bound is on an attack"]),
    ],
)
def test_what_a_policy_takes_for_granted(text: str, assumed: list[str]) -> None:
    said = weaker_adversary(parse_policy(text))
    assert len(said) == len(assumed)
    for part, sentence in zip(assumed, said, strict=True):
        assert part in sentence
        assert sentence.startswith("assumes that")
