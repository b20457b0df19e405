"""Zones against the plain loop: cut anywhere, the weights are the same, bit for bit. No process takes part.

What crosses a cut goes through the wire form of a tensor (`flatten`, `restore`), as it does between processes.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.boundary import tensors
from caltrain.models.network import build, zone_ranges
from caltrain.models.spec import AvgPool, Conv, Dropout, Flatten, Linear, MaxPool, ModelSpec, Partition
from caltrain.models.weights import state_of
from caltrain.records.schema import DataSchema
from caltrain.training import plain
from caltrain.training.batches import augment, normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import Draws, RunSeeds, epoch_order
from caltrain.training.spec import Augment, TrainingSpec
from caltrain.training.zone import Zone

SEEDS = RunSeeds.from_run_seed(bytes(range(32)))
SCHEMA = DataSchema(shape=(3, 8, 8), classes=("a", "b", "c"), mean=(0.4, 0.5, 0.6), std=(0.2,))
SPEC = ModelSpec(
    layers=(
        Conv(filters=6, batch_norm=True, activation="leaky"),
        Dropout(p=0.2),
        Conv(filters=5, stride=2),
        MaxPool(),
        Conv(filters=4, kernel=1, padding=0, activation="none"),
        AvgPool(),
        Linear(units=7, activation="relu"),
        Dropout(p=0.3),
        Linear(units=3),
    )
)
FLAT = ModelSpec(layers=(Conv(filters=4), MaxPool(), Flatten(), Linear(units=6, activation="leaky"), Linear(units=3)))
TRAINING = TrainingSpec(
    epochs=2,
    batch=6,
    learning_rate=0.05,
    weight_decay=0.001,
    warmup_epochs=1,
    augment=Augment(shift=1, flip=True),
    threads=1,
)
RECORDS = 21  # three batches of six and a rest
PIXELS = torch.randint(0, 256, (RECORDS, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (RECORDS,), generator=torch.Generator().manual_seed(2))
State = dict[str, Tensor]
Edit = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels on another number of threads give other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(TRAINING.threads)
    yield
    torch.set_num_threads(before)


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def cross(tensor: Tensor) -> Tensor:
    """The tensor as the other process gets it."""
    dense, data = tensors.flatten(tensor)
    return tensors.restore(tensors.head_of(dense, role="ir", run="ab" * 16, epoch=0, step=0, slot=None), data)


def train_split(
    spec: ModelSpec,
    partition: Partition,
    training: TrainingSpec,
    *,
    pixels: Tensor = PIXELS,
    seeds: RunSeeds = SEEDS,
    on_gradient: Edit = unchanged,
) -> State:
    """The protocol's step by hand: enclave, center and (ternary) head, each with its own zone."""
    keys = (seeds.front, seeds.center, seeds.head)
    front, center, head = (
        Zone(spec, layers, input_shape=SCHEMA.shape, training=training, seed=key)
        for layers, key in zip(zone_ranges(spec, partition), keys, strict=True)
    )
    steps, order = RECORDS // training.batch, torch.arange(RECORDS)
    for epoch in range(training.epochs):
        order = order[epoch_order(RECORDS, seed=seeds.order, epoch=epoch)]
        for step in range(steps):
            batch = order[step * training.batch : (step + 1) * training.batch]
            x = augment(pixels[batch], training.augment, Draws(seeds.augment, epoch, step))
            x = normalise(x, SCHEMA, channels_last=training.channels_last)
            ir = cross(front.forward(x, epoch=epoch, step=step, needs_input_grad=False))
            out = center.forward(ir, epoch=epoch, step=step, needs_input_grad=True)
            if partition.head:
                head.forward(cross(out), epoch=epoch, step=step, needs_input_grad=True)
                back, _ = head.backward_from_labels(LABELS[batch], epoch=epoch, step=step, steps=steps)
                assert back is not None
                grad = center.backward(cross(back), epoch=epoch, step=step, steps=steps)
            else:
                grad, _ = center.backward_from_labels(LABELS[batch], epoch=epoch, step=step, steps=steps)
            assert grad is not None
            front.backward(on_gradient(cross(grad)), epoch=epoch, step=step, steps=steps)
    return state_of(front.module, center.module, head.module)


def plain_state(spec: ModelSpec, partition: Partition, training: TrainingSpec) -> State:
    return state_of(train_plain(spec, partition, SCHEMA, training, pixels=PIXELS, labels=LABELS, seeds=SEEDS))


def differing(one: State, other: State) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


# --- bit for bit -----------------------------------------------------------------------------------------------

CUTS = [Partition(front=front) for front in range(1, 9)]
CUTS += [Partition(front=front, head=head) for front, head in ((1, 1), (1, 7), (2, 4), (3, 3), (4, 2), (5, 1), (7, 1))]
CUTS += [Partition(front=0, head=head, unsafe_cut_at_input=True) for head in (0, 3)]


def cut_name(cut: Partition) -> str:
    return f"{cut.form} {cut.front}-{cut.head}"


