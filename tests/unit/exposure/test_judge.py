"""A party's own assessment: its records in halves, cuts from the shallowest on, only what the policy asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.errors import DataError
from caltrain.exposure import judge as module
from caltrain.exposure.figures import Estimate
from caltrain.exposure.judge import judge
from caltrain.exposure.lineup import Lineup
from caltrain.exposure.material import Material
from caltrain.exposure.party_report import PartyReport
from caltrain.exposure.policy import Policy, parse_policy
from caltrain.exposure.subject import Cut
from support.assessment import hardly_computing
from support.exposed import TINY_DATA, subject
from support.samples import refused

SUBJECT, CUTS = subject(), (1, 2)


def records(count: int = 140) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *TINY_DATA.shape)).astype(np.uint8), np.arange(count) % 4


def judged(policy: Policy, *, count: int = 140, seed: int = 0, steps: list[str] | None = None) -> PartyReport:
    def noted(what: str, _done: int, _of: int) -> None:
        if steps is not None:
            steps.append(what)

    with hardly_computing():
        return judge(SUBJECT, CUTS, records(count), policy, budget="quick", seed=seed, on_step=noted)


def policy(text: str) -> Policy:
    return Policy(bounds=parse_policy(text).bounds, use="mean")


def test_it_reports_what_the_policy_bounds_at_every_cut() -> None:
    found = judged(policy("ssim<=1, inverter.psnr<=100, label_purity<=1"))
    assert set(found.figures) == set(CUTS)
    for figures in found.figures.values():
        assert {"whitebox.ssim", "inverter.psnr", "label_purity"} <= set(figures)
        assert not any(key.startswith(("shadow", "kl", "channel")) for key in figures)
    assert found.front == 1
    assert (found.model, found.budget, found.adversary_records) == (SUBJECT.digest, "quick", 70)


def test_bounds_that_need_no_attack_are_left_to_the_enclave() -> None:
    assert set(judged(policy("inverter.ssim<=1, kl_ratio>=100")).figures[1]) == {
        f"inverter.{name}" for name in ("psnr", "ssim", "perceptual", "reidentification")
    }


def test_a_policy_that_no_cut_meets_gives_no_front_and_says_by_how_much() -> None:
    found = judged(policy("inverter.psnr<=0.001"))
    assert found.front == 0
    assert {front: [miss.key for miss in misses] for front, misses in found.misses.items()} == {
        1: ["inverter.psnr"],
        2: ["inverter.psnr"],
    }


def test_every_cut_is_attacked_even_where_the_first_meets_the_policy() -> None:
    steps: list[str] = []
    assert judged(policy("inverter.ssim<=1"), steps=steps).front == 1
    assert steps == ["cut 1", "cut 2"]


def test_the_halves_have_no_record_in_common_and_differ_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Material] = []

    def figures(_cut: Cut, lineup: Lineup, *_: object, **__: object) -> dict[str, object]:
        seen.append(lineup.material)
        return {"inverter.ssim": Estimate(0, 0, 0, 32)}

    monkeypatch.setattr(module, "_figures", figures)
    for seed in (0, 1):
        judged(policy("inverter.ssim<=1"), seed=seed)
    own, others = ({row.numpy().tobytes() for row in rows} for rows in (seen[0].own, seen[0].candidates))
    assert len(own) == len(others) == 70
    assert not own & others
    assert not torch.equal(seen[0].targets, seen[-1].targets)


def test_a_rate_is_measured_on_as_many_records_as_it_takes_to_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def reconstruct(self: Any, _name: str, _cut: Cut) -> Tensor:
        counts.append(len(self.material.targets))
        picture: Tensor = self.material.targets * 0
        return picture

    monkeypatch.setattr(Lineup, "reconstruct", reconstruct)
    found = judged(parse_policy("reidentification<=0.06"), count=150)
    assert counts == [61, 61]
    assert found.front == 1


@pytest.mark.parametrize(("text", "count"), [("ssim<=1", 40), ("reidentification<=0.001", 140)])
def test_too_few_records_are_refused(text: str, count: int) -> None:
    with refused(DataError, "exposure.too-few"):
        judged(parse_policy(text), count=count)
