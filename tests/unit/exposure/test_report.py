"""A report as data: the keys of a policy, a digest that binds everything, JSON there and back."""

from __future__ import annotations

import msgspec
import pytest

from caltrain.exposure.report import ExposureReport
from support.exposure_report import about, cut_report, exposure_report, scored

REPORT = exposure_report()


def test_figures_have_the_keys_of_a_policys_bounds() -> None:
    found = cut_report(2, {"shadow": scored(0.4)}, ratio=1.1).figures()
    assert set(found) == {
        *("channel_correlation", "distance_correlation", "kl", "kl_ratio"),
        *("shadow.psnr", "shadow.ssim", "shadow.perceptual", "shadow.reidentification"),
    }
    assert found["shadow.ssim"].value == 0.4
    assert found["kl_ratio"].value == 1.1


def test_a_cut_costs_its_compute_or_its_layers_where_that_is_hidden() -> None:
    assert cut_report(7, compute=0.25).price == 0.25
    assert cut_report(7, compute=0.0).price == 0.0
    assert cut_report(7, compute=None).price == 7.0


def test_it_survives_json_and_keeps_its_digest() -> None:
    again = msgspec.json.decode(msgspec.json.encode(REPORT), type=ExposureReport)
    assert again == REPORT
    assert again.digest() == REPORT.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"data": "others"},
        {"accuracy": about(0.951)},
        {"cuts": {1: REPORT.cuts[1]}},
        {"cuts": REPORT.cuts | {3: cut_report(3, {"whitebox": scored(0.2)}, ratio=1.4)}},
        {"broken": {}},
        {"model": "sha256:" + "3" * 64},
    ],
)
def test_its_digest_binds_what_it_says(change: dict[str, object]) -> None:
    assert msgspec.structs.replace(REPORT, **change).digest() != REPORT.digest()
