"""The model that both hosts serve: a preset's network or a Darknet cfg with random weights, or one that was trained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from caltrain.attestation.measurement import measure_enclave
from caltrain.bench.serving_pair import USER, Contest
from caltrain.crypto.dsse import SigningKey
from caltrain.exposure.open_model import open_subject, save_subject
from caltrain.exposure.subject import Subject, candidate_cuts, subject_of
from caltrain.files import read_bounded
from caltrain.models import imagenet
from caltrain.models.darknet import read_cfg
from caltrain.models.darknet_text import MAX_CFG_BYTES
from caltrain.models.layers import has_weights
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import state_of
from caltrain.owner.package import package_model
from caltrain.presets import STARTS
from caltrain.records.schema import DataSchema
from caltrain.serving.package import Across, BatchSpec, ServedUser, Terms

_BUDGET = 1_000_000_000


def subject_for(model: str) -> Subject:
    """A preset or ImageNet network by name, a Darknet .cfg (all with random weights), or a model's folder."""
    if model in imagenet.NETWORKS:
        return _of_darknet(imagenet.NETWORKS[model](), imagenet.RECORD[model], imagenet.CLASSES, mean=0.0, std=1.0)
    start = next((preset for name, preset in STARTS.items() if name == model), None)
    if start is not None:
        return _drawn(start.model, start.data)
    path = Path(model)
    if path.suffix != ".cfg":
        return open_subject(path)
    cfg = read_cfg(read_bounded(path, limit=MAX_CFG_BYTES))
    return _of_darknet(cfg.model, cfg.record, cfg.classes, mean=cfg.mean, std=cfg.std)


def sweep_of(spec: ModelSpec, head: int, *, most: int = 12) -> list[int]:
    """At most so many of the cuts that leave a CenterNet, spread over the network."""
    last = len(spec.layers) - head
    possible = [cut for cut in candidate_cuts(spec) if any(has_weights(layer) for layer in spec.layers[cut:last])]
    return possible[:: -(-len(possible) // most)]


@contextmanager
def contest(
    subject: Subject, *, name: str, front: int, head: int, mapped: bool, batch: BatchSpec, across: Across, threads: int
) -> Iterator[Contest]:
    """Package a model for one measurement. Raises ConfigError `package.*`, `model.*`."""
    owner, user = SigningKey(), SigningKey()
    terms = Terms(
        name="bench",
        front=front,
        head=head,
        mapped=mapped,
        across=across,
        batch=batch,
        users=(ServedUser(name=USER, public_key=user.public, budget=_BUDGET),),
        measurement=measure_enclave(),
    )
    with TemporaryDirectory(prefix="caltrain-bench-") as folder:
        package, model, data_key = Path(folder) / "package", Path(folder) / "model", os.urandom(32)
        package_model(subject, terms, signer=owner, data_key=data_key, folder=package)
        save_subject(subject, model)
        yield Contest(name, package, model, owner, data_key, user, SigningKey(), threads)


def _of_darknet(spec: ModelSpec, record: tuple[int, int, int], classes: int, *, mean: float, std: float) -> Subject:
    names = tuple(str(number) for number in range(classes))
    return _drawn(spec, DataSchema(shape=record, classes=names, mean=(mean,), std=(std,)))


def _drawn(spec: ModelSpec, data: DataSchema) -> Subject:
    torch.manual_seed(0)
    return subject_of(spec, data, state_of(build(spec, input_shape=data.shape)))
