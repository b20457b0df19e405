"""What the host works out of the label groups from what crosses: measured, printed, and as docs/crossing.md says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from caltrain.demo.scenario import build_scenario
from caltrain.exposure.attacks.labels import Groups
from caltrain.presets import PRESETS
from caltrain.project import DEFAULT_PARTIES

ROOT = Path(__file__).parents[3]
Found = dict[int, dict[str, tuple[float, ...]]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/label_groups.py."""
    spec = importlib.util.spec_from_file_location("label_groups", ROOT / "scripts" / "label_groups.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["label_groups"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script: ModuleType) -> Found:
    """For digits, by batches before: role to purity, floor, named by 1, by 5."""
    scenario = build_scenario("digits", parties=DEFAULT_PARTIES, data_dir=None, download=False, seed=0)
    pixels = torch.from_numpy(np.concatenate([h.images for h in scenario.holdings]))
    labels = torch.from_numpy(np.concatenate([h.labels for h in scenario.holdings]))
    threads = torch.get_num_threads()
    measured = {a: script.measure(PRESETS["digits"], pixels, labels, after=a) for a in (0, script.LATER)}
    torch.set_num_threads(threads)
    for after, table in measured.items():
        print(f"\ndigits, {script.BATCHES} batches after {after}")  # noqa: T201  # to be read with pytest -s
        print(script.table(table))  # noqa: T201
    return {after: {role: _figures(groups) for role, groups in table.items()} for after, table in measured.items()}


def _figures(groups: Groups) -> tuple[float, ...]:
    assert [named.known for named in groups.named] == [1, 5]
    return groups.purity.value, groups.floor, *(named.right.value for named in groups.named)


def test_outgoing_gradients_of_ternary_training_give_the_label_groups_away(
    found: Found,
) -> None:
    for table in found.values():
        purity, floor, by_1, by_5 = table["center-grad"]
        assert purity > 0.99
        assert floor < 0.25
        assert by_1 > 0.98
        assert by_5 > 0.98


def test_the_first_values_that_cross_tell_k_means_little_more_than_the_floor(
    found: Found,
) -> None:
    for role in ("ir", "center-out"):
        purity, floor, by_1, _ = found[0][role]
        assert floor < purity < 0.4
        assert by_1 < 0.25


def test_the_document_says_what_was_measured(found: Found) -> None:
    document = (ROOT / "docs" / "crossing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| digits \| (\d+) \| `([\w-]+)` \| ([\d. |]+) \|$", document, re.MULTILINE)
    written = {(int(after), role): [float(x) for x in numbers.split(" | ")] for after, role, numbers in rows}
    assert written.keys() == {(after, role) for after, table in found.items() for role in table}
    for (after, role), numbers in written.items():
        assert numbers == pytest.approx(found[after][role], abs=0.05), "run the command in the document"
