"""`caltrain new --cfg`, `--front`, `--head`, `--epochs`: a plan from a Darknet file, or a preset cut elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from caltrain.models.darknet import read_cfg
from caltrain.models.spec import Partition
from caltrain.plan import Plan, parse_plan
from caltrain.presets import NETWORKS, PRESETS
from support.commands import Cli

NETWORK = b"""[net]
height=28
width=28
channels=3
min_crop=32
max_crop=32
batch=16
max_batches=100
policy=poly
learning_rate=.1
[convolutional]
filters=4
size=3
pad=1
activation=leaky
[maxpool]
size=2
stride=2
[convolutional]
filters=8
size=3
activation=leaky
[dropout]
[convolutional]
filters=8
size=3
activation=leaky
[convolutional]
filters=10
size=1
activation=linear
[avgpool]
[softmax]
[cost]
"""


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "small.cfg"
    path.write_bytes(NETWORK)
    return path


def made(cli: Cli, folder: Path, *options: str | Path) -> Plan:
    shown = cli("new", folder, "--party", "ann", *options, as_json=True)
    assert (shown.code, shown.err) == (0, "")
    return parse_plan((folder / "plan.toml").read_bytes())


def test_model_hyper_parameters_and_schema_come_from_the_file(network: Path, tmp_path: Path, cli: Cli) -> None:
    plan, read = made(cli, tmp_path / "p", "--cfg", network, "--records", "160"), read_cfg(NETWORK)
    assert plan.name == "small with 1 parties"
    assert plan.model == read.model
    assert plan.training == read.training(records=160)
    assert plan.training.epochs == 10
    assert plan.data.shape == (3, 32, 32)
    assert plan.data.classes == tuple("0123456789")
    assert (plan.data.mean, plan.data.std) == ((0.0,), (1.0,))
    assert plan.partition == Partition(front=4, head=2)


def test_a_known_data_set_gives_the_schema_and_the_file_the_rest(network: Path, tmp_path: Path, cli: Cli) -> None:
    plan = made(
        cli, tmp_path / "p", "--cfg", network, "--data", "cifar10", "--epochs", "3", "--front", "1", "--head", "0"
    )
    assert plan.data == PRESETS["cifar10"].data
    assert plan.training == read_cfg(NETWORK).training(epochs=3)
    assert plan.partition == Partition(front=1)


def test_a_preset_has_its_own_model_and_another_cut_and_number_of_epochs(tmp_path: Path, cli: Cli) -> None:
    plan = made(cli, tmp_path / "p", "--data", "cifar10-18-layer", "--front", "6", "--epochs", "2")
    preset = NETWORKS["cifar10-18-layer"]
    assert plan.name == "cifar10-18-layer with 1 parties"
    assert (plan.model, plan.data) == (preset.model, preset.data)
    assert plan.partition == Partition(front=6, head=2)
    assert plan.training.epochs == 2


@pytest.mark.parametrize(
    ("text", "options", "code"),
    [
        (NETWORK, (), "darknet.no-epochs"),
        (NETWORK.replace(b"poly", b"steps"), ("--epochs", "1"), "darknet.unsupported"),
        (NETWORK + b"?", ("--epochs", "1"), "darknet.malformed"),
        (NETWORK, ("--epochs", "1", "--data", "digits"), "model.size"),
        (NETWORK, ("--epochs", "1", "--front", "0"), "model.cut-at-input"),
        (b"#" * 300_000, ("--epochs", "1"), "file.too-large"),
    ],
)
def test_a_file_that_cannot_be_used_makes_nothing(
    text: bytes, options: tuple[str, ...], code: str, network: Path, tmp_path: Path, cli: Cli
) -> None:
    network.write_bytes(text)
    shown = cli("new", tmp_path / "p", "--cfg", network, *options, as_json=True)
    assert (shown.code, shown.error["code"]) == (10, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.cfg"]


def test_a_number_of_records_without_a_file_says_nothing(tmp_path: Path, cli: Cli) -> None:
    shown = cli("new", tmp_path / "p", "--records", "3")
    assert shown.code == 2
    assert "only with --cfg" in shown.err
    assert not (tmp_path / "p").exists()
