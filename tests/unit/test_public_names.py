"""The public names: ten at most, all there, and nothing heavy behind `import caltrain`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import caltrain

NAMES = [
    "CaltrainError",
    "HostClient",
    "Policy",
    "ask",
    "join",
    "load_identity",
    "parse_plan",
    "seal_records",
    "verify_bundle",
    "verify_evidence",
]


def test_these_are_the_public_names() -> None:
    assert caltrain.__all__ == NAMES
    assert sorted(caltrain.__all__) == caltrain.__all__
    assert len(set(caltrain.__all__)) == len(caltrain.__all__) <= 10


@pytest.mark.parametrize("name", NAMES)
def test_each_is_the_thing_itself(name: str) -> None:
    found = getattr(caltrain, name)
    assert found.__name__ == name
    assert found.__doc__
    assert getattr(sys.modules[found.__module__], name) is found
    assert name in dir(caltrain)


def test_type_checkers_are_told_of_the_same_names() -> None:
    tree = ast.parse(Path(caltrain.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert told == caltrain._HOME
    assert sorted(told) == NAMES


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'caltrain' has no attribute 'nonsense'"):
        _ = caltrain.nonsense


@pytest.mark.parametrize("name", ["", *NAMES])
def test_importing_them_imports_no_torch_and_no_server(name: str) -> None:
    program = (
        f"import sys, caltrain; {f'caltrain.{name}' if name else ''}\n"
        "heavy = {'torch', 'sklearn', 'fastapi', 'uvicorn', 'caltrain.enclave', 'caltrain.host'} & set(sys.modules)\n"
        f"assert not heavy, heavy\n"
        f"assert {bool(name)} or not {{'numpy', 'httpx', 'cryptography'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
