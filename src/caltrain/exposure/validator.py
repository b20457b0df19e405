"""The network that judges pictures and maps (arXiv:1807.00969, IRValNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.exposure.figures import Estimate
from caltrain.exposure.maps import Size
from caltrain.exposure.precision import fast
from caltrain.exposure.statistics import rate_estimate
from caltrain.exposure.subject import Subject

LEAST_ACCURACY = 0.8
_BATCH = 512
_PIXELS = _BATCH * 32 * 32
_LEAST_LOG = -100.0  # so that no divergence is infinite
_STEP = "load validator"


class Validator:
    """A classifier of pictures of any size, and of grey maps. `accuracy` is None until it is measured."""

    def __init__(self, subject: Subject, accuracy: Estimate | None = None) -> None:
        self.subject, self.accuracy = subject, accuracy

    @property
    def classes(self) -> int:
        """How many classes it knows."""
        return len(self.subject.data.classes)

    @property
    def size(self) -> Size:
        """Height and width of the pictures that it takes."""
        return self.subject.shape[1], self.subject.shape[2]

    def log_probabilities(self, pictures: Tensor) -> Tensor:
        """Natural logarithms (N, classes) float32 for pictures or grey maps (N, C, H, W) in 0..1.

        Computed in bfloat16 where the processor has it. Raises ConfigError `exposure.validator-shape` for a number of
        channels that cannot be made its own.
        """
        height, width = self.size
        batch = max(1, min(_BATCH, _PIXELS // (height * width)))
        with torch.inference_mode(), fast():
            logits = [self.subject.logits(self._adapted(part)).float() for part in torch.split(pictures, batch)]
        return F.log_softmax(torch.cat(logits), dim=1).clamp(min=_LEAST_LOG)

    def _adapted(self, pictures: Tensor) -> Tensor:
        """In its own size (bilinear) and channels: a grey one repeated, one in colour averaged."""
        own, given = self.subject.shape[0], pictures.shape[1]
        check_channels(given, own)
        if pictures.shape[2:] != self.size:
            pictures = F.interpolate(pictures, size=self.size, mode="bilinear", align_corners=False)
        if own == given:
            return pictures
        return pictures.expand(-1, own, -1, -1) if given == 1 else pictures.mean(1, keepdim=True)


def validator_of(subject: Subject, generator: Subject, pictures: Tensor, labels: Tensor) -> Validator:
    """`subject` as the judge of `generator`, on whose labelled pictures (N, C, H, W), (N,) its accuracy is measured.

    Raises ConfigError `exposure.validator-shape` where classes or channels do not fit, `exposure.weak-validator`
    below an accuracy of 0.8.
    """
    if len(subject.data.classes) != len(generator.data.classes):
        raise _misfit(f"{len(subject.data.classes)} classes, the assessed model {len(generator.data.classes)}")
    check_channels(generator.shape[0], subject.shape[0])
    accuracy = accuracy_of(Validator(subject), pictures, labels)
    if accuracy.value < LEAST_ACCURACY:
        raise ConfigError(
            "exposure.weak-validator",
            f"the validator is right on {accuracy.value:.1%} of {accuracy.n} pictures, {LEAST_ACCURACY:.0%} are needed",
            step=_STEP,
            fix="Train the validator longer, on data of the same kind, or let the assessed model judge itself.",
        )
    return Validator(subject, accuracy)


def generator_as_validator(subject: Subject) -> Validator:
    """The assessed model as its own judge (US 11,886,989, claim 1: same architecture, same weights). Never too weak."""
    return Validator(subject)


def accuracy_of(validator: Validator, pictures: Tensor, labels: Tensor) -> Estimate:
    """Share of pictures (N, C, H, W) that it gives their labels (N,)."""
    right = validator.log_probabilities(pictures).argmax(1) == labels
    return rate_estimate(int(right.sum()), len(right))


def check_channels(given: int, own: int) -> None:
    """Raise ConfigError unless pictures with `given` channels can be shown to a network that takes `own`."""
    if own != given and 1 not in (own, given):
        raise _misfit(f"{own} channels, the pictures {given}")


def _misfit(what: str) -> ConfigError:
    return ConfigError(
        "exposure.validator-shape",
        f"the validator has {what}",
        step=_STEP,
        fix="Give a validator for the classes of the assessed model, and for grey pictures or its number of channels.",
    )
