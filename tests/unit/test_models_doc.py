"""The examples of docs/models.md work as they stand there."""

from __future__ import annotations

import hashlib
import io
import re
import tomllib
import zipfile
from pathlib import Path

import msgspec
import torch

from caltrain.models.blocks import block
from caltrain.models.layers import Layer, Stage
from caltrain.models.spec import ModelSpec, Partition, check_model, live_at
from caltrain.models.wheel import load_wheel
from caltrain.plan_summary import summarise
from support.members import Member
from support.tiny import tiny_plan

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def code(language: str, holding: str) -> str:
    """The one block in that language that holds this text."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if holding in text]
    return str(found)


def test_the_stage_is_what_its_entry_in_the_plan_says() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mystages/__init__.py", code("python", "class Block"))
    raw = buffer.getvalue()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    table = tomllib.loads(code("toml", "model.wheel").replace("sha256:...", digest))
    spec = msgspec.convert({"layers": table["model"]["layers"] * 2, "wheel": table["model"]["wheel"]}, ModelSpec)
    stage, wheel = spec.layers[0], spec.wheel
    assert isinstance(stage, Stage)
    assert wheel is not None
    module = block(0, stage, (32, 4, 4), load_wheel(raw, wheel))
    assert module(torch.zeros(3, 32, 4, 4)).shape == (3, *stage.shape)


def test_the_residual_network_can_be_cut_as_the_page_says() -> None:
    layers = msgspec.convert(tomllib.loads(code("toml", "shortcut"))["model"]["layers"], tuple[Layer, ...])
    model = ModelSpec(layers=layers)
    for front in (2, 3):
        check_model(model, Partition(front=front, head=1), input_shape=(3, 32, 32), classes=10)
    assert live_at(layers, 2) == (0, 1)
    assert live_at(layers, 3) == (2,)


def test_the_start_from_public_weights_is_said_by_plan_check() -> None:
    table = tomllib.loads(code("toml", "training.initial").replace("sha256:...", "sha256:" + "0" * 64))
    plan = tiny_plan([Member("alpha")], [], head=1, dtype="u8", epochs=1, budget=1, reveal=False)
    fields = msgspec.to_builtins(plan)
    fields["training"] |= table["training"]
    assert "the FrontNet is not secret" in str(summarise(msgspec.convert(fields, type(plan))).initial)
