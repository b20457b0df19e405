"""A whole assessment of a small model: every figure where it belongs, and refusals before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
import torch

from caltrain.errors import CaltrainError, ConfigError, DataError
from caltrain.exposure.asked import ATTACKS, Asked, check_asked
from caltrain.exposure.assess import Assessor
from caltrain.exposure.attacks.labels import head_groups
from caltrain.exposure.defence_spec import parse_defence
from caltrain.exposure.material import Material
from caltrain.exposure.policy import ADVERSARIES, parse_policy
from caltrain.exposure.report import ExposureReport
from caltrain.exposure.validator import Validator, validator_of
from support.assessment import digits_material, digits_model, hardly_computing, ticks
from support.exposed import TINY_DATA, drawn, subject
from support.samples import refused

CUTS = (1, 3)
ASKED = Asked(
    cuts=CUTS,
    kl_inputs=16,
    maps=4,
    policy=parse_policy("ssim<=0.5, kl_ratio>=0"),
    defences=(parse_defence("noise=4"),),
)


class Finished:
    """An assessment that is over, and what it told of itself."""

    def __init__(self) -> None:
        subject = digits_model()
        self.material = digits_material(subject, own=300)
        self.steps: list[tuple[str, int, int]] = []
        judge = validator_of(subject, subject, self.material.candidates, self.material.labels)
        self.assessor = Assessor(
            subject,
            self.material,
            ASKED,
            validator=judge,
            clock=ticks(),
            on_step=lambda *step: self.steps.append(step),
        )
        self.report = self.assessor.run(data="digits", threads=1)


@pytest.fixture(scope="module")
def finished() -> Iterator[Finished]:
    with hardly_computing():
        yield Finished()


def test_every_cut_has_every_figure_beside_its_cost(finished: Finished) -> None:
    report = finished.report
    assert tuple(report.cuts) == CUTS
    for front, cut in report.cuts.items():
        assert cut.cost.front == front
        assert cut.speed is not None
        assert cut.kl is not None
        assert cut.labels is not None
        assert set(cut.plain) == {"channel_correlation", "distance_correlation"}
        assert set(cut.attacks) == set(ADVERSARIES)
        assert set(cut.seconds) == {*ADVERSARIES, "labels", "kl"}
        assert all(seconds > 0 for seconds in cut.seconds.values())
        assert cut.attacks["whitebox"].ssim.n == 16
        assert cut.attacks["whitebox"].candidates == 100
        assert cut.labels.purity.n == cut.labels.gradients.purity.n == 100
    assert report.head_gradients == head_groups(digits_model(), finished.material.widened(), seed=ASKED.seed)


def test_a_shallow_cut_of_a_trained_model_leaks_and_the_floors_do_not(finished: Finished) -> None:
    report = finished.report
    assert report.cuts[1].attacks["whitebox"].ssim.value > 0.7
    assert report.cuts[1].attacks["whitebox"].reidentification.value > 0.9
    for floor in report.floors.values():
        assert floor.ssim.value < 0.5
        assert floor.reidentification.value < 0.1
    assert report.floor_at["whitebox.ssim"] != 1


def test_accuracy_is_measured_on_all_candidates(finished: Finished) -> None:
    assert finished.report.accuracy.n == 100
    assert finished.report.accuracy.value > 0.8
    assert finished.report.judge is not None
    assert finished.report.judge.accuracy == finished.report.accuracy


def test_a_policy_chooses_and_a_defence_stands_at_the_cut_with_its_price(finished: Finished) -> None:
    report = finished.report
    assert report.choice is not None
    (defence,) = report.defences
    assert defence.front == (report.choice.front or report.choice.nearest)
    assert defence.defence == "noise=4"
    assert set(defence.attacks) == set(ADVERSARIES)
    assert defence.accuracy.value < report.accuracy.value
    assert defence.tuned.n == 100


def test_the_gallery_has_a_picture_for_every_cell(finished: Finished) -> None:
    gallery = finished.assessor.gallery
    assert torch.equal(gallery.inputs, finished.material.targets[:8])
    assert set(gallery.maps) == set(CUTS)
    assert set(gallery.pictures) == {(front, name) for front in CUTS for name in ADVERSARIES}
    assert all(pictures.shape == gallery.inputs.shape for pictures in gallery.pictures.values())
    assert all(maps.shape == (8, 1, 8, 8) for maps in gallery.maps.values())


def test_progress_rises_to_its_end(finished: Finished) -> None:
    done = [step[1] for step in finished.steps]
    assert done == sorted(done)
    assert finished.steps[-1][1] == finished.steps[-1][2]
    assert {"kl", "cut 1: whitebox", "cut 3: labels", "cut 3: correlation"} <= {step[0] for step in finished.steps}


def test_the_report_survives_json(finished: Finished) -> None:
    again = msgspec.json.decode(msgspec.json.encode(finished.report), type=ExposureReport)
    assert again.digest() == finished.report.digest()


def test_one_attack_alone_brings_nothing_of_the_others() -> None:
    with hardly_computing():
        model = subject()
        report = Assessor(model, few(), Asked(attacks=("inverter",)), validator=None, clock=ticks()).run(
            data="noise", threads=1
        )
    assert {name for cut in report.cuts.values() for name in cut.attacks} == {"inverter"}
    assert all(cut.kl is None and cut.labels is None for cut in report.cuts.values())
    assert report.head_gradients is None
    assert (report.judge, report.papers_cut, report.choice, report.broken) == (None, None, None, {})


def test_kl_alone_reconstructs_nothing() -> None:
    with hardly_computing():
        made = Assessor(subject(), few(), Asked(attacks=("kl",), cuts=(2,)), validator=None, clock=ticks())
        report = made.run(data="noise", threads=1)
    assert report.cuts[2].attacks == {}
    assert report.floor_at == {}
    assert made.gallery.pictures == {}


def few(targets: int = 12, candidates: int = 40) -> Material:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand((80 + candidates, *subject().shape), generator=generator)
    labels = torch.arange(len(pictures)) % 4
    return Material(pictures[:80], labels[:80], pictures[80:][:targets], labels[80:], pictures[80:])


REFUSED: dict[str, tuple[Asked, type[CaltrainError], str]] = {
    "an attack that is none": (Asked(attacks=("kl", "magic")), ConfigError, "exposure.unknown-attack"),
    "no attack": (Asked(attacks=()), ConfigError, "exposure.unknown-attack"),
    **{
        f"a tolerance of {value}": (Asked(tolerance=value), ConfigError, "exposure.tolerance")
        for value in (math.nan, math.inf, -0.1)
    },
    "a cut that is none": (Asked(cuts=(1, 5)), ConfigError, "exposure.cut"),
    "a bound on kl without kl": (
        Asked(attacks=("inverter",), policy=parse_policy("kl_ratio>=1")),
        ConfigError,
        "policy.not-measured",
    ),
    "a bound on another attack": (
        Asked(attacks=("kl", "inverter"), policy=parse_policy("ssim<=0.3")),
        ConfigError,
        "policy.not-measured",
    ),
    "a bound on labels": (
        Asked(attacks=("kl",), policy=parse_policy("label_purity<=0.3")),
        ConfigError,
        "policy.not-measured",
    ),
    "a rate that so few cannot show": (
        Asked(policy=parse_policy("reidentification<=0.02")),
        DataError,
        "exposure.too-few-for-policy",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(name: str) -> None:
    asked, family, code = REFUSED[name]
    with refused(family, code):
        Assessor(subject(), few(), asked, validator=None, clock=ticks())


def test_labels_need_enough_candidates() -> None:
    ten = drawn(subject().spec, TINY_DATA)
    scarce = replace(few(), candidates=few().candidates[:7], targets=few().targets[:7])
    with refused(DataError, "exposure.too-few"):
        check_asked(ten, Asked(attacks=("labels",)), scarce)
    check_asked(ten, Asked(attacks=("kl",)), scarce)


def test_every_measure_of_a_policy_can_be_asked_for() -> None:
    text = (
        "ssim<=1, inverter.psnr<=100, shadow.perceptual>=0, reidentification<=1, kl>=0, kl_ratio>=0, "
        "channel_correlation<=1, distance_correlation<=1, label_purity<=1"
    )
    check_asked(subject(), Asked(attacks=ATTACKS, policy=parse_policy(text)), few())


def test_without_a_validator_the_model_judges_itself() -> None:
    made = Assessor(subject(), few(), Asked(), validator=None, clock=ticks())
    assert isinstance(made.validator, Validator)
    assert made.validator.accuracy is None
