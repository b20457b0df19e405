"""A command line in this process, and a project to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from caltrain.cli.app import run
from caltrain.cli.output import Format, choose
from caltrain.project import Project, create_project
from support.commands import Cli, Outcome


@pytest.fixture(autouse=True)
def _wide_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "240")
    choose(Format.TEXT)
    yield
    choose(Format.TEXT)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line: `cli("plan", "check", path)`; with `as_json=True` it asks for JSON."""

    def call(*words: str | Path, as_json: bool = False) -> Outcome:
        capsys.readouterr()
        code = run([*(str(word) for word in words), *(("--format", "json") if as_json else ())])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two parties and a user on digits; read only."""
    folder = tmp_path_factory.mktemp("cli") / "project"
    return create_project(folder, preset="digits", parties=["alder", "birch"], users=["analyst"])


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Twenty digits in the form that MNIST has."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    labels, path = np.arange(20) % 10, tmp_path / "records.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:1], y_test=labels[:1])
    return path
