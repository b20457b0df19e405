"""Draws: each from a key of its own, the whole key counts, and orders are uniform."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Tensor

from caltrain.crypto import aead
from caltrain.enclave import pool
from caltrain.models.layers import AvgPool, Conv, Linear, MaxPool, Patches, Transformer
from caltrain.models.network import build, zone_of
from caltrain.models.spec import ModelSpec
from caltrain.training import seeds as seeds_module
from caltrain.training.seeds import Draws, RunSeeds, epoch_order, initialise, run_seed

SEED, OTHER = bytes(32), b"\1" + bytes(31)
SPEC = ModelSpec(
    layers=(
        Conv(filters=32, batch_norm=True),
        MaxPool(),
        Conv(filters=64),
        AvgPool(),
        Linear(units=64),
        Linear(units=9),
    )
)


def drawn(generator: torch.Generator) -> Tensor:
    return torch.rand(8, generator=generator)


# --- run seed and sub-seeds ------------------------------------------------------------------------------------


def test_the_run_seed_depends_on_the_enclave_and_on_every_party_and_their_order() -> None:
    parts = [bytes([i]) * 32 for i in range(4)]
    variants = {run_seed(parts[0], parts[1:])}
    for at in range(4):
        changed = list(parts)
        changed[at] = bytes([99]) + parts[at][1:]
        variants.add(run_seed(changed[0], changed[1:]))
    variants.add(run_seed(parts[0], [parts[2], parts[1], parts[3]]))
    variants.add(run_seed(parts[0], parts[1:3]))
    assert len(variants) == 7
    assert {len(v) for v in variants} == {32}
    assert run_seed(parts[0], parts[1:]) in variants


def test_sub_seeds_are_all_different_and_all_follow_from_the_run_seed() -> None:
    one, again, other = (RunSeeds.from_run_seed(seed) for seed in (SEED, SEED, OTHER))
    assert one == again
    values = [getattr(s, name) for s in (one, other) for name in ("front", "center", "head", "order", "augment")]
    assert len(set(values)) == 10
    assert SEED not in values


# --- draws -----------------------------------------------------------------------------------------------------

PLACES = [
    (seed, epoch, step, name, layer)
    for seed in (SEED, OTHER)
    for epoch, step, layer in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (256, 0, 0), (0, 256, 0), (1 << 40, 0, 0))
    for name in ("shift", "flip", "dropout")
]


def test_every_place_has_a_draw_of_its_own() -> None:
    values = {tuple(drawn(Draws(seed, e, s).generator(name, layer)).tolist()) for seed, e, s, name, layer in PLACES}
    assert len(values) == len(PLACES)


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    alone = drawn(Draws(SEED, 3, 4).generator("dropout", 5))
    draws = Draws(SEED, 3, 4)
    torch.manual_seed(1)
    for name, layer in (("shift", 0), ("dropout", 4), ("dropout", 5)):
        drawn(draws.generator(name, layer))
    torch.manual_seed(2)
    torch.rand(100)
    assert torch.equal(drawn(draws.generator("dropout", 5)), alone)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn(Draws(SEED, 0, 0).generator("flip"))
    epoch_order(10, seed=SEED, epoch=0)
    initialise(build(SPEC, input_shape=(3, 8, 8), layers=range(0)), SEED)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bit", [31, *range(32, 8 * 4 * 624, 997), 8 * 4 * 624 - 1])
def test_every_bit_of_the_derived_key_counts(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `manual_seed` 32 of them would: the FrontNet's first weights could then be found by trying."""
    key = bytearray(b"\x5a" * 4 * 624)

    def derive(_secret: bytes, _purpose: str, *_context: bytes, length: int = 32) -> bytes:
        assert length == len(key)
        return bytes(key)

    monkeypatch.setattr(seeds_module, "derive", derive)
    before = torch.rand(700, generator=Draws(SEED, 0, 0).generator("x"))
    key[bit // 8] ^= 1 << bit % 8
    after = torch.rand(700, generator=Draws(SEED, 0, 0).generator("x"))
    assert not torch.equal(before, after)


def test_the_state_that_is_set_is_the_one_that_torch_would_set() -> None:
    """The words lie where torch keeps them: a generator with the state of a known one draws the same."""
    known = torch.Generator().manual_seed(5489).get_state()
    words = known[seeds_module._WORDS_AT :][: 8 * seeds_module._WORDS].view(torch.int64)
    assert words.shape == (624,)
    assert int(words[0]) == 5489
    assert int(words[1]) == (1812433253 * (5489 ^ (5489 >> 30)) + 1) % 2**32, "not the Mersenne Twister's words"
    ours = Draws(SEED, 0, 0).generator("x").get_state()
    same = known == ours
    assert bool(same[8 : seeds_module._WORDS_AT].all()), "the counters are not those of a fresh generator"
    assert bool(same[seeds_module._WORDS_AT + 8 * seeds_module._WORDS :].all())


def test_draws_are_uniform() -> None:
    values = torch.rand(100_000, generator=Draws(SEED, 0, 0).generator("x"))
    counts = torch.histc(values, bins=50, min=0, max=1)
    assert chi_square(counts.tolist(), 2000) < 100  # 49 degrees of freedom: 1 in 30 000


# --- orders ----------------------------------------------------------------------------------------------------


def chi_square(counts: list[float], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def test_an_order_is_a_permutation_and_each_epoch_has_its_own() -> None:
    orders = [epoch_order(1000, seed=SEED, epoch=epoch) for epoch in range(5)]
    for order in orders:
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(1000))
    for one, other in itertools.combinations(orders, 2):
        # Two random permutations agree in one place on average.
        assert int((one == other).sum()) < 10
    assert torch.equal(epoch_order(1000, seed=SEED, epoch=3), orders[3])
    assert not torch.equal(epoch_order(1000, seed=OTHER, epoch=3), orders[3])


def test_all_orders_of_four_records_are_equally_likely() -> None:
    runs = [(epoch, bytes([party]) * 32) for epoch in range(60) for party in range(80)]
    counts = Counter(tuple(epoch_order(4, seed=seed, epoch=epoch).tolist()) for epoch, seed in runs)
    assert len(counts) == 24
    assert chi_square(list(counts.values()), len(runs) / 24) < 60  # 23 degrees of freedom: 1 in 30 000


def test_every_record_is_equally_likely_at_every_place() -> None:
    size, runs = 12, 3000
    counts = torch.zeros(size, size)
    for epoch in range(runs):
        counts[torch.arange(size), epoch_order(size, seed=OTHER, epoch=epoch)] += 1
    assert chi_square(counts.flatten().tolist(), runs / size) < 200  # 121 degrees of freedom: 1 in 100 000


# --- first weights ---------------------------------------------------------------------------------------------


def test_a_zone_draws_the_weights_that_it_has_in_the_whole_model() -> None:
    whole = build(SPEC, input_shape=(3, 8, 8))
    initialise(whole, SEED)
    for cut in range(len(SPEC.layers)):
        zone = build(SPEC, input_shape=(3, 8, 8), layers=range(cut, len(SPEC.layers)))
        initialise(zone, SEED)
        part = zone_of(whole, SPEC, range(cut, len(SPEC.layers))).state_dict()
        assert part.keys() == zone.state_dict().keys()
        assert all(torch.equal(value, part[name]) for name, value in zone.state_dict().items())


def test_no_two_layers_and_no_two_seeds_share_first_weights() -> None:
    spec = ModelSpec(layers=(Linear(units=16), Linear(units=16), Linear(units=16)))
    states = []
    for seed in (SEED, OTHER):
        model = build(spec, input_shape=(16,))
        initialise(model, seed)
        states += [parameter.detach() for name, parameter in model.named_parameters() if name.endswith("weight")]
    for one, other in itertools.combinations(states, 2):
        assert not torch.equal(one, other)


def test_first_weights_have_the_distribution_of_the_ones_pytorch_draws() -> None:
    model = build(SPEC, input_shape=(3, 8, 8))
    torch.manual_seed(0)
    for block in model.children():
        for module in block.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.reset_parameters()
    theirs = {name: value.clone() for name, value in model.named_parameters()}
    initialise(model, SEED)
    for name, ours in model.named_parameters():
        fan_in = math.prod(dict(model.named_parameters())[name.replace("bias", "weight")].shape[1:])
        if "norm" in name:
            assert torch.equal(ours, theirs[name])
            continue
        bound = 1 / math.sqrt(fan_in)
        assert not torch.equal(ours, theirs[name])
        assert float(ours.detach().abs().max()) <= bound
        if ours.numel() > 500:
            for mine, pytorchs in ((ours.mean(), theirs[name].mean()), (ours.std(), theirs[name].std())):
                assert float((mine - pytorchs).detach().abs()) < 0.15 * bound
            assert float(ours.detach().abs().max()) > 0.98 * bound


def test_tokens_positions_are_drawn_and_normalisations_are_not() -> None:
    spec = ModelSpec(layers=(Patches(size=2, width=16), Transformer(heads=2), AvgPool(), Linear(units=2)))
    model = build(spec, input_shape=(3, 8, 8))
    initialise(model, SEED)
    state = model.state_dict()
    assert float(state["0.position"].abs().max()) <= 1 / math.sqrt(16)
    assert float(state["0.position"].std()) > 0.5 / math.sqrt(3 * 16)
    assert torch.equal(state["1.norm1.weight"], torch.ones(16))
    assert torch.equal(state["1.norm2.bias"], torch.zeros(16))
    for name, fan_in in (("1.qkv.weight", 16), ("1.qkv.bias", 16), ("1.down.weight", 64), ("0.conv.bias", 12)):
        assert 0.8 / math.sqrt(fan_in) < float(state[name].abs().max()) <= 1 / math.sqrt(fan_in), name


# --- nonces ----------------------------------------------------------------------------------------------------


def test_no_nonce_depends_on_a_seed() -> None:
    """A nonce is drawn from the operating system or counts frames; what seals for the enclave knows no run seed."""
    words = {word for module in (aead, pool) for word in words_of(module)}
    assert {"urandom", "to_bytes", "FrameCipher"} <= words
    assert not words & {"Draws", "RunSeeds", "run_seed", "Generator", "manual_seed", "random", "default_rng"}
    imported = {name for module in (aead, pool) for name in imports_of(module)}
    assert imported
    assert not [name for name in imported if name.startswith(("caltrain.training", "torch"))]


def words_of(module: ModuleType) -> set[str]:
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def imports_of(module: ModuleType) -> set[str]:
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
