"""The benchmark of training, small: real enclave processes take turns with the plain loop, figures and identity."""

from __future__ import annotations

import msgspec
import pytest
from torch import Tensor

from caltrain.bench import identity, training
from caltrain.bench.identity import weights_identical
from caltrain.bench.training import bench_preset, cuts_of, run
from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.models.network import Network
from caltrain.models.weights import state_of
from caltrain.presets import Preset
from support.samples import refused


def small(**changes: float) -> Preset:
    audit = float(changes.get("audit_rate", 0.0))
    return bench_preset("digits", cut=None, head=None, batch=16, threads=1, audit_rate=audit)


def test_three_ways_take_turns_and_their_ratios_are_of_one_round() -> None:
    turns: list[tuple[int, int]] = []
    report = run("digits", small(), rounds=2, steps=2, identical=True, on_round=lambda a, b: turns.append((a, b)))
    assert turns == [(0, 2), (1, 2), (2, 2)]
    assert (report.cut, report.head, report.batch, report.threads, report.rounds) == (2, 1, 16, 1, 2)
    spread = report.ratio_ternary_spread
    assert spread.minimum <= report.ratio_ternary <= spread.maximum or spread.minimum == pytest.approx(
        report.ratio_ternary, abs=1e-4
    )
    # What leaves for one record: the IR (32x4x4 floats), and in the ternary form the gradient of 512 features too.
    assert report.bytes_out_per_image["ternary"] == 4 * (32 * 4 * 4 + 512)
    assert report.bytes_out_per_image["two-way"] == 4 * 32 * 4 * 4 + 8
    assert report.bytes_in_per_image["ternary"] == 4 * (32 * 4 * 4 + 512)
    assert report.peak_rss_mb["ternary"] > report.peak_rss_mb["plain"] > 50
    assert report.simulated


def test_identity_is_seen_in_both_forms_and_with_the_audit() -> None:
    assert weights_identical(small(audit_rate=1.0))


def test_identity_is_denied_where_the_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*zones: Network) -> dict[str, Tensor]:
        state = state_of(*zones)
        next(iter(state.values())).view(-1)[0] += 1e-6
        return state

    monkeypatch.setattr(identity, "state_of", other)
    assert not weights_identical(small())


def test_every_second_cut_is_swept_while_a_center_is_left() -> None:
    assert cuts_of(bench_preset("cifar10-18-layer", cut=None, head=None, batch=8, threads=1)) == [2, 4, 6, 8, 10, 12]
    assert cuts_of(small()) == [2, 4]


@pytest.mark.parametrize(("rounds", "steps"), [(0, 1), (1, 0), (1001, 1), (1, 1001)])
def test_bounds_are_refused_before_anything_starts(rounds: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Worker", None)
    with refused(ConfigError, "bench.bounds"):
        run("digits", small(), rounds=rounds, steps=steps, identical=True)


def test_a_cut_that_leaves_no_center_is_refused() -> None:
    with refused(ConfigError, "model.partition"):
        bench_preset("digits", cut=5, head=1, batch=16, threads=1)


def test_a_way_that_dies_is_named() -> None:
    broken = msgspec.structs.replace(small(), model=msgspec.structs.replace(small().model, layers=()))
    worker = training.Worker("plain", broken, 16)
    with refused(EnvironmentFault, "bench.worker-died"):
        worker.ready()
    worker.kill()
