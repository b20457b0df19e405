"""Networks from IRs to pictures: every kind of cut, sizes that are no power of two, first weights of their own."""

from __future__ import annotations

import pytest
import torch

from caltrain.exposure.attacks.decoder import DOSOVITSKIY_BROX, HE_ET_AL, OURS, Design, Fit, draw, ladder, similar

DESIGNS = {"ours": OURS, "up-convolutional": DOSOVITSKIY_BROX, "transposed": HE_ET_AL}
PLANES = {
    "picture's size": ((5, 28, 28), (3, 28, 28)),
    "halved": ((5, 14, 14), (3, 28, 28)),
    "halved twice": ((5, 7, 7), (3, 28, 28)),
    "odd": ((5, 13, 7), (1, 25, 13)),
    "without padding": ((5, 26, 26), (1, 28, 28)),
    "larger than the picture": ((5, 12, 12), (1, 8, 8)),
    "no ladder fits": ((5, 5, 5), (3, 28, 28)),
    "vector": ((40, 1, 1), (3, 14, 14)),
    "tokens in a row": ((8, 17, 1), (3, 16, 16)),
    "very many channels": ((3000, 2, 2), (3, 8, 8)),
    "a table's row": ((6, 1, 1), (1, 1, 20)),
}


@pytest.mark.parametrize("kind", PLANES)
@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_goes_from_planes_to_pictures(name: str, kind: str) -> None:
    planes, picture = PLANES[kind]
    network = DESIGNS[name].build(planes, picture, 4, 1)
    found = network(torch.randn(2, *planes))
    assert found.shape == (2, *picture)
    assert not torch.equal(found[0], found[1])


def test_the_ladder_doubles_and_reaches_no_lower_than_the_ir() -> None:
    assert ladder((7, 7), (28, 28)) == [(7, 7), (14, 14), (28, 28)]
    assert ladder((5, 5), (28, 28)) == [(7, 7), (14, 14), (28, 28)]
    assert ladder((13, 7), (25, 13)) == [(13, 7), (25, 13)]
    assert ladder((28, 28), (28, 28)) == [(28, 28)]
    assert ladder((12, 12), (8, 8)) == [(8, 8)]
    assert ladder((1, 1), (1, 1)) == [(1, 1)]


def test_a_pixel_too_many_is_cropped_and_more_is_scaled() -> None:
    planes = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert torch.equal(Fit((5, 6))(planes), planes[:, :, :5])
    assert torch.equal(Fit((6, 6))(planes), planes)
    scaled = Fit((3, 3))(planes)
    assert scaled.shape == (1, 1, 3, 3)
    assert scaled.mean() == planes.mean()


def _first_weights(design: Design, seed: int) -> list[torch.Tensor]:
    network = draw(design.build((5, 4, 4), (3, 16, 16), 8, 1), torch.Generator().manual_seed(seed))
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("name", DESIGNS)
def test_first_weights_come_from_the_generator_alone(name: str) -> None:
    first = _first_weights(DESIGNS[name], 1)
    assert all(torch.equal(a, b) for a, b in zip(first, _first_weights(DESIGNS[name], 1), strict=True))
    others = [(a, b) for a, b in zip(first, _first_weights(DESIGNS[name], 2), strict=True) if a.dim() > 1]
    assert others
    assert not any(torch.equal(a, b) for a, b in others)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_drawn_network_neither_explodes_nor_dies_out(name: str) -> None:
    network = draw(DESIGNS[name].build((64, 4, 4), (3, 32, 32), 32, 1), torch.Generator().manual_seed(0))
    last = list(network.children())[-2] if name == "ours" else network  # before the sigmoid
    hooked: list[torch.Tensor] = []
    last.register_forward_hook(lambda _module, _given, out: hooked.append(out.detach()))
    network(torch.randn(8, 64, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert 0.5 < float(hooked[0].std()) < 2


def test_the_loss_falls_to_zero_at_the_picture_and_has_a_gradient() -> None:
    true = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = true.flip(0).requires_grad_()
    loss = similar(found, true)
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    assert bool((found.grad[0] != 0).any())
    assert float(loss.detach()) > 0.1
    assert float(similar(true, true)) == pytest.approx(0, abs=1e-5)
