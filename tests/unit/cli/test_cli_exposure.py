"""`caltrain exposure assess` and `verify`: one object or a table, files, and refusals before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from caltrain.cli import exposing
from caltrain.exposure.assess import Assessor
from caltrain.exposure.open_model import save_subject
from caltrain.exposure.validator import Validator
from caltrain.participant.identity import create_identity
from caltrain.presets import PRESETS
from support.assessment import NET, hardly_computing
from support.commands import Cli, Outcome
from support.exposed import drawn, subject

NUMBERS = {"--targets": "8", "--candidates": "24", "--own": "80", "--kl-inputs": "8", "--maps": "2", "--cuts": "1,3"}
KEY_OF_NOBODY = "ed25519:" + "A" * 43 + "="


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "digits"
    save_subject(drawn(NET, PRESETS["digits"].data), folder)
    return folder


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with hardly_computing():
        yield


def words(model: Path, out: Path, **changes: str | Path) -> list[str | Path]:
    options: dict[str, str | Path] = {
        **NUMBERS,
        "--data": "digits",
        "--validator": "generator",
        "--threads": "1",
        "--out": out,
    }
    options |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return ["exposure", "assess", model, *(word for name in options for word in (name, options[name]))]


def test_json_is_the_report_and_nothing_else(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = cli(*words(model, out, policy="ssim<=0.9, kl_ratio>=0"), as_json=True)
    assert found.code == 0
    assert set(found.json["cuts"]) == {"1", "3"}
    assert found.json["settings"]["attacks"] == ["kl", "whitebox", "inverter", "shadow", "labels"]
    assert found.json == json.loads((out / "report.json").read_bytes())
    assert "<h1>" in (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]


def signed(cli: Cli, model: Path, folder: Path) -> tuple[Outcome, str]:
    key = create_identity(folder / "home", "auditor").public.public_key
    made = cli(*words(model, folder / "out", attacks="inverter", policy="inverter.ssim<=0.9", sign=folder / "home"))
    return made, key


def test_text_is_a_table_with_findings_and_a_signed_report_verifies(cli: Cli, model: Path, tmp_path: Path) -> None:
    made, key = signed(cli, model, tmp_path)
    assert made.code == 0
    assert "conv 12 3x3" in made.out
    assert "cut by the policy: 1" in made.out
    assert "assumes that the adversary does not know the FrontNet" in made.out
    assert "report.html" in made.out
    statement, report = tmp_path / "out" / "statement.json", tmp_path / "out" / "report.json"
    found = cli("exposure", "verify", statement, report, "--model", model, "--key", key, as_json=True)
    assert found.code == 0
    assert (found.json["verified"], found.json["front"], found.json["signer"]) == (True, 1, key)

    changed = tmp_path / "changed.json"
    changed.write_text(report.read_text().replace("digits", "mnist"))
    other = tmp_path / "other"
    save_subject(drawn(NET, PRESETS["digits"].data, seed=1), other)
    for code, call in {
        "exposure.other-report": (statement, changed, "--model", model, "--key", key),
        "exposure.other-model": (statement, report, "--model", other, "--key", key),
        "signature.invalid": (statement, report, "--model", model, "--key", KEY_OF_NOBODY),
        "envelope.malformed": (report, report, "--model", model, "--key", key),
    }.items():
        refused = cli("exposure", "verify", *call, as_json=True)
        assert (refused.code, refused.error["code"]) == (12, code)


def test_a_policy_comes_from_a_plan_or_a_file_of_its_own(cli: Cli, model: Path, tmp_path: Path) -> None:
    bound = 'bounds = [{ measure = "ssim", adversary = "inverter", at_most = 0.9 }]\n'
    for name, section in (("plan", "[exposure.policy]\n"), ("own", "[policy]\n")):
        path = tmp_path / f"{name}.toml"
        path.write_text(f'name = "x"\n{section}{bound}')
        found = cli(*words(model, tmp_path / name, attacks="inverter", cuts="2", policy_file=path), as_json=True)
        assert found.json["choice"]["front"] == 2


REFUSED = {
    "exposure.unknown-attack": {"attacks": "kl,magic"},
    "exposure.cut": {"cuts": "1,99"},
    "exposure.numbers": {"cuts": "one"},
    "exposure.tolerance": {"tolerance": "inf"},
    "policy.not-measured": {"attacks": "kl", "policy": "ssim<=0.3"},
    "policy.malformed": {"policy": "ssim=0.3"},
    "policy.unknown-measure": {"policy": "vagueness<=0.3"},
    "exposure.too-few-for-policy": {"policy": "reidentification<=0.02"},
    "exposure.too-few": {"candidates": "100000"},
    "exposure.unknown-defence": {"defence": "magic=1"},
    "exposure.unreadable-model": {"validator": "nowhere"},
    "exposure.weights": {"weights": "some.weights"},
    "reader.not-found": {"data": "nowhere.npz"},
    "file.unreadable": {"policy_file": "nowhere.toml"},
    "identity.unreadable": {"sign": "nowhere"},
}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins to assess or to train a validator fails the test."""

    def begun(*_: object, **__: object) -> None:
        pytest.fail("something long began")

    monkeypatch.setattr(Assessor, "run", begun)
    monkeypatch.setattr(exposing, "train_validator", begun)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("code", REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_long(code: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = cli(*words(model, out, **{"validator": "", **REFUSED[code]}), as_json=True)
    assert found.error["code"] == code
    assert not out.exists()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("maps", "code"), [("1,2", "exposure.numbers"), ("", "exposure.numbers")])
def test_maps_are_one_number_or_all(maps: str, code: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    assert cli(*words(model, tmp_path / "out", maps=maps), as_json=True).error["code"] == code


@pytest.mark.usefixtures("idle")
def test_two_policies_and_a_file_without_one_are_refused(cli: Cli, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text('name = "x"\n')
    for code, options in (
        ("exposure.two-policies", {"policy": "kl_ratio>=1", "policy_file": path}),
        ("exposure.no-policy", {"policy_file": path}),
    ):
        assert cli(*words(model, tmp_path / "out", **options), as_json=True).error["code"] == code


def test_without_a_validator_one_is_trained_and_kept(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(of: object, *_: object, **__: object) -> Validator:
        return Validator(subject("tiny"))

    monkeypatch.setattr(exposing, "train_validator", train)
    monkeypatch.setattr(Assessor, "run", lambda *_, **__: pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception):
        cli(*words(model, tmp_path / "out", validator=""))
    assert sorted(path.name for path in (tmp_path / "out" / "validator").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]
