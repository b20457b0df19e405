"""`caltrain new` and `caltrain plan ...`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy
from caltrain.crypto.dsse import Envelope
from caltrain.participant.identity import load_identity
from caltrain.plan import check_approval, parse_plan, parse_toml
from caltrain.plan_summary import summarise
from caltrain.project import Project, create_project
from support.commands import Cli

Edits = Callable[[str, str], Path]


@pytest.fixture
def edits(project: Project, tmp_path: Path) -> Edits:
    """A copy of the project's plan with one edit."""

    def edit(old: str, new: str) -> Path:
        text, path = project.plan_path.read_text(encoding="utf-8"), tmp_path / f"{len(new)}.toml"
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return path

    return edit


def test_new_makes_a_project_that_can_be_used_at_once(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "deep" / "project"
    made = cli("new", folder, "--party", "ann", "--party", "bob", "--user", "una", as_json=True)
    assert made.code == 0
    plan = parse_plan((folder / "plan.toml").read_bytes())
    assert made.json == {"folder": str(folder), "plan": str(folder / "plan.toml"), "digest": plan.digest()}
    assert [party.name for party in plan.parties] == ["ann", "bob"]
    assert [(user.name, user.may) for user in plan.users] == [("una", ("predict", "trace", "verdict"))]
    for name in ("ann", "bob"):
        assert load_identity(folder / "parties" / name).signer.public == plan.party(name).public_key
    assert load_identity(folder / "users" / "una").signer.public == plan.user("una").public_key
    policy = parse_toml((folder / "policy.toml").read_bytes(), Policy, what="policy")
    root = load_identity(folder / "operator").signer.public
    assert policy == Policy(measurements=(measure_enclave(),), allow_simulated=True, simulated_roots=(root,))
    assert plan.enclave.measurement == measure_enclave()
    assert cli("plan", "check", folder / "plan.toml").code == 0


def test_new_says_that_its_policy_accepts_a_simulated_enclave(tmp_path: Path, cli: Cli) -> None:
    assert "simulated enclave" in cli("new", tmp_path / "project").out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--party", "ann", "--party", "ann"), "identity.exists"),
        (("--party", "ann", "--user", "ann"), "plan.duplicate"),
        (("--party", "../ann"), "identity.name"),
        (("--user", "Ann"), "identity.name"),
    ],
)
def test_new_leaves_nothing_when_it_fails(options: tuple[str, ...], code: str, tmp_path: Path, cli: Cli) -> None:
    made = cli("new", tmp_path / "project", *options, as_json=True)
    assert made.code == 10
    assert made.error["code"] == code
    assert list(tmp_path.iterdir()) == []


