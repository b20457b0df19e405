"""The default validator: a small residual network, trained on the adversary's own records (arXiv:1807.00969)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.exposure.material import Material
from caltrain.exposure.precision import fast
from caltrain.exposure.subject import Subject, subject_of
from caltrain.exposure.validator import Validator, accuracy_of, validator_of
from caltrain.models.network import Network
from caltrain.models.spec import Partition
from caltrain.models.weights import state_of
from caltrain.models.zoo import resnet9_28
from caltrain.records.schema import DataSchema
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from caltrain.training.spec import Augment, TrainingSpec

ENOUGH = 0.87
_SIZE = 28
_HELD = 1000
_BATCH = 64
_LEAST_STEPS, _LEAST_EPOCHS = 1500, 8
OnStep = Callable[[int, int], None]


def train_validator(
    subject: Subject,
    material: Material,
    *,
    seed: int,
    threads: int,
    on_step: OnStep = lambda _done, _of: None,
) -> Validator:
    """Train until it is right on 87 % of own records that were kept back, or for at most eight epochs or 1,500 steps.

    It sees the pictures that `subject` sees, brought to 28x28, and shares no weights with it. Its accuracy is then
    measured on the candidates: raises ConfigError `exposure.weak-validator` below 0.8.
    """
    schema = _schema(subject)
    pixels, labels = _pixels(material.own), material.own_labels
    held = max(1, min(_HELD, len(labels) // 10))
    training = _training(subject, len(labels) - held, threads=threads)
    total = training.epochs * ((len(labels) - held) // training.batch)
    spec = resnet9_28(len(schema.classes), width=16 if subject.shape[0] == 1 else 48)

    def enough(_epoch: int, model: Network) -> bool:
        trained = Validator(subject_of(spec, schema, state_of(model)))
        return accuracy_of(trained, material.own[:held], labels[:held]).value >= ENOUGH

    done = 0

    def stepped(_epoch: int, _step: int, _loss: float) -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    with fast():
        model = train_plain(
            spec,
            Partition(front=1),
            schema,
            training,
            pixels=pixels[held:],
            labels=labels[held:],
            seeds=RunSeeds.from_run_seed(seed.to_bytes(32, "big")),
            on_step=stepped,
            on_epoch=enough,
        )
    made = subject_of(spec, schema, state_of(model))
    return validator_of(made, subject, material.candidates, material.labels)


def _schema(subject: Subject) -> DataSchema:
    shape = (subject.shape[0], _SIZE, _SIZE)
    return DataSchema(shape=shape, classes=subject.data.classes, mean=(0.5,), std=(0.25,))


def _training(subject: Subject, records: int, *, threads: int) -> TrainingSpec:
    batch = min(_BATCH, records)
    epochs = max(_LEAST_EPOCHS, math.ceil(_LEAST_STEPS / max(records // batch, 1)))
    # Only pictures in colour are mirrored: digits and lungs have a left and a right.
    augment = Augment(flip=subject.shape[0] == 3, shift=1)
    return TrainingSpec(
        epochs=min(epochs, 10_000),
        batch=batch,
        learning_rate=0.015,
        weight_decay=5e-4,
        augment=augment,
        threads=threads,
    )


def _pixels(pictures: Tensor) -> Tensor:
    """Pictures (N, C, H, W) in 0..1 as records (N, C, 28, 28) u8."""
    if tuple(pictures.shape[2:]) != (_SIZE, _SIZE):
        parts = torch.split(pictures, _HELD)
        sized = (F.interpolate(part, size=(_SIZE, _SIZE), mode="bilinear", antialias=True) for part in parts)
        pictures = torch.cat(list(sized))
    return (pictures * 255).round().to(torch.uint8)
