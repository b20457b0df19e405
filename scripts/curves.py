"""Protected training beside plain PyTorch on CIFAR-10, epoch by epoch: top-1 and top-2 on records that neither saw.

    python scripts/curves.py FOLDER --model cifar10-18-layer --records 4000 --epochs 6 --out docs/curves

FOLDER holds CIFAR-10 as Parquet or as its own archive. The protected run is the real enclave program; its figures are
those that the enclave measures itself on sealed held-out records. The plain loop then repeats the run with the seed
that the run reveals; the script says whether the final weights are the same bits, and writes FIGURES.json and .svg.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from caltrain.bench.protected import protected_run
from caltrain.host.device import Device
from caltrain.models.network import Network
from caltrain.models.weights import state_of
from caltrain.presets import STARTS, Preset
from caltrain.records.readers.named import load
from caltrain.reports.plot import line_plot
from caltrain.training.batches import center_crop, normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

Records = tuple[Tensor, Tensor]
Figures = list[tuple[float, float]]


def main() -> int:
    """Train twice, compare, write."""
    asked = _arguments()
    torch.set_num_threads(2)
    preset = _preset(asked.model, asked.batch, asked.epochs, asked.learning_rate)
    train, test = _records(asked.folder, asked.records, asked.test_records)
    protected, state, seed, seconds = _protected(preset, train, test)
    plain: Figures = []
    began = time.time()
    model = train_plain(
        preset.model,
        preset.partition,
        preset.data,
        preset.training,
        pixels=train[0],
        labels=train[1],
        seeds=RunSeeds.from_run_seed(seed),
        on_epoch=lambda epoch, network: plain.append(_measure(f"plain {epoch + 1}", network, preset, test)),
    )
    own = state_of(model)
    same = state.keys() == own.keys() and all(torch.equal(value, own[name]) for name, value in state.items())
    result = {
        "model": asked.model,
        "records": asked.records,
        "test_records": asked.test_records,
        "batch": asked.batch,
        "cut": preset.partition.front,
        "weights_identical": same,
        "simulated": True,
        "protected_seconds": round(seconds, 1),
        "plain_seconds": round(time.time() - began, 1),
        "protected": [{"top1": a, "top2": b} for a, b in protected],
        "plain": [{"top1": a, "top2": b} for a, b in plain],
    }
    asked.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".svg").write_text(_plot(asked, protected, plain), encoding="utf-8")
    print(json.dumps(result))
    return 0 if same else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(STARTS), default="cifar10-18-layer")
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--test-records", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--out", type=Path, required=True, help="without its ending")
    return parser.parse_args()


def _preset(name: str, batch: int, epochs: int, learning_rate: float | None) -> Preset:
    preset = next(preset for start, preset in STARTS.items() if start == name)
    rate = learning_rate or preset.training.learning_rate
    training = msgspec.structs.replace(preset.training, batch=batch, epochs=epochs, learning_rate=rate)
    return msgspec.structs.replace(preset, training=training)


def _records(folder: Path, train: int, test: int) -> tuple[Records, Records]:
    split = load("cifar10", folder, download=False)
    return tuple(  # type: ignore[return-value]
        (torch.from_numpy(part.images[:count].copy()), torch.from_numpy(part.labels[:count].copy()))
        for part, count in ((split.train, train), (split.test, test))
    )


def _protected(preset: Preset, train: Records, test: Records) -> tuple[Figures, dict[str, Tensor], bytes, float]:
    figures: Figures = []
    with protected_run(preset, name="curves") as run:
        center = run.ingest(*train, Device.cpu(), held_out=test)
        began = time.time()
        for epoch in range(preset.training.epochs):
            done = run.train_epoch(epoch)
            if done.held_out is not None:
                figures.append((done.held_out.top1, done.held_out.top2))
                print(f"protected {epoch + 1}: loss {done.loss:.4f}, {figures[-1]}", flush=True)
        seconds = time.time() - began
        state, seed = run.release(center.center)
    return figures, dict(state), seed, seconds


def _measure(name: str, model: Network, preset: Preset, test: Records) -> tuple[float, float]:
    pixels, labels = test
    model.eval()
    first = second = 0
    with torch.inference_mode():
        for part, own in zip(torch.split(pixels, 256), torch.split(labels, 256), strict=True):
            x = normalise(
                center_crop(part, preset.model.size), preset.data, channels_last=preset.training.channels_last
            )
            right = model(x).topk(2).indices == own[:, None]
            first, second = first + int(right[:, 0].sum()), second + int(right.any(1).sum())
    model.train()
    figures = (first / len(labels), second / len(labels))
    print(f"{name}: {figures}", flush=True)
    return figures


def _plot(asked: argparse.Namespace, protected: Figures, plain: Figures) -> str:
    lines = {
        f"{name} top-{n + 1}": [(float(epoch + 1), row[n]) for epoch, row in enumerate(rows)]
        for n in (0, 1)
        for name, rows in (("protected", protected), ("plain", plain))
    }
    title = f"{asked.model}, {asked.records} records of CIFAR-10, {asked.test_records} held out"
    return line_plot(lines, title=title, x="epoch", y="share right")


if __name__ == "__main__":
    raise SystemExit(main())