@pytest.mark.parametrize("cut", CUTS, ids=cut_name)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_split_model_ends_with_the_weights_of_the_plain_loop(cut: Partition, channels_last: bool) -> None:
    training = msgspec.structs.replace(TRAINING, channels_last=channels_last)
    split = train_split(SPEC, cut, training)
    assert differing(split, plain_state(SPEC, cut, training)) == set()


@pytest.mark.parametrize("cut", [Partition(front=1), Partition(front=2), Partition(front=1, head=2)], ids=cut_name)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_flatten_on_either_side_of_a_cut_changes_nothing(cut: Partition, channels_last: bool) -> None:
    training = msgspec.structs.replace(TRAINING, channels_last=channels_last)
    assert differing(train_split(FLAT, cut, training), plain_state(FLAT, cut, training)) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"schedule": "constant", "warmup_epochs": 0},
        {"augment": Augment()},
        {"batch": RECORDS},
        {"batch": 1, "epochs": 1},
    ],
    ids=str,
)
def test_it_holds_for_other_hyper_parameters(change: dict[str, object]) -> None:
    training, cut = msgspec.structs.replace(TRAINING, **change), Partition(front=2, head=2)
    spec = FLAT if training.batch == 1 else SPEC
    assert differing(train_split(spec, cut, training), plain_state(spec, cut, training)) == set()


def flip_record(at: int) -> Tensor:
    pixels = PIXELS.clone()
    pixels[at, 0, 3, 3] ^= 1
    return pixels


