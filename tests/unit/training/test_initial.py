"""Public weights to start from, and frozen layers: what is taken, what is refused, and that split equals plain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.errors import CaltrainError, ConfigError, IntegrityError
from caltrain.models.layers import AvgPool, Conv, Dropout, Linear, MaxPool, Shortcut
from caltrain.models.network import build, lay_out
from caltrain.models.spec import ModelSpec, Partition
from caltrain.models.weights import encode_state, state_of
from caltrain.training import initial as module
from caltrain.training.initial import load_initial, start_from
from caltrain.training.seeds import initialise
from caltrain.training.spec import Augment, InitialWeights, TrainingSpec
from caltrain.training.zone import At
from support.split import SCHEMA, State, differing, one_thread, plain_state, split_state, zones

SPEC = ModelSpec(
    layers=(
        Conv(filters=6, batch_norm=True, activation="leaky"),
        Dropout(p=0.2),
        Conv(filters=6, batch_norm=True),
        Shortcut(source=0, activation="relu"),
        MaxPool(),
        Conv(filters=4, kernel=1, padding=0, batch_norm=True),
        AvgPool(),
        Dropout(p=0.3),
        Linear(units=3),
    )
)
CUTS = [Partition(front=f, head=h) for f, h in ((1, 0), (3, 0), (5, 0), (1, 2), (3, 1), (4, 4))]
TRAINING = TrainingSpec(
    epochs=2, batch=6, learning_rate=0.05, weight_decay=0.01, clip_norm=0.5, augment=Augment(flip=True), threads=1
)
AT = At(0, 0, 3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def pretrained() -> State:
    """Weights of the whole model that no seed of a run draws, with statistics that are not those at the start."""
    network = build(SPEC, input_shape=SCHEMA.shape)
    initialise(network, b"p" * 32)
    generator = torch.Generator().manual_seed(5)
    state = state_of(network)
    for name, value in state.items():
        if "norm" in name and value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    return state


FILE = encode_state(pretrained())


def named(raw: bytes, frozen: int = 0) -> InitialWeights:
    return InitialWeights(sha256="sha256:" + hashlib.sha256(raw).hexdigest(), frozen=frozen)


def fine_tuning(frozen: int, **change: object) -> TrainingSpec:
    return msgspec.structs.replace(TRAINING, initial=named(FILE, frozen), **change)


def refused(family: type[CaltrainError], code: str, call: Callable[[], object]) -> None:
    with pytest.raises(family) as caught:
        call()
    assert caught.value.code == code


def of(state: State, *layers: int) -> State:
    return {name: value for name, value in state.items() if int(name.partition(".")[0]) in layers}


# --- the file ----------------------------------------------------------------------------------------------------


def test_the_file_that_the_plan_names_is_read() -> None:
    got = load_initial(FILE, named(FILE))
    assert differing(dict(got), pretrained()) == set()


def test_another_file_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decode_state", lambda *_, **__: pytest.fail("parsed"))
    refused(IntegrityError, "initial.other-digest", lambda: load_initial(FILE[:-1] + b"x", named(FILE)))
    monkeypatch.setattr(module, "MAX_INITIAL_BYTES", len(FILE) - 1)
    refused(IntegrityError, "initial.too-large", lambda: load_initial(FILE, named(FILE)))


def test_a_file_of_the_bound_is_read_and_one_that_is_not_safetensors_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INITIAL_BYTES", len(FILE))
    assert load_initial(FILE, named(FILE))
    refused(IntegrityError, "weights.malformed", lambda: load_initial(b"no weights", named(b"no weights")))


# --- what is taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
def test_each_zone_takes_its_own_tensors_and_keeps_the_rest_and_the_layout(channels_last: bool) -> None:
    training = fine_tuning(0, channels_last=channels_last)
    given = of(pretrained(), 0, 5)
    given.pop("5.conv.weight")
    drawn, started = (
        state_of(*(zone.module for zone in zones(SPEC, Partition(front=1, head=2), training, initial=state)))
        for state in (None, given)
    )
    assert differing(started, drawn | given) == set()
    assert differing(started, drawn) == given.keys() - {"0.norm.num_batches_tracked", "5.norm.num_batches_tracked"}
    front = zones(SPEC, Partition(front=1), training, initial=given)[0]
    reference = build(SPEC, input_shape=SCHEMA.shape)
    lay_out(reference, channels_last=channels_last)
    weight, expected = front.module.get_parameter("0.conv.weight"), reference.get_parameter("0.conv.weight")
    assert weight.stride() == expected.stride()


@pytest.mark.parametrize(
    ("family", "code", "change"),
    [
        (ConfigError, "initial.no-layers", lambda _: {}),
        (ConfigError, "initial.unknown-layers", lambda s: s | {"0.conv.wieght": torch.zeros(1)}),
        (ConfigError, "initial.unknown-layers", lambda s: s | {"00.conv.weight": s["0.conv.weight"]}),
        (ConfigError, "initial.unknown-layers", lambda s: s | {"9.conv.weight": torch.zeros(1)}),
        (ConfigError, "initial.unknown-layers", lambda s: s | {"conv1.weight": torch.zeros(1)}),
        (ConfigError, "initial.unknown-layers", lambda _: {"features.0.weight": torch.zeros(1)}),
        (ConfigError, "initial.unknown-layers", lambda s: s | {"": torch.zeros(1)}),
        (IntegrityError, "weights.malformed", lambda s: s | {"0.conv.weight": torch.zeros(6, 3, 3)}),
        (IntegrityError, "weights.malformed", lambda s: s | {"0.conv.weight": s["0.conv.weight"].half()}),
        (IntegrityError, "weights.malformed", lambda s: s | {"0.norm.running_var": torch.full((6,), torch.nan)}),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(
    family: type[CaltrainError], code: str, change: Callable[[State], State]
) -> None:
    model = build(SPEC, input_shape=SCHEMA.shape)
    before = state_of(model)
    refused(family, code, lambda: start_from(model, change(pretrained()), SPEC))
    assert differing(state_of(model), before) == set()


def test_an_unknown_layer_is_seen_in_every_zone_and_a_long_list_is_cut() -> None:
    wrong = {f"{number}." + "x" * 300: torch.zeros(1) for number in range(9, 99)}
    for zone in zones(SPEC, Partition(front=3, head=1), TRAINING):
        with pytest.raises(ConfigError) as caught:
            start_from(zone.module, wrong, SPEC)
        assert len(caught.value.what) <= 400


def test_a_zone_that_the_file_says_nothing_about_stays_as_drawn() -> None:
    front, center, _ = zones(SPEC, Partition(front=3), TRAINING)
    before = state_of(center.module)
    start_from(center.module, of(pretrained(), 0), SPEC)
    start_from(front.module, of(pretrained(), 0), SPEC)
    assert differing(state_of(center.module), before) == set()


# --- frozen layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut.form} {cut.front}-{cut.head}")
@pytest.mark.parametrize("frozen", [0, 1, 3, 6])
@pytest.mark.parametrize("channels_last", [True, False])
def test_split_equals_plain_with_initial_weights_and_frozen_layers(
    cut: Partition, frozen: int, channels_last: bool
) -> None:
    training, state = fine_tuning(frozen, channels_last=channels_last), pretrained()
    split = split_state(SPEC, cut, training, initial=state)
    assert differing(split, plain_state(SPEC, cut, training, initial=state)) == set()
    kept = of(state, *range(frozen))
    assert differing({name: split[name] for name in kept}, kept) == set()
    learnt = of(state, *range(frozen, 9))
    assert differing({name: split[name] for name in learnt}, learnt) == learnt.keys()


def test_freezing_is_not_without_effect() -> None:
    """The frozen statistics are used, too: a model that normalised by the batch would learn something else."""
    cut, state = Partition(front=3, head=1), pretrained()
    other = state | {"0.norm.running_mean": state["0.norm.running_mean"] + 1}
    one, two = (split_state(SPEC, cut, fine_tuning(1), initial=s) for s in (state, other))
    assert not torch.equal(one["8.linear.weight"], two["8.linear.weight"])
    three, four = (split_state(SPEC, cut, fine_tuning(0), initial=s) for s in (state, other))
    assert torch.equal(three["8.linear.weight"], four["8.linear.weight"])


def test_a_frozen_block_stays_in_inference_whatever_the_mode() -> None:
    front, _, _ = zones(SPEC, Partition(front=3), fine_tuning(1), initial=pretrained())
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = state_of(front.module)
    front.module.train()
    front.infer([x])
    front.forward([x], at=AT, needs_input_grad=False)
    assert [child.training for child in front.module.children()] == [False, True, True]
    changed = differing(state_of(front.module), before)
    assert changed == {f"2.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_neither_decay_nor_momentum_reaches_a_frozen_parameter() -> None:
    front, _, _ = zones(SPEC, Partition(front=3), fine_tuning(1), initial=pretrained())
    (out,) = front.forward([torch.rand(6, 3, 8, 8)], at=AT, needs_input_grad=False)[:1]
    assert not out.requires_grad
    grads = [torch.ones_like(x) for x in front.forward([torch.rand(6, 3, 8, 8)], at=AT, needs_input_grad=False)]
    front.backward(grads, at=AT)
    held = {name for name in front.state() if name.startswith("momentum/")}
    assert held == {"momentum/2.conv.weight", "momentum/2.norm.weight", "momentum/2.norm.bias"}
    assert {name: p.requires_grad for name, p in front.module.named_parameters()} == {
        name: not name.startswith("0.") for name, _ in front.module.named_parameters()
    }
    again, _, _ = zones(SPEC, Partition(front=3), fine_tuning(1))
    again.load(front.state(), step="test")
    assert differing(again.state(), front.state()) == set()


def test_a_frozen_zone_learns_nothing_and_sends_gradients_on_all_the_same() -> None:
    front, center, head = zones(SPEC, Partition(front=1, head=2), fine_tuning(7), initial=pretrained())
    before = state_of(front.module, center.module)
    ir = front.forward([torch.rand(6, 3, 8, 8)], at=AT, needs_input_grad=False)
    out = center.forward(ir, at=AT, needs_input_grad=True)
    head.forward(out, at=AT, needs_input_grad=True)
    back, loss = head.backward_from_labels(torch.zeros(6, dtype=torch.int64), at=AT)
    assert len(back) == 1
    assert loss > 0
    grads = center.backward(back, at=AT)
    assert [grad.shape for grad in grads] == [x.shape for x in ir]
    assert front.backward(grads, at=AT) == []
    assert differing(state_of(front.module, center.module), before) == set()


def test_a_zone_that_learns_still_wants_a_gradient_for_each_tensor() -> None:
    front, _, _ = zones(SPEC, Partition(front=3), fine_tuning(1))
    front.forward([torch.rand(6, 3, 8, 8)], at=AT, needs_input_grad=False)
    with pytest.raises(ValueError, match="shorter"):
        front.backward([], at=AT)


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [9, 8 + 1, 512])
def test_a_plan_that_freezes_all_weights_is_refused(frozen: int) -> None:
    refused(ConfigError, "initial.all-frozen", lambda: zones(SPEC, Partition(front=3), fine_tuning(frozen)))
    call = lambda: plain_state(SPEC, Partition(front=3), fine_tuning(frozen), initial=pretrained())  # noqa: E731
    refused(ConfigError, "initial.all-frozen", call)


def test_the_last_layer_may_be_all_that_learns() -> None:
    training, state = fine_tuning(8), pretrained()
    split = split_state(SPEC, Partition(front=3, head=1), training, initial=state)
    assert differing(split, plain_state(SPEC, Partition(front=3, head=1), training, initial=state)) == set()
    assert differing(split, state) == {"8.linear.weight", "8.linear.bias"}


@pytest.mark.parametrize(("training", "state"), [(fine_tuning(1), None), (TRAINING, {"x": torch.zeros(1)})])
def test_the_plain_loop_wants_initial_weights_exactly_if_they_are_named(
    training: TrainingSpec, state: dict[str, Tensor] | None
) -> None:
    refused(ConfigError, "initial.missing", lambda: plain_state(SPEC, Partition(front=3), training, initial=state))


def test_a_frozen_layer_that_the_file_lacks_is_refused_and_nothing_is_copied() -> None:
    model = build(SPEC, input_shape=SCHEMA.shape)
    before = state_of(model)
    lacking = {name: value for name, value in pretrained().items() if not name.startswith("0.")}
    start_from(model, lacking, SPEC)
    model.load_state_dict(before)
    with pytest.raises(ConfigError, match=r"^initial\.frozen-missing"):
        start_from(model, lacking, SPEC, frozen=1)
    assert differing(state_of(model), before) == set()
