"""docs/errors.md names every code of the source, and no other."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("list_errors", ROOT / "scripts" / "list_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["list_errors"] = module
    spec.loader.exec_module(module)
    return module


def test_the_document_lists_the_codes_of_the_source() -> None:
    documented = set(re.findall(r"^\| `([a-z0-9.-]+)` \|", (ROOT / "docs/errors.md").read_text(), flags=re.MULTILINE))
    raised = {entry.code for entry in _script().entries()}
    assert documented == raised, "run: python scripts/list_errors.py > docs/errors.md"
    assert len(raised) > 100
