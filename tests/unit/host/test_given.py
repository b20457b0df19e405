"""The operator's files: exactly those that the plan names, and nothing is stored before that is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.host.given import What, check_given, keep_given
from caltrain.host.store import Store
from caltrain.models.spec import Wheel
from caltrain.plan import Plan
from caltrain.records.quarantine import Repair
from caltrain.training.spec import InitialWeights
from support.disk import tree
from support.members import Member
from support.samples import refused
from support.tiny import tiny_plan

RAW: dict[What, bytes] = {"wheel": b"a wheel", "initial": b"some weights", "quarantine": b"some records"}


def plan(*named: What) -> Plan:
    """A plan that names these files."""
    bare = tiny_plan([Member("alpha")], [], head=2, dtype="u8", epochs=1, budget=1, reveal=False)
    digests = {what: "sha256:" + hashlib.sha256(raw).hexdigest() for what, raw in RAW.items()}
    wheel = Wheel(sha256=digests["wheel"], factory="stages:make") if "wheel" in named else None
    initial = InitialWeights(sha256=digests["initial"]) if "initial" in named else None
    repair = Repair(run="ab" * 16, model=digests["wheel"], quarantine=digests["quarantine"], records=1)
    return msgspec.structs.replace(
        bare,
        repair=repair if "quarantine" in named else msgspec.UNSET,
        model=msgspec.structs.replace(bare.model, wheel=wheel),
        training=msgspec.structs.replace(bare.training, initial=initial),
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[What, Path]:
    """The files themselves."""
    for what, raw in RAW.items():
        (tmp_path / f"{what}.file").write_bytes(raw)
    return {what: tmp_path / f"{what}.file" for what in RAW}


def test_the_files_that_the_plan_names_are_kept_under_their_names(files: dict[What, Path], tmp_path: Path) -> None:
    check_given(plan(*RAW), files)
    store = Store(tmp_path / "host")
    store.renew()
    keep_given(store, files)
    assert {name: raw for name, raw in tree(tmp_path / "host").items() if name != "lock"} == dict(RAW)
    check_given(plan(*RAW), {}, kept=tmp_path / "host")
    check_given(plan(), {}, kept=tmp_path / "host")


@pytest.mark.parametrize("what", [*RAW])
def test_other_files_than_the_plans_are_refused(what: What, files: dict[What, Path], tmp_path: Path) -> None:
    only = {what: files[what]}
    with refused(ConfigError, "given.not-named"):
        check_given(plan(), only)
    for kept in (None, tmp_path / "host"):
        with refused(ConfigError, "given.missing"):
            check_given(plan(what), {}, kept=kept)
    with refused(ConfigError, "given.missing"):
        check_given(plan(what), {what: tmp_path / "nowhere"})
    files[what].write_bytes(RAW[what] + b"!")
    with refused(ConfigError, "given.other-digest"):
        check_given(plan(what), only)


def test_a_file_that_cannot_be_read_is_named(
    files: dict[What, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr("hashlib.file_digest", broken)
    with refused(EnvironmentFault, "given.unreadable"):
        check_given(plan("wheel"), {"wheel": files["wheel"]})
