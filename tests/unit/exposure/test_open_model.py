"""Models from files: each of the forms gives the same subject, and anything else says what a model may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from caltrain.errors import CaltrainError, ConfigError, IntegrityError
from caltrain.exposure.open_model import open_subject, save_subject
from caltrain.exposure.subject import Subject
from caltrain.files import read_bounded
from caltrain.models.darknet import read_cfg
from caltrain.models.weights import encode_state, state_of
from support.darknet_file import drawn_parts, weights_file
from support.exposed import drawn, subject
from support.samples import plan, refused

CFG = b"""[net]
height=8
width=6
channels=3
[convolutional]
batch_normalize=1
filters=4
size=3
pad=1
activation=leaky
[connected]
output=5
activation=linear
[softmax]
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_subject(subject(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """A run's folder as a party keeps it; of run.json only the digest is what it would be."""
    agreed, folder = plan(), tmp_path / "run"
    of = drawn(agreed.model, agreed.data)
    save_subject(of, folder)
    (folder / "model.json").unlink()
    (folder / "plan.json").write_bytes(msgspec.json.encode(agreed))
    (folder / "run.json").write_bytes(msgspec.json.encode({"manifest": {"run": "r"}, "model": of.digest, "head": "x"}))
    return folder


@pytest.fixture
def darknet(tmp_path: Path) -> Path:
    cfg = read_cfg(CFG)
    (tmp_path / "small.cfg").write_bytes(CFG)
    (tmp_path / "small.weights").write_bytes(weights_file(drawn_parts(cfg.model, cfg.record)))
    return tmp_path / "small.cfg"


def test_what_is_saved_is_opened_again(saved: Path) -> None:
    found, own = open_subject(saved), subject()
    assert (found.spec, found.data, found.digest) == (own.spec, own.data, own.digest)
    pictures = torch.rand(3, *own.shape)
    assert torch.equal(found.logits(pictures), own.logits(pictures))
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]


def test_a_joined_run_is_opened(joined: Path) -> None:
    agreed = plan()
    found = open_subject(joined)
    assert (found.spec, found.data) == (agreed.model, agreed.data)
    assert found.digest == drawn(agreed.model, agreed.data).digest


def test_a_joined_run_with_other_weights_is_refused(joined: Path) -> None:
    agreed = plan()
    other = state_of(drawn(agreed.model, agreed.data, seed=1).module)
    (joined / "model.safetensors").write_bytes(encode_state(other))
    with refused(IntegrityError, "exposure.other-digest"):
        open_subject(joined)


def test_darknets_two_files_are_opened(darknet: Path) -> None:
    found = open_subject(darknet, weights=darknet.with_suffix(".weights"))
    assert (found.shape, found.data.classes) == ((3, 8, 6), ("0", "1", "2", "3", "4"))
    pictures = torch.rand(2, *found.shape)
    torch.testing.assert_close(found.inputs(pictures), pictures)
    path = darknet.with_name("other.safetensors")
    path.write_bytes(encode_state(state_of(found.module)))
    again = open_subject(darknet, weights=path)
    assert again.digest == found.digest
    assert torch.equal(again.logits(pictures), found.logits(pictures))


def test_a_cfg_that_adjusts_its_pixels_keeps_doing_so(darknet: Path) -> None:
    darknet.write_bytes(CFG.replace(b"[convolutional]", b"[crop]\ncrop_height=8\ncrop_width=6\n[convolutional]", 1))
    found = open_subject(darknet, weights=darknet.with_suffix(".weights"))
    pictures = torch.rand(2, *found.shape)
    torch.testing.assert_close(found.inputs(pictures), 2 * pictures - 1)


def test_a_stage_needs_its_wheel(saved: Path) -> None:
    raw = msgspec.json.decode((saved / "model.json").read_bytes())
    raw["model"]["layers"][3] = {"type": "stage", "name": "mine", "shape": [64], "weights": 0}
    raw["model"]["wheel"] = {"sha256": "sha256:" + "0" * 64, "factory": "mine:make"}
    (saved / "model.json").write_bytes(msgspec.json.encode(raw))
    with refused(ConfigError, "model.no-wheel"):
        open_subject(saved)
    with refused(IntegrityError, "wheel.other-digest"):
        open_subject(saved, wheel=b"no wheel")


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_says_what_a_model_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file", tmp_path / ("x" * 300)):
        with refused(ConfigError, "exposure.unreadable-model") as caught:
            open_subject(path)
        for form in ("joined run", "model.json", "Darknet .cfg with --weights"):
            assert form in caught.value.fix


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[" * 100_000, b"{}", b'{"model": 1, "data": 2}'])
def test_a_damaged_description_is_refused(raw: bytes, saved: Path, joined: Path) -> None:
    (saved / "model.json").write_bytes(raw)
    (joined / "run.json").write_bytes(raw)
    for folder in (saved, joined):
        with refused(ConfigError, "exposure.unreadable-model") as caught:
            open_subject(folder)
        assert str(folder) in caught.value.what
        assert len(caught.value.what) < 600


def test_an_unknown_key_is_refused(saved: Path) -> None:
    raw = msgspec.json.decode((saved / "model.json").read_bytes())
    (saved / "model.json").write_bytes(msgspec.json.encode(raw | {"extra": 1}))
    with refused(ConfigError, "exposure.unreadable-model"):
        open_subject(saved)


def test_weights_belong_to_a_cfg_and_to_nothing_else(saved: Path, joined: Path, darknet: Path) -> None:
    weights = darknet.with_suffix(".weights")
    attempts: list[Callable[[], Subject]] = [
        lambda: open_subject(darknet),
        lambda: open_subject(saved, weights=weights),
        lambda: open_subject(joined, weights=weights),
        lambda: open_subject(weights, weights=weights),
    ]
    for attempt in attempts:
        with refused(ConfigError, "exposure.weights"):
            attempt()


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "plan.json"])
def test_a_run_that_lacks_a_file_is_refused(name: str, joined: Path) -> None:
    (joined / name).unlink()
    with pytest.raises(ConfigError, match=r"^(file\.unreadable|exposure\.unreadable-model): "):
        open_subject(joined)


SPOILT: dict[str, tuple[type[CaltrainError], str]] = {
    "model.safetensors": (IntegrityError, "weights.malformed"),
    "plan.json": (ConfigError, "plan.invalid"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_run_with_a_spoilt_file_is_refused(name: str, joined: Path) -> None:
    (joined / name).write_bytes(b"spoilt")
    with refused(*SPOILT[name]):
        open_subject(joined)


def test_weights_of_another_network_are_refused(darknet: Path) -> None:
    path = darknet.with_name("other.safetensors")
    path.write_bytes(encode_state(state_of(subject().module)))
    with refused(IntegrityError, "weights.malformed"):
        open_subject(darknet, weights=path)
    short = darknet.with_name("short.weights")
    short.write_bytes(read_bounded(darknet.with_suffix(".weights"), limit=1 << 20)[:-4])
    with refused(IntegrityError, "weights.darknet-size"):
        open_subject(darknet, weights=short)
