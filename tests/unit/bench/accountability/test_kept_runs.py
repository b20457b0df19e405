"""Kept results come back whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from caltrain.bench.accountability.cache import Cache, Plain, default_folder

OF: dict[str, Plain] = {"kind": "run", "seed": 1, "share": 0.01, "skew": None}


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path / "deep" / "down")
    cache.put(OF, {"a": torch.arange(6.0).view(2, 3).T}, {"success": 0.5, "seconds": None})
    return cache


def test_what_was_kept_is_found_by_its_description(kept: Cache) -> None:
    found = kept.get(OF)
    assert found is not None
    assert torch.equal(found.tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert found.figures == {"success": 0.5, "seconds": None}
    assert kept.get({**OF, "seed": 2}) is None
    assert kept.get({**OF, "share": None}) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_what_is_damaged_or_gone_counts_as_not_there_and_is_written_anew(kept: Cache, suffix: str) -> None:
    path = next(kept.folder.glob(f"*{suffix}"))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b""):
        path.write_bytes(damaged)
        assert kept.get(OF) is None
    path.unlink()
    assert kept.get(OF) is None
    kept.put(OF, {"a": torch.zeros(1)}, {})
    assert kept.get(OF) is not None


def test_figures_alone_can_be_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put({"kind": "tally"}, {}, {"asked": 1.0})
    found = cache.get({"kind": "tally"})
    assert found is not None
    assert (found.tensors, found.figures) == ({}, {"asked": 1.0})


def test_the_usual_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "caltrain" / "accountability"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path.home() / ".cache" / "caltrain" / "accountability"
