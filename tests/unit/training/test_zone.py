"""One zone: what crosses, what comes back, what a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.errors import IntegrityError
from caltrain.models.spec import ModelSpec
from caltrain.training.spec import TrainingSpec
from caltrain.training.zone import At, Zone
from support.samples import refused
from support.split_run import CHAIN, FLAT, LABELS, MOMENTUM, RESIDUAL, SCHEMA, SEEDS, TRAINING, State, differing

FIRST = At(0, 0, 3)


def zone(layers: range, spec: ModelSpec = FLAT, training: TrainingSpec = TRAINING, seed: bytes = SEEDS.front) -> Zone:
    return Zone(spec, layers, input_shape=SCHEMA.shape, training=training, seed=seed)


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def step(part: Zone, x: Tensor, at: At = FIRST) -> list[Tensor]:
    out = part.forward((x,), at=at, needs_input_grad=True)
    return part.backward([torch.ones_like(o) for o in out], at=at)


def test_what_crosses_has_no_graph_and_the_zones_input_is_not_touched() -> None:
    x = random(6, 3, 8, 8)
    (out,) = zone(range(2)).forward((x,), at=FIRST, needs_input_grad=True)
    assert not out.requires_grad
    assert out.grad_fn is None
    assert not x.requires_grad
    assert x.grad is None
    assert torch.equal(x, random(6, 3, 8, 8))


def test_a_gradient_comes_back_only_where_it_was_asked_for() -> None:
    for asked in (False, True):
        part = zone(range(2))
        (out,) = part.forward((torch.ones(6, 3, 8, 8),), at=FIRST, needs_input_grad=asked)
        grads = part.backward([torch.ones_like(out)], at=FIRST)
        assert [g.shape for g in grads] == ([torch.Size((6, 3, 8, 8))] if asked else [])


def test_every_live_tensor_goes_in_and_comes_out_and_has_its_gradient() -> None:
    part = zone(range(2, 5), RESIDUAL)  # takes layers 0 and 1; gives 2 and 4
    live = tuple(random(6, 4, 8, 8) + i for i in (0, 1))
    out = part.forward(live, at=FIRST, needs_input_grad=True)
    assert [tuple(o.shape) for o in out] == [(6, 4, 8, 8), (6, 6, 4, 4)]
    assert torch.equal(out[0], torch.relu(live[1] + live[0]))
    grads = part.backward([torch.ones_like(out[0]), torch.zeros_like(out[1])], at=FIRST)
    assert [g.shape for g in grads] == [x.shape for x in live]
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)


def test_a_tensor_that_passes_by_unchanged_has_the_sum_of_its_gradients() -> None:
    part = zone(range(1, 2), RESIDUAL)  # layer 0 is read here, and again beyond
    x = random(6, 4, 8, 8)
    out = part.forward((x,), at=FIRST, needs_input_grad=True)
    assert torch.equal(out[0], x)
    (both,) = part.backward([torch.full_like(o, 2.0) for o in out], at=FIRST)
    again = zone(range(1, 2), RESIDUAL)
    out = again.forward((x,), at=FIRST, needs_input_grad=True)
    (through,) = again.backward([torch.zeros_like(out[0]), torch.full_like(out[1], 2.0)], at=FIRST)
    assert torch.equal(both, through + 2.0)


def test_a_gradient_serves_one_forward_pass() -> None:
    part = zone(range(2))
    before = parameters(part.module)
    assert part.backward([torch.ones(6, 4, 4, 4)], at=FIRST) == []
    assert all(torch.equal(a, b) for a, b in zip(parameters(part.module), before, strict=True))
    step(part, random(6, 3, 8, 8))
    stepped = parameters(part.module)
    assert not all(torch.equal(a, b) for a, b in zip(stepped, before, strict=True))
    assert part.backward([torch.ones(6, 4, 4, 4)], at=FIRST) == []
    assert all(torch.equal(a, b) for a, b in zip(parameters(part.module), stepped, strict=True))


@pytest.mark.parametrize("layers", [range(1, 2), range(1, 3)], ids=["pooling", "pooling, flatten"])
def test_a_zone_without_weights_passes_gradients_through(layers: range) -> None:
    part = zone(layers)
    x = random(6, 4, 8, 8)
    (out,) = part.forward((x,), at=FIRST, needs_input_grad=True)
    (got,) = part.backward([torch.ones_like(out)], at=FIRST)
    assert got.sum().item() == out.numel()
    part.forward((x,), at=FIRST, needs_input_grad=False)
    assert part.backward([torch.ones_like(out)], at=FIRST) == []


def test_as_many_gradients_come_back_as_tensors_went_out() -> None:
    part = zone(range(2, 5), RESIDUAL)
    out = part.forward((random(6, 4, 8, 8), random(6, 4, 8, 8)), at=FIRST, needs_input_grad=True)
    before = part.state()
    with pytest.raises(ValueError, match=r"zip\(\)"):
        part.backward([torch.ones_like(out[0])], at=FIRST)
    assert differing(part.state(), before) == set()


def test_the_loss_is_the_mean_cross_entropy_and_the_rate_that_of_the_step() -> None:
    moved: list[float] = []
    for epoch, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        part, at = zone(range(4, 5)), At(epoch, number, 3)
        before = parameters(part.module)
        x = random(6, 6)
        (out,) = part.forward((x,), at=at, needs_input_grad=True)
        (grad,), loss = part.backward_from_labels(LABELS[:6], at=at)
        assert loss == pytest.approx(F.cross_entropy(out, LABELS[:6]).item())
        assert grad.shape == x.shape
        moved.append(sum(float((a - b).norm()) for a, b in zip(parameters(part.module), before, strict=True)))
    assert [m / moved[0] for m in moved] == pytest.approx([1, 2, 3, 3], rel=1e-3)


def test_labels_without_a_forward_pass_step_nothing() -> None:
    part = zone(range(4, 5))
    before = part.state()
    assert part.backward_from_labels(LABELS[:6], at=FIRST) == ([], 0.0)
    assert differing(part.state(), before) == set()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_zones_weights_are_in_the_runs_layout(channels_last: bool) -> None:
    part = zone(range(3), CHAIN, msgspec.structs.replace(TRAINING, channels_last=channels_last))
    weights = [parameter for parameter in part.module.parameters() if parameter.dim() == 4]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [channels_last] * 2


def test_a_zone_trains_and_only_inference_leaves_the_mode() -> None:
    part = zone(range(3), CHAIN)
    assert all(module.training for module in part.module.modules())
    x = random(6, 3, 8, 8)
    part.forward((x,), at=FIRST, needs_input_grad=False)
    assert int(part.module.state_dict()["0.norm.num_batches_tracked"]) == 1
    before = part.state()
    (out,) = part.infer((x,))
    assert not out.requires_grad
    assert differing(part.state(), before) == set()
    assert all(module.training for module in part.module.modules())
    part.module.eval()
    with torch.no_grad():
        assert torch.equal(out, part.module(x))


def test_a_failed_inference_leaves_the_zone_in_training() -> None:
    part = zone(range(3), CHAIN)
    with pytest.raises(RuntimeError):
        part.infer((random(6, 2, 8, 8),))
    assert all(module.training for module in part.module.modules())


def test_only_one_forward_pass_is_remembered() -> None:
    """Inference between a forward pass and its gradient changes neither."""
    one, other = zone(range(3), CHAIN), zone(range(3), CHAIN)
    for part in (one, other):
        (out,) = part.forward((random(6, 3, 8, 8),), at=FIRST, needs_input_grad=True)
        if part is other:
            part.infer((random(4, 3, 8, 8),))
        part.backward([torch.ones_like(out)], at=FIRST)
    assert differing(one.state(), other.state()) == set()


# --- state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_zone_that_took_over_a_state_goes_on_with_the_same_bits(channels_last: bool) -> None:
    training = msgspec.structs.replace(TRAINING, channels_last=channels_last)
    one, other = zone(range(3), CHAIN, training), zone(range(3), CHAIN, training)
    for number in range(2):
        step(one, random(6, 3, 8, 8), At(0, number, 3))
    taken = one.state()
    names = {name.removeprefix(MOMENTUM) for name in taken if name.startswith(MOMENTUM)}
    assert names == set(dict(one.module.named_parameters()))
    other.load(taken, step="test")
    assert differing(other.state(), taken) == set()
    for part in (one, other):
        step(part, random(6, 3, 8, 8), At(0, 2, 3))
    assert differing(one.state(), other.state()) == set()
    assert len(differing(taken, one.state())) > len(names), "the state is no copy, or nothing was trained"


def test_a_zone_that_goes_back_to_its_first_state_forgets_its_momentum() -> None:
    one, other = zone(range(2)), zone(range(2))
    first = one.state()
    assert not any(name.startswith(MOMENTUM) for name in first)
    step(one, random(6, 3, 8, 8))
    one.load(first, step="test")
    for part in (one, other):
        step(part, random(6, 3, 8, 8))
    assert differing(one.state(), other.state()) == set()


def test_without_momentum_the_state_is_the_weights() -> None:
    part = zone(range(2), training=msgspec.structs.replace(TRAINING, momentum=0.0))
    step(part, random(6, 3, 8, 8))
    assert set(part.state()) == {"0.conv.weight", "0.conv.bias"}


def test_a_zone_without_weights_has_an_empty_state() -> None:
    part = zone(range(1, 3))
    step(part, random(6, 4, 8, 8))
    assert part.state() == {}
    part.load({}, step="test")


def set_to(name: str, value: Tensor | None) -> Callable[[State], State]:
    def change(state: State) -> State:
        kept = {key: held for key, held in state.items() if key != name}
        return kept if value is None else kept | {name: value}

    return change


UNFIT: dict[str, Callable[[State], State]] = {
    "nothing": lambda _state: {},
    "a weight less": set_to("0.conv.weight", None),
    "a weight more": set_to("9.conv.weight", torch.zeros(1)),
    "a weight of another shape": set_to("0.conv.bias", torch.zeros(5)),
    "a weight of another type": set_to("0.conv.bias", torch.zeros(4, dtype=torch.float64)),
    "a weight that is not finite": set_to("0.conv.bias", torch.full((4,), float("nan"))),
    "momentum of no parameter": set_to(f"{MOMENTUM}9.conv.weight", torch.zeros(4)),
    "momentum of another shape": set_to(f"{MOMENTUM}0.conv.bias", torch.zeros(1)),
    "momentum of another type": set_to(f"{MOMENTUM}0.conv.bias", torch.zeros(4, dtype=torch.int64)),
    "momentum that is not finite": set_to(f"{MOMENTUM}0.conv.bias", torch.full((4,), float("inf"))),
    "another zone's": lambda _state: zone(range(3, 5)).state(),
    "another model's": lambda _state: zone(range(2), CHAIN).state(),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_foreign_or_spoilt_state_is_refused_and_nothing_is_changed(change: Callable[[State], State]) -> None:
    donor, part = zone(range(2), seed=SEEDS.center), zone(range(2))
    for trained in (donor, part):
        step(trained, random(6, 3, 8, 8))
    before = part.state()
    with refused(IntegrityError, "weights.malformed"):
        part.load(change(donor.state()), step="resume")
    assert differing(part.state(), before) == set()
    part.load(donor.state(), step="resume")
    assert differing(part.state(), donor.state()) == set()


def test_momentum_of_a_buffer_is_refused() -> None:
    part = zone(range(1), CHAIN)
    state = part.state()
    with refused(IntegrityError, "weights.malformed"):
        part.load(state | {f"{MOMENTUM}0.norm.running_mean": state["0.norm.running_mean"]}, step="resume")
