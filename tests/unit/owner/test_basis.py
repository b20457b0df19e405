"""The assessment that a cut rests on: verified, and only for a cut that it looked at."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from caltrain.errors import ConfigError, IntegrityError
from caltrain.exposure.choice import choose
from caltrain.exposure.policy import parse_policy
from caltrain.exposure.report import ExposureReport
from caltrain.exposure.statement import sign_report
from caltrain.owner.basis import read_basis
from support.exposure_report import MODEL, exposure_report
from support.samples import refused, signer

OWNER = signer("owner")


def written(folder: Path, *, policy: str = "ssim<=0.6") -> ExposureReport:
    """A report of cuts 1 and 3 whose policy chooses 3, or none."""
    report, bound = exposure_report(), parse_policy(policy)
    figures = {front: cut.figures() for front, cut in report.cuts.items()}
    choice = choose(bound, figures, costs={1: 0.5, 3: 0.5})
    report = msgspec.structs.replace(report, policy=bound, choice=choice)
    (folder / "report.json").write_bytes(msgspec.json.encode(report))
    (folder / "statement.json").write_bytes(msgspec.json.encode(sign_report(report, OWNER)))
    return report


@pytest.mark.parametrize(
    ("front", "policy", "met"), [(3, "ssim<=0.6", True), (1, "ssim<=0.6", False), (3, "ssim<=0.01", False)]
)
def test_a_basis_says_whether_its_policy_allows_the_cut(front: int, policy: str, met: bool, tmp_path: Path) -> None:
    report = written(tmp_path, policy=policy)
    basis = read_basis(tmp_path, model=MODEL, key=OWNER.public, front=front)
    assert (basis.report, basis.signer, basis.policy_met) == (report.digest(), OWNER.public, met)


def test_a_cut_that_nobody_looked_at_has_no_basis(tmp_path: Path) -> None:
    written(tmp_path)
    with refused(ConfigError, "package.not-assessed-there"):
        read_basis(tmp_path, model=MODEL, key=OWNER.public, front=2)


def test_a_report_of_another_model_or_signer_is_none(tmp_path: Path) -> None:
    written(tmp_path)
    with refused(IntegrityError, "exposure.other-model"):
        read_basis(tmp_path, model="sha256:" + "7" * 64, key=OWNER.public, front=3)
    with refused(IntegrityError, "signature.invalid"):
        read_basis(tmp_path, model=MODEL, key=signer("somebody").public, front=3)


@pytest.mark.parametrize("name", ["report.json", "statement.json"])
def test_both_files_are_needed(name: str, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / name).unlink()
    with refused(ConfigError, "file.unreadable"):
        read_basis(tmp_path, model=MODEL, key=OWNER.public, front=3)