def test_new_does_not_touch_a_folder_that_exists(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mine").write_text("keep", encoding="utf-8")
    made = cli("new", tmp_path, as_json=True)
    assert made.code == 10
    assert made.error["code"] == "project.exists"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_new_on_a_full_disk_is_a_named_error_and_leaves_nothing(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    made = cli("new", tmp_path / "project", as_json=True)
    assert made.code == 18
    assert made.error["code"] == "file.not-written"
    assert "No space left on device" in made.error["what"]
    assert list(tmp_path.iterdir()) == []


def test_check_says_what_a_plan_amounts_to(project: Project, cli: Cli) -> None:
    shown = cli("plan", "check", project.plan_path, as_json=True)
    assert shown.code == 0
    assert shown.json == msgspec.json.decode(msgspec.json.encode(summarise(project.plan)))
    assert shown.json["digest"] == project.plan.digest()
    assert project.plan.digest() in cli("plan", "check", project.plan_path).out


def test_digest_prints_the_digest_and_nothing_else(project: Project, cli: Cli) -> None:
    assert cli("plan", "digest", project.plan_path).out == project.plan.digest() + "\n"
    assert cli("plan", "digest", project.plan_path, as_json=True).json == {"digest": project.plan.digest()}


def test_the_digest_is_of_the_meaning_not_of_the_text(project: Project, edits: Edits, cli: Cli) -> None:
    same, other = edits("version = 1", "# a comment\nversion    =   1"), edits("epochs = ", "epochs = 1")
    assert cli("plan", "digest", same).out == project.plan.digest() + "\n"
    assert cli("plan", "digest", other).out != project.plan.digest() + "\n"


@pytest.mark.parametrize("command", ["check", "digest"])
@pytest.mark.parametrize(
    ("edit", "code", "named"),
    [
        (("version = 1", "version = 1\nspeed = 3"), "plan.unknown-key", "speed"),
        (("[training]", "[training]\nlearnig_rate = 0.1"), "plan.unknown-key", "learnig_rate"),
        (("epochs = ", "epochs = -"), "plan.invalid", "training.epochs"),
        (("version = 1", "version = 2"), "plan.invalid", "version"),
        (("version = 1", "version = "), "plan.not-toml", "line 1"),
        (('name = "birch"', 'name = "alder"'), "plan.duplicate", "alder"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused_by_name(
    command: str, edit: tuple[str, str], code: str, named: str, edits: Edits, cli: Cli
) -> None:
    shown = cli("plan", command, edits(*edit), as_json=True)
    assert shown.code == 10
    assert shown.error["code"] == code
    assert named in shown.error["what"]


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, cli: Cli) -> None:
    for path, code in (
        (tmp_path / "absent.toml", "file.unreadable"),
        (tmp_path, "file.unreadable"),
        (Path("/dev/zero"), "file.too-large"),
    ):
        shown = cli("plan", "check", path, as_json=True)
        assert shown.code == 10
        assert shown.error["code"] == code
        assert str(path) in shown.error["what"]


def test_approve_signs_the_plan_as_a_party(project: Project, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "approvals" / "alder.json"
    home = project.parties["alder"].folder
    shown = cli("plan", "approve", project.plan_path, "--home", home, "--out", out, as_json=True)
    assert shown.json == {"party": "alder", "plan": project.plan.digest(), "approval": str(out)}
    check_approval(project.plan, "alder", msgspec.json.decode(out.read_bytes(), type=Envelope))
    assert [path.name for path in out.parent.iterdir()] == ["alder.json"]


def test_a_stranger_cannot_approve(project: Project, tmp_path: Path, cli: Cli) -> None:
    assert cli("party", "keygen", "alder", "--home", tmp_path / "impostor").code == 0
    out = tmp_path / "approval.json"
    shown = cli("plan", "approve", project.plan_path, "--home", tmp_path / "impostor", "--out", out, as_json=True)
    assert (shown.code, shown.error["code"]) == (14, "plan.other-key")
    assert not out.exists()


def test_an_approval_that_cannot_be_written_leaves_nothing(project: Project, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_bytes(b"")
    home = project.parties["alder"].folder
    out = tmp_path / "file" / "approval.json"
    shown = cli("plan", "approve", project.plan_path, "--home", home, "--out", out, as_json=True)
    assert shown.code == 18
    assert shown.error["code"] == "file.not-written"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_check_prints_as_text_is_what_it_prints_as_json(project: Project, cli: Cli) -> None:
    text, found = (
        cli("plan", "check", project.plan_path).out,
        cli("plan", "check", project.plan_path, as_json=True).json,
    )
    shown = {key: value for key, value in found.items() if value is not None}
    for key, value in shown.items():
        assert key in text
        if isinstance(value, str | int) and not isinstance(value, bool):
            assert str(value) in text
    assert ", ".join(found["parties"]) in text
    assert f"layers {found['front_net']['layers']}, learning" in text
    assert not any(key in text for key in found.keys() - shown.keys())


def test_what_new_writes_can_be_given_a_cut_that_deepens(project: Project, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "deepening.toml"
    path.write_bytes(project.plan_path.read_bytes() + b"\n[[partition.deepen]]\nepoch = 1\nfront = 3\n")
    assert cli("plan", "check", project.plan_path, as_json=True).json["cut_by_epoch"] is None
    shown = cli("plan", "check", path, as_json=True).json
    assert [(step["epoch"], step["front"]) for step in shown["cut_by_epoch"]] == [(0, 2), (1, 3)]
    assert "epoch 1, front 3" in cli("plan", "check", path).out


def test_what_new_leaves_out_of_the_text_does_not_change_the_plan(tmp_path: Path) -> None:
    project = create_project(tmp_path / "project", preset="digits", parties=["ann"], users=[])
    written = tomllib.loads(project.plan_path.read_text(encoding="utf-8"))
    assert "users" not in written
    assert "deepen" not in written["partition"]
    assert parse_plan(project.plan_path.read_bytes()) == project.plan
    assert parse_plan(project.plan_path.read_bytes()).digest() == project.plan.digest()
