"""Train the models whose exposure docs/exposure.md reports, and the validators that judge their maps.

    python scripts/exposure_models.py DATA OUT [NAME ...]

DATA holds the data sets by name (`cifar10`, `mnist`, `pneumoniamnist`). Every model becomes a folder of OUT with
`model.json` (architecture and schema) and `model.safetensors`. The loop is the plain one in mixed precision, which
processors with bfloat16 units run several times as fast: what these runs give is no reference for equal bits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from caltrain.exposure.open_model import save_subject
from caltrain.exposure.precision import fast
from caltrain.exposure.subject import subject_of
from caltrain.models.network import Network
from caltrain.models.spec import Partition
from caltrain.models.weights import state_of
from caltrain.models.zoo import resnet9_28
from caltrain.presets import NETWORKS, PRESETS, NetworkName, Preset, PresetName
from caltrain.records.readers.named import load
from caltrain.training.batches import center_crop, normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from caltrain.training.spec import Augment, TrainingSpec

SEED = bytes(32)


def _sgd(epochs: int, rate: float, *, batch: int = 128, augment: Augment) -> TrainingSpec:
    return TrainingSpec(epochs=epochs, batch=batch, learning_rate=rate, weight_decay=5e-4, augment=augment)


def _validator(data: PresetName, *, width: int, epochs: int, flip: bool) -> tuple[str, Preset]:
    start = PRESETS[data]
    training = _sgd(epochs, 0.02, augment=Augment(flip=flip, shift=0 if data == "cifar10" else 1))
    model = resnet9_28(len(start.data.classes), width=width)
    return data, Preset(model=model, partition=Partition(front=1), data=start.data, training=training)


def _network(name: NetworkName, *, epochs: int, rate: float, augment: Augment) -> tuple[str, Preset]:
    return "cifar10", msgspec.structs.replace(NETWORKS[name], training=_sgd(epochs, rate, augment=augment))


MODELS: dict[str, tuple[str, Preset]] = {
    "mnist-validator": _validator("mnist", width=16, epochs=1, flip=False),
    "pneumoniamnist-validator": _validator("pneumoniamnist", width=16, epochs=6, flip=False),
    "mnist": ("mnist", PRESETS["mnist"]),
    "pneumoniamnist": ("pneumoniamnist", PRESETS["pneumoniamnist"]),
    "cifar10-validator": _validator("cifar10", width=48, epochs=4, flip=True),
    "cifar10-18-layer": _network("cifar10-18-layer", epochs=2, rate=0.05, augment=Augment(flip=True)),
    "cifar10-resnet18": _network("cifar10-resnet18", epochs=1, rate=0.02, augment=Augment(flip=True, shift=4)),
}


def main() -> int:
    """Train each, measure it on the test part, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    for name in asked.names or MODELS:
        _train(name, asked.data, asked.out / name, threads=asked.threads)
    return 0


def _train(name: str, data: Path, out: Path, *, threads: int) -> None:
    source, preset = MODELS[name]
    training = msgspec.structs.replace(preset.training, threads=threads)
    split = load(source, data / source, download=False)
    test = torch.from_numpy(split.test.images), torch.from_numpy(split.test.labels)
    began = time.monotonic()

    def shown(epoch: int, model: Network) -> None:
        right = _accuracy(model, preset, *test)
        print(f"{name} epoch {epoch + 1}: {right:.4f} right, {time.monotonic() - began:.0f} s", flush=True)

    def step(epoch: int, number: int, loss: float) -> None:
        if number % 50 == 0:
            print(f"{name} {epoch + 1}/{number}: {loss:.3f} {time.monotonic() - began:.0f} s", flush=True)

    with fast():
        model = train_plain(
            preset.model,
            preset.partition,
            preset.data,
            training,
            pixels=torch.from_numpy(split.train.images),
            labels=torch.from_numpy(split.train.labels),
            seeds=RunSeeds.from_run_seed(SEED),
            on_step=step,
            on_epoch=shown,
        )
    save_subject(subject_of(preset.model, preset.data, state_of(model)), out)


def _accuracy(model: Network, preset: Preset, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    right = 0
    with torch.inference_mode():
        for part, own in zip(torch.split(pixels, 256), torch.split(labels, 256), strict=True):
            x = normalise(center_crop(part, preset.model.size), preset.data, channels_last=True)
            right += int((model(x).argmax(1) == own).sum())
    model.train()
    return right / len(labels)


if __name__ == "__main__":
    raise SystemExit(main())
