"""Attribution against the definitions, with gradients from autograd, one pair of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability import attribution
from caltrain.accountability.attribution import Attribution, Fingerprints, GradientDot, Seen, Trak

DIMS, CLASSES = 5, 3


def layer(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(DIMS, CLASSES)


def seen(model: torch.nn.Linear, features: Tensor, labels: Tensor | None = None) -> Seen:
    with torch.no_grad():
        odds = model(features).softmax(1)
    return Seen(features, odds, odds.argmax(1) if labels is None else labels)


def some(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, DIMS), generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator)


def gradient(model: torch.nn.Linear, value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a value of the logits of one row, by weight and bias."""
    by_weight, by_bias = torch.autograd.grad(value(model(x)), [model.weight, model.bias])
    return torch.cat((by_weight, by_bias[:, None]), 1).flatten()


@pytest.mark.parametrize("at_once", [2, 4096])
def test_gradients_products_are_those_of_autograd(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "AT_ONCE", at_once)
    model, (x, y), (q, _) = layer(), some(7, 1), some(4, 2)
    asked = seen(model, q)
    found = GradientDot(seen(model, x, y)).scores(asked)

    def of_loss(rows: Tensor, labels: Tensor) -> list[Tensor]:
        return [
            gradient(model, lambda z, label=label: F.cross_entropy(z[None], label[None]), row)  # type: ignore[misc]
            for row, label in zip(rows, labels, strict=True)
        ]

    expected = torch.tensor([[float(a @ b) for b in of_loss(x, y)] for a in of_loss(q, asked.labels)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def margins(model: torch.nn.Linear, rows: Tensor, labels: Tensor) -> Tensor:
    def margin(z: Tensor, label: int) -> Tensor:
        odds = z.softmax(0)[label]
        return (odds / (1 - odds)).log()

    gradients = []
    for row, label in zip(rows, labels.tolist(), strict=True):
        gradients.append(gradient(model, lambda z, label=label: margin(z, label), row))  # type: ignore[misc]
    return torch.stack(gradients)


@pytest.mark.parametrize(("at_once", "ridge"), [(2, 1e-3), (4096, 1e-3), (4096, 0.5)])
def test_whitened_margins_are_those_of_the_definition(
    at_once: int, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "AT_ONCE", at_once)
    model, (x, y), (q, _) = layer(), some(60, 1), some(4, 2)
    records, asked = seen(model, x, y), seen(model, q)
    phi, theirs = margins(model, x, y).double(), margins(model, q, asked.labels).double()
    gram = phi.T @ phi
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    doubt = 1 - records.probabilities[torch.arange(60), y].double()
    expected = theirs @ torch.linalg.inv(gram) @ phi.T * doubt
    torch.testing.assert_close(Trak(records, ridge=ridge).scores(asked).double(), expected, atol=1e-4, rtol=1e-3)


def test_wide_features_are_projected_and_keep_the_order_of_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "_MOST_NUMBERS", CLASSES * 200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((400, 300), generator=generator)
    odds = torch.randn((400, CLASSES), generator=generator).softmax(1)
    records = Seen(x, odds, odds.argmax(1))
    asked = records.rows(slice(5))
    found = Trak(records).scores(asked)
    assert found.shape == (5, 400)
    assert Trak(records)._factor.shape == (CLASSES * 200, CLASSES * 200), "as many numbers as there is room for"
    drawn = Trak(records)._projection
    assert drawn is not None
    assert float(drawn.square().sum(1).mean()) == pytest.approx(1.0, abs=0.05), "lengths stay what they are"
    assert torch.equal(found, Trak(records).scores(asked)), "drawn from a seed"
    assert found.argmax(1).tolist() == [*range(5)]


@pytest.mark.parametrize(("most", "projected"), [(CLASSES * (DIMS + 1), False), (CLASSES * (DIMS + 1) - 1, True)])
def test_features_are_projected_only_where_there_is_no_room(
    *, most: int, projected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "_MOST_NUMBERS", most)
    assert (Trak(seen(layer(), *some(30, 1)))._projection is not None) is projected


def test_fingerprints_rank_by_distance_inside_the_predicted_class() -> None:
    model, (x, y), (q, _) = layer(), some(9, 1), some(2, 2)
    asked = seen(model, q)
    found = Fingerprints(seen(model, 7 * x, y)).scores(asked)
    for row, label, unit in zip(found, asked.labels, F.normalize(q, dim=1), strict=True):
        expected = torch.where(y == label, -(F.normalize(x, dim=1) - unit).norm(dim=1), -torch.inf)
        torch.testing.assert_close(row, expected, atol=1e-3, rtol=0)


METHODS: dict[str, Callable[[Seen], Attribution]] = {"nearest": Fingerprints, "gradients": GradientDot, "trak": Trak}


def fitted(x: Tensor, y: Tensor) -> torch.nn.Linear:
    """A last layer at the minimum of its loss with a little decay."""
    model = layer().double()
    steps = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> float:
        steps.zero_grad()
        value = F.cross_entropy(model(x), y, reduction="sum") + 0.05 * sum(p.square().sum() for p in model.parameters())
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    steps.step(loss)  # type: ignore[no-untyped-call]
    return model


def log_odds(model: torch.nn.Linear, q: Tensor, label: int) -> float:
    with torch.no_grad():
        odds = float(model(q).softmax(0)[label])
    return float(torch.tensor(odds / (1 - odds)).log())


def test_scores_foretell_what_leaving_a_record_out_does() -> None:
    x, y = some(80, 1)
    x, q = x.double(), some(1, 5)[0].double()
    y = (x[:, :CLASSES] + 0.7 * torch.randn(80, CLASSES, generator=torch.Generator().manual_seed(2))).argmax(1)
    model = fitted(x, y)
    asked, records = seen(model, q), seen(model, x, y)
    label = int(asked.labels[0])
    whole, effects = log_odds(model, q[0], label), []
    left_out = range(0, 80, 3)
    for out in left_out:
        kept = torch.arange(80) != out
        effects.append(whole - log_odds(fitted(x[kept], y[kept]), q[0], label))
    ranks = torch.tensor(effects).argsort().argsort().double()
    agreement = {}
    methods: dict[str, Callable[[Seen], Attribution]] = {"gradients": GradientDot, "trak": Trak}
    methods["of the enclave"] = partial(Trak, ridge=1.0)
    for name, method in methods.items():
        scores = method(Seen(records.features.float(), records.probabilities.float(), y)).scores(
            Seen(asked.features.float(), asked.probabilities.float(), asked.labels)
        )
        own = scores[0][[*left_out]].argsort().argsort().double()
        agreement[name] = float(torch.corrcoef(torch.stack((own, ranks)))[0, 1])
    assert agreement["trak"] > 0.85, agreement
    assert agreement["trak"] > agreement["of the enclave"] > 0.7, agreement
    assert agreement["gradients"] > 0.4


@pytest.mark.parametrize("name", METHODS)
def test_certainty_gives_no_infinite_scores(name: str) -> None:
    x, y = some(6, 1)
    odds = F.one_hot(y, CLASSES).float()
    records = Seen(x, odds, y)
    found = METHODS[name](records).scores(records)
    assert not bool(found.isnan().any())
    assert bool(found[y[:, None] == y].isfinite().all())
