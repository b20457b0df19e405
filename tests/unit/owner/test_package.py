"""The owner's package: what is in which part, and that none of them can be exchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from caltrain.crypto.digests import to_text
from caltrain.errors import CaltrainError, ConfigError, IntegrityError
from caltrain.exposure.subject import Subject
from caltrain.models.layers import AvgPool, Conv
from caltrain.models.network import Network, build, lay_out
from caltrain.models.spec import ModelSpec, zone_ranges
from caltrain.models.weights import decode_state, load_zone, state_of
from caltrain.owner.package import package_key, package_model
from caltrain.serving.folder import PackageFolder, open_folder, part_digest, write_folder
from support.samples import refused, signer
from support.served import DATA_KEY, opened_inside, tiny_package, tiny_subject, tiny_terms
from support.tiny import CLASSES

PARTS = ("package.json", "inside.sealed", "center.safetensors")
POOLED = ModelSpec(layers=(Conv(filters=4), Conv(filters=3, activation="none", batch_norm=True), AvgPool()))


def states(opened: PackageFolder) -> list[dict[str, torch.Tensor]]:
    """Front, center and head, as they are in the parts."""
    inside = opened_inside(opened)
    return [decode_state(raw, step="test") for raw in (inside.front, opened.center(), inside.head)]


@pytest.mark.parametrize("head", [0, 1, 2])
def test_the_parts_are_the_model_split_at_both_cuts(tmp_path: Path, head: int) -> None:
    subject = tiny_subject()
    opened = tiny_package(tmp_path, subject, tiny_terms(head=head))
    whole, found = state_of(subject.module), states(opened)
    for state, layers in zip(found, zone_ranges(subject.spec, opened.package.terms.partition), strict=True):
        assert set(state) == {name for name in whole if int(name.partition(".")[0]) in layers}
        assert all(torch.equal(value, whole[name]) for name, value in state.items())


def test_the_host_sees_neither_names_nor_the_front(tmp_path: Path) -> None:
    names = ("melanoma in situ", "naevus of Spitz", "basal carcinoma")
    opened = tiny_package(tmp_path, tiny_subject(classes=names), tiny_terms(head=2))
    clear = b"".join((tmp_path / name).read_bytes() for name in PARTS)
    payload = repr(opened.package).encode()
    front = states(opened)[0]
    for needle in (*(name.encode() for name in names), *(v.numpy().tobytes() for v in front.values() if v.dim())):
        assert needle not in clear
        assert needle not in payload
    assert opened_inside(opened).classes == names


@pytest.mark.parametrize("spec", [None, POOLED], ids=["linear", "pooled convolution"])
def test_with_a_secret_order_the_center_gives_the_outputs_in_it(tmp_path: Path, spec: ModelSpec | None) -> None:
    subject = tiny_subject() if spec is None else tiny_subject(spec=spec)
    opened = tiny_package(tmp_path, subject, tiny_terms(mapped=True, front=1))
    order = opened_inside(opened).order
    assert sorted(order) == list(range(len(CLASSES)))
    mapped = whole_of(subject, opened)
    x = torch.randn(5, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(mapped(x), subject.module(x)[:, list(order)])


def whole_of(subject: Subject, opened: PackageFolder) -> Network:
    """The model that all parts together are."""
    net = build(subject.spec, input_shape=subject.data.shape)
    load_zone(net, {name: value for state in states(opened) for name, value in state.items()}, step="test")
    lay_out(net, channels_last=True)
    return net.eval()


def test_orders_are_drawn_anew_for_each_package(tmp_path: Path) -> None:
    subject = tiny_subject()
    packages = [tiny_package(tmp_path / str(i), subject, tiny_terms(mapped=True)) for i in range(12)]
    assert len({opened_inside(opened).order for opened in packages}) > 1
    assert len({opened.package.id for opened in packages}) == 12


def test_each_package_has_a_key_of_its_own_that_the_owner_can_make_again() -> None:
    assert package_key(DATA_KEY, "ab" * 16) == package_key(DATA_KEY, "ab" * 16)
    others = {package_key(DATA_KEY, "cd" * 16), package_key(bytes(32), "ab" * 16), DATA_KEY}
    assert package_key(DATA_KEY, "ab" * 16) not in others


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["a bit", "cut short", "longer", "another package's", "missing"])
def test_a_touched_part_or_manifest_is_refused(tmp_path: Path, name: str, how: str) -> None:
    folder, other = tmp_path / "one", tmp_path / "other"
    tiny_package(folder, tiny_subject(), tiny_terms(head=1))
    tiny_package(other, tiny_subject(seed=8), tiny_terms(head=1))
    raw = (folder / name).read_bytes()
    at = raw.index(b'"payload":"') + 40 if name == "package.json" else len(raw) // 2
    changed = {
        "a bit": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :],
        "cut short": raw[:-1],
        "longer": raw + b"\0",
        "another package's": (other / name).read_bytes(),
    }
    if how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(changed[how])
    with pytest.raises(CaltrainError) as caught:
        open_folder(folder, signer("owner").public)
    due = {"package.json": {"signature.invalid", "package.unreadable", "package.other-part"}}
    codes = {"file.unreadable"} if how == "missing" else due.get(name, {"package.other-part"})
    assert caught.value.code in codes


def test_a_manifest_with_another_cut_is_refused(tmp_path: Path) -> None:
    opened = tiny_package(tmp_path, tiny_subject(), tiny_terms(head=1))
    eve = signer("eve").sign("package", opened.package)
    write_folder(tmp_path, eve, inside=opened.inside(), center=opened.center())
    with refused(IntegrityError, "signature.invalid"):
        open_folder(tmp_path, signer("owner").public)
    with refused(ConfigError, "package.other-owner"):
        open_folder(tmp_path)


def test_a_part_that_changes_after_the_folder_was_opened_is_refused_too(tmp_path: Path) -> None:
    opened = tiny_package(tmp_path, tiny_subject(), tiny_terms())
    (tmp_path / "center.safetensors").write_bytes(b"x")
    with refused(IntegrityError, "package.other-part"):
        opened.center()


BAD: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "no FrontNet": ({"front": 0}, b"", "model.cut-at-input"),
    "no CenterNet": ({"front": 5, "head": 1}, b"", "model.partition"),
    "nobody may ask": ({"users": ()}, b"", "package.nobody"),
    "a secret order and a HeadNet": ({"mapped": True, "head": 1}, b"", "package.contradiction"),
    "a wheel that the model does not have": ({}, b"wheel", "package.other-wheel"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_served_is_refused_and_nothing_is_written(tmp_path: Path, bad: str) -> None:
    terms, wheel, code = BAD[bad]
    folder = tmp_path / "package"
    with refused(ConfigError, code):
        package_model(
            tiny_subject(), tiny_terms(**terms), signer=signer("owner"), data_key=DATA_KEY, folder=folder, wheel=wheel
        )
    assert not folder.exists()


def test_parts_are_named_by_their_plain_sha256() -> None:
    assert part_digest(b"abc") == to_text(hashlib.sha256(b"abc").digest())
