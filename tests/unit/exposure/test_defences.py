"""Defences: what crosses, that an attacker keeps its gradient, and the accuracy that is paid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.exposure.defence_spec import DefenceSpec, parse_defence
from caltrain.exposure.defences import accuracy, defended, make_defence, tuned, tuned_accuracy
from caltrain.exposure.statistics import rate_estimate
from caltrain.exposure.subject import Cut, Live, Subject
from caltrain.models.weights import model_digest, state_of
from support.exposed import bright_or_dark, subject
from support.samples import refused

Pairs = tuple[Tensor, Tensor]


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> Live:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) * 3 + 1 for shape in shapes)


LIVE = drawn((40, 8, 5, 5), (40, 6), (40, 9, 4))


def apart(live: Live, seed: int = 3, **of: float) -> Live:
    """`live` under one defence, calibrated on other tensors of the same kind."""
    spec = parse_defence(",".join(f"{name}={value}" for name, value in of.items()) or "none")
    return make_defence(spec, LIVE, seed=seed)(live)


# --- text ------------------------------------------------------------------------------------------------------

TEXTS = {
    "none": DefenceSpec(),
    "noise=0.5": DefenceSpec(noise=0.5),
    "keep=0.25": DefenceSpec(keep=0.25),
    "bits=4": DefenceSpec(bits=4),
    "noise=0.1,keep=0.5,bits=8": DefenceSpec(noise=0.1, keep=0.5, bits=8),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_defence_survives_its_text(text: str) -> None:
    assert parse_defence(text) == TEXTS[text]
    assert TEXTS[text].text == text


BAD = [
    "",
    "noise",
    "noise=",
    "noise=nan",
    "noise=inf",
    "noise=-1",
    "keep=0",
    "keep=1.1",
    "bits=0",
    "bits=17",
    "bits=2.5",
]
BAD += ["blur=3", "noise=1;keep=1", "noise=1,noise=2", "noise=1,", "none,bits=4", "9" * 5000, "bits=" + "9" * 5000]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:20])
def test_what_is_no_defence_is_refused_with_what_is(text: str) -> None:
    with refused(ConfigError, "exposure.unknown-defence") as caught:
        parse_defence(text)
    assert "noise=0.5" in caught.value.fix
    assert len(caught.value.what) < 300


# --- what crosses ------------------------------------------------------------------------------------------------


def test_without_a_defence_everything_crosses_as_it_is() -> None:
    assert all(torch.equal(out, own) for out, own in zip(apart(LIVE), LIVE, strict=True))


def test_noise_has_the_size_that_was_asked_for_and_is_new_every_time() -> None:
    defence = make_defence(DefenceSpec(noise=0.5), LIVE, seed=1)
    first, second = defence(LIVE), defence(LIVE)
    for out, again, own in zip(first, second, LIVE, strict=True):
        added = out - own
        assert float(added.std()) == pytest.approx(0.5 * float(own.std()), rel=0.1)
        assert abs(float(added.mean())) < 0.2 * float(own.std())
        assert not torch.equal(out, again)


def test_noise_comes_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = apart(LIVE, 1, noise=1.0), apart(LIVE, 1, noise=1.0), apart(LIVE, 2, noise=1.0)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_measured_by_the_calibration_not_by_what_crosses() -> None:
    zeros = tuple(torch.zeros_like(tensor) for tensor in LIVE)
    for out, own in zip(apart(zeros, noise=0.5), LIVE, strict=True):
        assert float(out.std()) == pytest.approx(0.5 * float(own.std()), rel=0.1)


@pytest.mark.parametrize("also", [{}, {"noise": 1.0}, {"bits": 3}, {"noise": 1.0, "bits": 2}])
def test_the_channels_that_vary_most_cross_and_of_the_others_nothing(also: dict[str, float]) -> None:
    sizes = torch.tensor([0.1, 5, 0.2, 3, 0, 0.3, 4, 0.4])
    image, vector, tokens = torch.randn(30, 8, 3, 3), torch.randn(30, 8), torch.randn(30, 6, 8)
    calibration = image * sizes[:, None, None], vector * sizes, tokens * sizes
    spec = DefenceSpec(keep=0.375, **also)  # type: ignore[arg-type]
    ones = tuple(torch.rand_like(tensor) + 1 for tensor in calibration)
    outs = make_defence(spec, calibration, seed=0)(ones)
    for out, one, channel in zip(outs, ones, (1, 1, 2), strict=True):
        crossing = out.transpose(0, channel).flatten(1).ne(0).any(1)
        assert crossing.nonzero().flatten().tolist() == [1, 3, 6]
        if not also:
            assert torch.equal(out.transpose(0, channel)[[1, 3, 6]], one.transpose(0, channel)[[1, 3, 6]])


def test_one_channel_always_crosses() -> None:
    for out, channel in zip(apart(LIVE, keep=0.001), (1, 1, 2), strict=True):
        assert int(out.transpose(0, channel).flatten(1).ne(0).any(1).sum()) == 1


@pytest.mark.parametrize("bits", [1, 4, 12])
def test_a_record_has_at_most_so_many_values_evenly_between_its_own_ends(bits: int) -> None:
    for out, own in zip(apart(LIVE, bits=bits), LIVE, strict=True):
        for record, of in zip(out, own, strict=True):
            assert len(record.unique()) <= 2**bits
            step = float(of.max() - of.min()) / (2**bits - 1)
            assert float((record - of).abs().max()) <= step / 2 * 1.01 + 1e-5
            assert float(record.min()) == pytest.approx(float(of.min()), abs=1e-5)
            assert float(record.max()) == pytest.approx(float(of.max()), abs=1e-5)


def test_a_constant_record_stays_as_it_is() -> None:
    constant = tuple(torch.full_like(tensor, 0.3) for tensor in LIVE)
    assert all(torch.equal(out, own) for out, own in zip(apart(constant, bits=4), constant, strict=True))


@pytest.mark.parametrize("of", [{"noise": 0.5}, {"bits": 2}, {"keep": 1.0}])
def test_an_attacker_keeps_the_gradient(of: dict[str, float]) -> None:
    live = tuple(tensor.clone().requires_grad_() for tensor in LIVE)
    weights = drawn(*(tensor.shape for tensor in LIVE), seed=9)
    outs = make_defence(DefenceSpec(**of), LIVE, seed=3)(live)  # type: ignore[arg-type]
    torch.autograd.backward(outs, weights)
    for tensor, weight in zip(live, weights, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, weight)


# --- the price ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Pairs:
    return bright_or_dark((1, 8, 8), 200, seed=1)


@pytest.fixture(scope="module")
def others() -> Pairs:
    return bright_or_dark((1, 8, 8), 300, seed=2)


@pytest.fixture(scope="module")
def trained(own: Pairs) -> Subject:
    """A model that knows brightness."""
    return tuned(Cut(subject(), 1), *own, steps=60, rate=0.03, seed=5).subject


def test_accuracy_without_a_defence_is_the_models(trained: Subject, others: Pairs) -> None:
    chosen = trained.logits(others[0]).argmax(1)
    labels = chosen.clone()
    labels[:75] = (labels[:75] + 1) % 4
    assert set(chosen.tolist()) == {0, 1, 2, 3}
    assert accuracy(Cut(trained, 2), others[0], chosen) == rate_estimate(300, 300)
    assert accuracy(Cut(trained, 2), others[0], labels) == rate_estimate(225, 300)


def test_a_defence_is_on_when_accuracy_is_measured(trained: Subject, own: Pairs, others: Pairs) -> None:
    plain, noisy = Cut(trained, 2), defended(Cut(trained, 2), DefenceSpec(noise=50), own[0], seed=0)
    assert accuracy(noisy, *others).value < 0.5 < accuracy(plain, *others).value


@pytest.mark.parametrize("name", ["18-layer", "resnet18", "vit"])
def test_a_defence_fits_each_kind_of_network(name: str) -> None:
    of = subject(name)
    some = torch.rand(9, *of.shape)
    plain = Cut(of, 2)
    cut = defended(plain, DefenceSpec(noise=0.1, keep=0.5, bits=6), some, seed=0)
    for out, clear in zip(cut.ir(some), plain.ir(some), strict=True):
        assert out.shape == clear.shape
        assert not torch.equal(out, clear)
    assert accuracy(cut, some, torch.zeros(9, dtype=torch.int64)).n == 9


def test_calibration_ignores_the_defence_that_is_on(trained: Subject, own: Pairs) -> None:
    noisy = defended(Cut(trained, 2), DefenceSpec(noise=99), own[0], seed=1)
    once, twice = (defended(cut, DefenceSpec(keep=0.5), own[0], seed=0) for cut in (Cut(trained, 2), noisy))
    assert torch.equal(once.ir(own[0][:3])[0], twice.ir(own[0][:3])[0])


def test_the_rest_of_the_model_learns_to_live_with_a_defence(trained: Subject, own: Pairs, others: Pairs) -> None:
    cut = defended(Cut(trained, 2), DefenceSpec(keep=0.25, bits=2), own[0], seed=0)
    state, before = state_of(trained.module), accuracy(cut, *others)
    seen: list[tuple[int, int]] = []
    after = tuned_accuracy(cut, own, others, steps=60, seed=3, on_step=lambda done, total: seen.append((done, total)))
    assert after.low > before.high
    assert seen == [(done, 60) for done in range(1, 61)]
    assert model_digest(trained.spec, state_of(trained.module)) == model_digest(trained.spec, state)
    assert accuracy(cut, *others) == before
    assert not trained.module.training


def test_tuning_leaves_the_frontnet_and_gives_a_model_at_rest(trained: Subject, own: Pairs) -> None:
    found = tuned(defended(Cut(trained, 2), DefenceSpec(bits=3), own[0], seed=0), *own, steps=2, seed=3)
    ours, theirs = found.subject.module.state_dict(), trained.module.state_dict()
    same = {name: torch.equal(value, theirs[name]) for name, value in ours.items()}
    assert all(equal == name.startswith("0.") for name, equal in same.items())
    assert not any(child.training for child in found.subject.module.modules())
    assert not any(parameter.requires_grad for parameter in found.subject.module.parameters())


def test_tuning_comes_from_its_seed_alone(trained: Subject, own: Pairs) -> None:
    before = torch.get_rng_state()

    def state(seed: int) -> str:
        module = tuned(Cut(trained, 2), *own, steps=2, seed=seed).subject.module
        return model_digest(trained.spec, state_of(module))

    assert state(1) == state(1) != state(2)
    assert torch.equal(torch.get_rng_state(), before)
