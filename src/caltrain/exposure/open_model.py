"""The model of an assessment from what its owner has: a run's folder, a model's folder, or Darknet's two files."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from caltrain.crypto.digests import Digest
from caltrain.errors import UNDECODABLE, ConfigError, IntegrityError
from caltrain.exposure.subject import Subject, subject_of
from caltrain.files import read_bounded, write_whole
from caltrain.models.darknet import read_cfg
from caltrain.models.darknet_text import MAX_CFG_BYTES
from caltrain.models.darknet_weights import read_weights
from caltrain.models.spec import MAX_WEIGHTS, ModelSpec
from caltrain.models.weights import State, decode_state, encode_state, state_of
from caltrain.models.wheel import stages_of
from caltrain.plan import MAX_PLAN_BYTES, plan_from_json
from caltrain.records.schema import DataSchema

_STEP = "open model"
_MAX_WEIGHT_BYTES = 4 * MAX_WEIGHTS + (64 << 20)
_KINDS = (
    "Give the folder of a joined run (plan.json, run.json, model.safetensors), a folder with model.json and "
    "model.safetensors, or a Darknet .cfg with --weights."
)


class ModelFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`model.json`: architecture, and the schema of its records."""

    model: ModelSpec
    data: DataSchema


class _RunRecord(msgspec.Struct):
    """Of a party's `run.json`: the digest that the enclave signed."""

    model: Digest


_T = TypeVar("_T")


def open_subject(path: Path, *, weights: Path | None = None, wheel: bytes | None = None) -> Subject:
    """The model at `path`; with its stages from `wheel`, of a cfg with `weights` (.weights or .safetensors).

    Raises ConfigError `exposure.unreadable-model` or `exposure.weights`, IntegrityError `exposure.other-digest` for
    weights that are not those of run.json, and what reading plans, cfg files, weights and wheels raises.
    """
    if path.suffix == ".cfg":
        return _from_darknet(path, weights)
    if weights is not None:
        raise _misused(f"{path} is no .cfg, and so has its weights beside it")
    if _is_file(path / "plan.json"):
        return _from_run(path, wheel)
    if _is_file(path / "model.json"):
        file = _decoded(path / "model.json", ModelFile)
        return subject_of(file.model, file.data, _state(path), factory=stages_of(wheel, file.model))
    raise _unreadable(f"{path} has neither plan.json nor model.json")


def save_subject(subject: Subject, folder: Path) -> None:
    """Write model.safetensors and model.json for `open_subject`. Raises EnvironmentFault `file.not-written`."""
    write_whole(folder / "model.safetensors", encode_state(state_of(subject.module)))
    write_whole(folder / "model.json", msgspec.json.encode(ModelFile(model=subject.spec, data=subject.data)))


def _from_darknet(path: Path, weights: Path | None) -> Subject:
    """Records have the file's size, classes are named by their numbers."""
    if weights is None:
        raise _misused(f"{path} says nothing of the weights")
    cfg = read_cfg(read_bounded(path, limit=MAX_CFG_BYTES))
    names = tuple(str(number) for number in range(cfg.classes))
    data = DataSchema(shape=cfg.record, classes=names, mean=(cfg.mean,), std=(cfg.std,))
    if weights.suffix == ".safetensors":
        state: State = decode_state(read_bounded(weights, limit=_MAX_WEIGHT_BYTES), step=_STEP)
    else:
        state = read_weights(weights, cfg.model, cfg.record)
    return subject_of(cfg.model, data, state)


def _from_run(folder: Path, wheel: bytes | None) -> Subject:
    plan = plan_from_json(read_bounded(folder / "plan.json", limit=MAX_PLAN_BYTES))
    record = _decoded(folder / "run.json", _RunRecord)
    subject = subject_of(plan.model, plan.data, _state(folder), factory=stages_of(wheel, plan.model))
    if subject.digest != record.model:
        raise IntegrityError(
            "exposure.other-digest",
            f"the weights in {folder} are not those of {record.model}",
            step=_STEP,
            fix="Receive the model again: the file was changed after it was verified.",
        )
    return subject


def _state(folder: Path) -> State:
    return decode_state(read_bounded(folder / "model.safetensors", limit=_MAX_WEIGHT_BYTES), step=_STEP)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def _decoded(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(read_bounded(path, limit=MAX_PLAN_BYTES), type=kind)
    except UNDECODABLE as error:
        raise _unreadable(f"{path} was refused: {str(error)[:300]}") from None


def _unreadable(what: str) -> ConfigError:
    return ConfigError("exposure.unreadable-model", what, step=_STEP, fix=_KINDS)


def _misused(what: str) -> ConfigError:
    return ConfigError(
        "exposure.weights", what, step=_STEP, fix="Give --weights with a Darknet .cfg, and with nothing else."
    )
