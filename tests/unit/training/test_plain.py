"""The plain loop is ordinary PyTorch, and owes nothing to the code that it is a reference for."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F

from caltrain.models.network import Network, build
from caltrain.models.spec import Partition
from caltrain.models.weights import state_of
from caltrain.training import plain
from caltrain.training.batches import normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import epoch_order
from caltrain.training.spec import TrainingSpec
from support.split_run import FLAT, LABELS, PIXELS, RECORDS, SCHEMA, SEEDS, TRAINING, differing, plain_state

CUT = Partition(front=1)
Seen = list[tuple[int, int, float]]


def test_the_plain_loop_is_the_ordinary_one() -> None:
    """Against torch by hand: no dropout, no augmentation, the same first weights and order."""
    training = TrainingSpec(epochs=3, batch=5, learning_rate=0.1, warmup_epochs=1, channels_last=False, threads=1)
    first = msgspec.structs.replace(training, epochs=1, learning_rate=1e-30)
    seen: Seen = []
    got = train_plain(
        FLAT, CUT, SCHEMA, training, pixels=PIXELS, labels=LABELS, seeds=SEEDS,
        on_step=lambda epoch, step, loss: seen.append((epoch, step, loss)),
    )  # fmt: skip
    assert not got.training
    model = build(FLAT, input_shape=SCHEMA.shape)
    model.load_state_dict(plain_state(FLAT, CUT, first))
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
    assert [(epoch, step) for epoch, step, _ in seen] == [(e, s) for e in range(3) for s in range(4)]
    assert [loss for _, _, loss in seen] == pytest.approx(expected, abs=1e-6)


def test_the_plain_loop_learns() -> None:
    pixels = (LABELS * 100).to(torch.uint8)[:, None, None, None].expand(RECORDS, 3, 8, 8)
    training = msgspec.structs.replace(TRAINING, epochs=40)
    model = train_plain(FLAT, CUT, SCHEMA, training, pixels=pixels, labels=LABELS, seeds=SEEDS)
    logits = model(normalise(pixels, SCHEMA, channels_last=True))
    assert torch.equal(logits.argmax(1), LABELS)


def test_who_is_told_of_an_epoch_may_say_that_it_was_the_last() -> None:
    training = TrainingSpec(epochs=5, batch=5, learning_rate=0.1, threads=1)
    told: list[int] = []

    def enough(epoch: int, _model: Network) -> bool:
        told.append(epoch)
        return epoch == 1

    got = train_plain(FLAT, CUT, SCHEMA, training, pixels=PIXELS, labels=LABELS, seeds=SEEDS, on_epoch=enough)
    assert told == [0, 1]
    assert not got.training


def test_fewer_records_than_a_batch_train_nothing() -> None:
    seen: Seen = []
    few = msgspec.structs.replace(TRAINING, epochs=1, batch=RECORDS + 1)
    got = train_plain(
        FLAT, CUT, SCHEMA, few, pixels=PIXELS, labels=LABELS, seeds=SEEDS,
        on_step=lambda epoch, step, loss: seen.append((epoch, step, loss)),
    )  # fmt: skip
    first = msgspec.structs.replace(TRAINING, epochs=1, learning_rate=1e-30, weight_decay=0.0)
    assert seen == []
    assert differing(state_of(got), plain_state(FLAT, CUT, first)) == set()


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
    assert "caltrain.training.zone" not in imported
    for name in imported:
        assert name.split(".")[0] in sys.stdlib_module_names or f"{name}.".startswith(allowed), name
