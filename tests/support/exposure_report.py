"""Exposure reports by hand, and the pictures that go with them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from caltrain.exposure.assess import Gallery
from caltrain.exposure.attacks.labels import Groups, LabelFigures, Named, Told
from caltrain.exposure.cost import CutCost
from caltrain.exposure.figures import Estimate, KlFigures, Scores
from caltrain.exposure.report import CutReport, ExposureReport, Judge, Settings

MODEL, JUDGE = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def about(value: float, *, off: float = 0.02, n: int = 100) -> Estimate:
    """An estimate with its interval `off` to both sides."""
    return Estimate(value, value - off, value + off, n)


def scored(
    ssim: float = 0.1, *, reidentification: float = 0.0, psnr: float = 8.0, perceptual: float = 0.9, off: float = 0.02
) -> Scores:
    """Scores; those that are not given are no better than `FLOORS`."""
    return Scores(
        psnr=about(psnr, off=off),
        ssim=about(ssim, off=off),
        perceptual=about(perceptual, off=off),
        reidentification=about(reidentification, off=off),
        candidates=100,
    )


FLOORS = {"mean image": scored(0.2, psnr=9.0), "own draw": scored(0.1, perceptual=0.6)}


def judged(ratio: float) -> KlFigures:
    """The papers' measure with that ratio."""
    return KlFigures(
        channels=8,
        maps_used=4,
        kl=about(ratio),
        uniform=about(1.0),
        ratio=about(ratio),
        below=about(0.5),
        unrelated=about(0.7),
        quantiles=(0.1, 0.2, 0.3, 0.4, 0.5),
        sampling_error=about(0.01),
        most_telling=3,
    )


def grouped(purity: float) -> Groups:
    """Groups of that purity, half of which one known label names."""
    return Groups(purity=about(purity), floor=0.1, named=(Named(1, about(purity / 2)),))


def told(purity: float, gradients: float) -> LabelFigures:
    """What IRs, and gradients, of these purities tell."""
    groups, rest = grouped(purity), Told(about(0.5), 0.1)
    return LabelFigures(
        purity=groups.purity,
        floor=groups.floor,
        named=groups.named,
        gradients=grouped(gradients),
        probe=rest,
        bright=rest,
        rest=rest,
    )


def labelled(report: ExposureReport) -> ExposureReport:
    """The report, with what its cuts and a HeadNet tell of labels."""
    cuts = {front: msgspec.structs.replace(cut, labels=told(0.31, 0.86)) for front, cut in report.cuts.items()}
    settings = msgspec.structs.replace(report.settings, attacks=(*report.settings.attacks, "labels"))
    return msgspec.structs.replace(report, cuts=cuts, settings=settings, head_gradients=grouped(0.98))


def cut_report(
    front: int,
    attacks: Mapping[str, Scores] | None = None,
    *,
    ratio: float | None = None,
    layer: str = "conv 8 3x3",
    compute: float | None = 0.5,
) -> CutReport:
    """One cut, with the attacks' scores and the KL ratio that are given."""
    found = dict(attacks or {})
    return CutReport(
        cost=CutCost(front=front, layer=layer, compute=compute, weights=0.1, bytes_across=4096, ratio=2.5),
        plain={"channel_correlation": about(0.8), "distance_correlation": about(0.9)},
        kl=None if ratio is None else judged(ratio),
        attacks=found,
        seconds=dict.fromkeys(found, 1.5),
    )


def exposure_report(cuts: Mapping[int, CutReport] | None = None, *, data: str = "digits") -> ExposureReport:
    """A report of two cuts, or of those given, without a policy."""
    made = cuts or {
        1: cut_report(1, {"whitebox": scored(0.9, reidentification=1.0), "inverter": scored(0.7)}, ratio=0.3),
        3: cut_report(3, {"whitebox": scored(0.5, reidentification=0.6), "inverter": scored(0.1)}, ratio=1.4),
    }
    return ExposureReport(
        model=MODEL,
        data=data,
        accuracy=about(0.95),
        judge=Judge(model=JUDGE, accuracy=about(0.88)),
        settings=Settings(
            attacks=("kl", "whitebox", "inverter"),
            budget="quick",
            targets=16,
            candidates=100,
            own=1000,
            maps=4,
            tolerance=1.0,
            seed=0,
            threads=2,
        ),
        floors=FLOORS,
        cuts=dict(made),
        papers_cut=3,
        floor_at={f"{name}.{m}": None for name in ("whitebox", "inverter") for m in scored().__struct_fields__},
        spearman={"whitebox.ssim": -0.95},
        broken={3: ("whitebox",)},
    )


def gallery(report: ExposureReport) -> Gallery:
    """Four pictures for every cell of the report's grid."""
    generator = torch.Generator().manual_seed(0)
    made = Gallery(torch.rand((4, 3, 8, 8), generator=generator))
    for front, cut in report.cuts.items():
        made.maps[front] = torch.rand((4, 1, 8, 8), generator=generator)
        for name in cut.attacks:
            made.pictures[front, name] = torch.rand((4, 3, 8, 8), generator=generator)
    return made
