"""Use a model that a party has received and joined. Imports torch, which the rest of this package does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.errors import UNDECODABLE, ConfigError, DataError, IntegrityError
from caltrain.models.network import Network, build, features_and_logits, lay_out
from caltrain.models.weights import decode_state, load_zone, model_digest
from caltrain.models.wheel import stages_of
from caltrain.participant.receive import RunRecord
from caltrain.plan import Plan, plan_from_json
from caltrain.training.batches import center_crop, normalise

_BATCH = 256
_STEP = "load model"


@dataclass(frozen=True)
class JoinedModel:
    """A model in eval mode with the plan and run that it came from."""

    plan: Plan
    record: RunRecord
    module: Network

    def predict(self, images: NDArray[np.generic]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Classes (N,) and probabilities (N, classes) of images (N, C, H, W) of the plan's element type."""
        if images.shape[1:] != self.plan.data.shape or images.dtype != self.plan.data.numpy_dtype:
            raise DataError(
                "predict.shape",
                f"inputs of {images.shape} {images.dtype}, the plan has {self.plan.data.shape} {self.plan.data.dtype}",
                step="predict",
                fix="Convert the inputs to the plan's shape and element type.",
            )
        probabilities = predict(self.module, self.plan, images)
        return probabilities.argmax(1), probabilities


def predict(module: Network, plan: Plan, images: NDArray[np.generic]) -> NDArray[np.float32]:
    """Probabilities (N, classes), in batches of 256 so that a row's bits depend on its place in them alone."""
    return embed(module, plan, images)[1]


def embed(module: Network, plan: Plan, images: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fingerprints (N, D) of length one and probabilities (N, classes) of at least one image, as `predict` batches."""
    torch.set_num_threads(plan.training.threads)
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            part = torch.from_numpy(np.array(images[start : start + _BATCH]))
            part = center_crop(part, plan.model.size)
            x = normalise(part, plan.data, channels_last=plan.training.channels_last)
            found.append(features_and_logits(module, plan.model, x))
    fingerprints, logits = (torch.cat(each) for each in zip(*found, strict=True))
    return fingerprints.numpy(), logits.softmax(1).numpy()


def load_model(folder: Path, *, wheel: bytes | None = None) -> JoinedModel:
    """Read a run folder of a party; where the plan names a wheel of stages, with that.

    Raises ConfigError `model.unreadable` or `model.no-wheel`, IntegrityError `model.other-digest`, for bad weights, or
    for another wheel.
    """
    try:
        plan = plan_from_json((folder / "plan.json").read_bytes())
        record = msgspec.json.decode((folder / "run.json").read_bytes(), type=RunRecord)
        raw = (folder / "model.safetensors").read_bytes()
    except (OSError, *UNDECODABLE) as error:
        raise ConfigError(
            "model.unreadable",
            f"{folder} does not hold a joined model: {error}",
            step=_STEP,
            fix="Give the folder that `caltrain party join` wrote under runs/.",
        ) from None
    state = decode_state(raw, step=_STEP)
    if model_digest(plan.model, state) != record.model:
        raise IntegrityError(
            "model.other-digest",
            f"the weights in {folder} are not those of {record.model}",
            step=_STEP,
            fix="Receive the model again: the file was changed after it was verified.",
        )
    module = build(plan.model, input_shape=plan.data.shape, factory=stages_of(wheel, plan.model))
    load_zone(module, state, step=_STEP)
    lay_out(module, channels_last=plan.training.channels_last)
    module.eval()
    return JoinedModel(plan, record, module)