def nudge(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    # The largest element by one unit in its last place.
    at = int(flat.abs().argmax())
    flat[at] = torch.nextafter(flat[at], torch.tensor(torch.inf))
    return flat.reshape(tensor.shape)


def test_one_bit_of_a_record_one_gradient_or_one_draw_is_seen() -> None:
    cut = Partition(front=2, head=2)
    honest = plain_state(SPEC, cut, TRAINING)
    assert differing(train_split(SPEC, cut, TRAINING, pixels=flip_record(0)), honest)
    assert differing(train_split(SPEC, cut, TRAINING, on_gradient=nudge), honest)
    for name in ("front", "center", "head", "order", "augment"):
        changed = dataclasses.replace(SEEDS, **{name: bytes(32)})
        assert differing(train_split(SPEC, cut, TRAINING, seeds=changed), honest), name


def test_the_zones_keys_follow_the_cut() -> None:
    """A host that knows the CenterNet's seed must not know what the FrontNet draws."""
    cut, other = (plain_state(SPEC, Partition(front=front), TRAINING) for front in (1, 2))
    assert differing(cut, other)


# --- the plain loop --------------------------------------------------------------------------------------------


def test_the_plain_loop_is_the_ordinary_one() -> None:
    """Against torch by hand: no dropout, no augmentation, the same first weights and order."""
    training = TrainingSpec(epochs=3, batch=5, learning_rate=0.1, warmup_epochs=1, channels_last=False, threads=1)
    first = msgspec.structs.replace(training, epochs=1, learning_rate=1e-30)
    cut = Partition(front=1)
    losses: list[float] = []
    got = train_plain(
        FLAT, cut, SCHEMA, training, pixels=PIXELS, labels=LABELS, seeds=SEEDS,
        on_epoch=lambda epoch, loss: losses.append(loss) if epoch == len(losses) else None,
    )  # fmt: skip
    assert not got.training
    model = build(FLAT, input_shape=SCHEMA.shape)
    model.load_state_dict(plain_state(FLAT, cut, first))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order, expected = torch.arange(RECORDS), []
    for epoch in range(3):
        order = order[epoch_order(RECORDS, seed=SEEDS.order, epoch=epoch)]
        for step, batch in enumerate(order[:20].reshape(4, 5)):
            progress = epoch + step / 4
            cosine = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * (progress - 1) / 2)).item())
            sgd.param_groups[0]["lr"] = 0.1 * (step + 1) / 4 if epoch == 0 else cosine
            x = (PIXELS[batch] / 255 - torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)) / 0.2
            sgd.zero_grad()
            loss = F.cross_entropy(model(x), LABELS[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            expected.append(loss.item())
    for name, value in got.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6), name
    assert losses == pytest.approx([sum(expected[i : i + 4]) / 4 for i in (0, 4, 8)], abs=1e-6)


def test_the_plain_loop_learns() -> None:
    pixels = (LABELS * 100).to(torch.uint8)[:, None, None, None].expand(RECORDS, 3, 8, 8)
    training = msgspec.structs.replace(TRAINING, epochs=40)
    model = train_plain(FLAT, Partition(front=1), SCHEMA, training, pixels=pixels, labels=LABELS, seeds=SEEDS)
    logits = model(normalise(pixels, SCHEMA, channels_last=True))
    assert torch.equal(logits.argmax(1), LABELS)


def test_fewer_records_than_a_batch_train_nothing() -> None:
    losses: list[float] = []
    few = msgspec.structs.replace(TRAINING, epochs=1, batch=RECORDS + 1)
    got = train_plain(
        FLAT, Partition(front=1), SCHEMA, few, pixels=PIXELS, labels=LABELS, seeds=SEEDS,
        on_epoch=lambda _epoch, loss: losses.append(loss),
    )  # fmt: skip
    first = msgspec.structs.replace(TRAINING, epochs=1, learning_rate=1e-30, weight_decay=0.0)
    assert losses == [0.0]
    assert differing(state_of(got), plain_state(FLAT, Partition(front=1), first)) == set()


def test_the_plain_loop_has_no_code_of_enclave_or_host() -> None:
    allowed = ("caltrain.models.", "caltrain.training.", "caltrain.records.", "torch")
    imported: set[str] = set()
    for node in ast.walk(ast.parse(Path(str(plain.__file__)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module))
        elif isinstance(node, ast.Name):
            assert node.id not in {"__import__", "eval", "exec", "importlib"}
    assert imported, "nothing was found"
    for name in imported:
        assert name.split(".")[0] in sys.stdlib_module_names or f"{name}.".startswith(allowed), name


# --- one zone --------------------------------------------------------------------------------------------------


def zone(layers: range, spec: ModelSpec = FLAT) -> Zone:
    return Zone(spec, layers, input_shape=SCHEMA.shape, training=TRAINING, seed=SEEDS.front)


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_what_crosses_has_no_graph_and_the_zones_input_is_not_touched() -> None:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = zone(range(2)).forward(x, epoch=0, step=0, needs_input_grad=True)
    assert not out.requires_grad
    assert out.grad_fn is None
    assert not x.requires_grad
    assert x.grad is None


def test_a_gradient_comes_back_only_where_it_was_asked_for() -> None:
    for asked in (False, True):
        part = zone(range(2))
        out = part.forward(torch.ones(6, 3, 8, 8), epoch=0, step=0, needs_input_grad=asked)
        grad = part.backward(torch.ones_like(out), epoch=0, step=0, steps=3)
        assert (grad is not None) == asked


def test_a_gradient_serves_one_forward_pass() -> None:
    part = zone(range(2))
    before = parameters(part.module)
    assert part.backward(torch.ones(6, 4, 4, 4), epoch=0, step=0, steps=3) is None
    assert all(torch.equal(a, b) for a, b in zip(parameters(part.module), before, strict=True))
    out = part.forward(torch.rand(6, 3, 8, 8), epoch=0, step=0, needs_input_grad=True)
    part.backward(torch.ones_like(out), epoch=0, step=0, steps=3)
    stepped = parameters(part.module)
    assert not all(torch.equal(a, b) for a, b in zip(stepped, before, strict=True))
    assert part.backward(torch.ones_like(out), epoch=0, step=0, steps=3) is None
    assert all(torch.equal(a, b) for a, b in zip(parameters(part.module), stepped, strict=True))


@pytest.mark.parametrize("layers", [range(0), range(1, 2), range(1, 3)], ids=["none", "pooling", "pooling, flatten"])
def test_a_zone_without_weights_passes_gradients_through(layers: range) -> None:
    part = zone(layers)
    x = torch.rand(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = part.forward(x, epoch=0, step=0, needs_input_grad=True)
    got = part.backward(torch.ones_like(out), epoch=0, step=0, steps=3)
    assert got is not None
    assert got.sum().item() == out.numel()
    part.forward(x, epoch=0, step=0, needs_input_grad=False)
    assert part.backward(torch.ones_like(out), epoch=0, step=0, steps=3) is None


def test_the_loss_is_the_mean_cross_entropy_and_the_rate_that_of_the_step() -> None:
    moved: list[float] = []
    for epoch, step in ((0, 0), (0, 1), (0, 2), (1, 0)):
        part = zone(range(4, 5))
        before = parameters(part.module)
        x = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
        out = part.forward(x, epoch=epoch, step=step, needs_input_grad=True)
        grad, loss = part.backward_from_labels(LABELS[:6], epoch=epoch, step=step, steps=3)
        assert loss == pytest.approx(F.cross_entropy(out, LABELS[:6]).item())
        assert grad is not None
        assert grad.shape == x.shape
        moved.append(sum(float((a - b).norm()) for a, b in zip(parameters(part.module), before, strict=True)))
    assert [m / moved[0] for m in moved] == pytest.approx([1, 2, 3, 3], rel=1e-3)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_zones_weights_are_in_the_runs_layout(channels_last: bool) -> None:
    training = msgspec.structs.replace(TRAINING, channels_last=channels_last)
    part = Zone(SPEC, range(3), input_shape=SCHEMA.shape, training=training, seed=SEEDS.front)
    weights = [parameter for parameter in part.module.parameters() if parameter.dim() == 4]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [channels_last] * 2


def test_zones_train_and_never_evaluate() -> None:
    part = zone(range(3), SPEC)
    assert all(module.training for module in part.module.modules())
    part.forward(torch.rand(6, 3, 8, 8), epoch=0, step=0, needs_input_grad=False)
    assert int(part.module.state_dict()["0.norm.num_batches_tracked"]) == 1
