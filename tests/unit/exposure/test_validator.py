"""The judge: its pictures are adapted, and one that cannot judge is refused."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.exposure.subject import Subject
from caltrain.exposure.validator import Validator, accuracy_of, generator_as_validator, validator_of
from caltrain.models.layers import AvgPool, Conv, Linear
from caltrain.models.spec import ModelSpec
from caltrain.records.schema import DataSchema
from support.exposed import drawn, subject
from support.samples import refused

SPEC = ModelSpec(layers=(Conv(filters=6), AvgPool(), Linear(units=4)))


def judge(channels: int = 1, classes: int = 4, side: int = 8) -> Subject:
    spec = msgspec.structs.replace(SPEC, layers=(*SPEC.layers[:-1], Linear(units=classes)))
    return drawn(spec, DataSchema(shape=(channels, side, side), classes=tuple(f"c{i}" for i in range(classes))))


def pictures(count: int, channels: int = 1, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def labels_of(validator: Validator, shown: Tensor, right: int) -> Tensor:
    """Labels of which the first `right` are those that the validator gives."""
    own = validator.log_probabilities(shown).argmax(1)
    return torch.where(torch.arange(len(shown)) < right, own, (own + 1) % validator.classes)


def test_log_probabilities_are_those_of_the_model() -> None:
    validator, shown = Validator(judge()), pictures(700)  # more than one batch
    found = validator.log_probabilities(shown)
    assert found.exp().sum(1).tolist() == pytest.approx([1] * 700, abs=1e-5)
    assert torch.allclose(found, validator.subject.logits(shown).log_softmax(1), atol=0.05)


def test_a_divergence_stays_finite_however_sure_the_validator_is() -> None:
    own = judge()
    own.module[-1].linear.bias.data.add_(torch.tensor([1e30, 0, 0, 0]))  # type: ignore[union-attr, operator, unused-ignore]
    assert Validator(own).log_probabilities(pictures(2)).tolist() == [[0, -100, -100, -100]] * 2


def test_pictures_are_adapted_in_size_and_channels() -> None:
    grey, colour = Validator(judge(1)), Validator(judge(3))
    shown = pictures(5)
    assert grey.size == (8, 8)
    repeated = colour.log_probabilities(shown.repeat(1, 3, 1, 1))
    assert torch.allclose(colour.log_probabilities(shown), repeated, atol=1e-3)
    tinted = torch.cat([shown * 0.9, shown, shown * 1.1], dim=1)
    assert torch.allclose(grey.log_probabilities(tinted), grey.log_probabilities(shown), atol=0.02)
    doubled = shown.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(grey.log_probabilities(doubled), grey.log_probabilities(shown), atol=0.02)


def test_channels_that_cannot_be_adapted_are_refused() -> None:
    with refused(ConfigError, "exposure.validator-shape"):
        Validator(judge(3)).log_probabilities(pictures(2, channels=2))
    with refused(ConfigError, "exposure.validator-shape"):
        validator_of(judge(3), judge(2), pictures(9, channels=2), torch.zeros(9, dtype=torch.long))


def test_other_classes_are_refused() -> None:
    with refused(ConfigError, "exposure.validator-shape"):
        validator_of(judge(classes=5), judge(), pictures(9), torch.zeros(9, dtype=torch.long))


def test_a_validator_below_four_fifths_is_refused_and_one_at_them_is_not() -> None:
    own, shown = judge(), pictures(10)
    with refused(ConfigError, "exposure.weak-validator"):
        validator_of(own, judge(), shown, labels_of(Validator(own), shown, 7))
    accuracy = validator_of(own, judge(), shown, labels_of(Validator(own), shown, 8)).accuracy
    assert accuracy is not None
    assert (accuracy.value, accuracy.n) == (0.8, 10)


def test_the_assessed_model_may_judge_itself_however_weak() -> None:
    generator = subject()
    own = generator_as_validator(generator)
    shown = torch.rand(10, *generator.shape)
    assert own.subject is generator
    assert accuracy_of(own, shown, labels_of(own, shown, 3)).value == 0.3
