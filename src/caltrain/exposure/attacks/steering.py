"""A host that steers: feature-space hijacking (Pasquini, Ateniese and Bernaschi, arXiv:2012.02670) of the FrontNet.

The host sends back gradients that have nothing to do with the task: they pull what the FrontNet gives towards what the
host's own *pilot* gives, to which it has a decoder. It holds pictures of the same kind, the plan (so the architecture
and the cut), and what crosses: no weight, record or label of the parties. How large its gradients are is its choice;
the size of honest ones looks like nothing, and the plan's bound is far above that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caltrain.exposure.attacks.decoder import draw, similar, up_convolutional
from caltrain.exposure.subject import Cut, Live, Subject, stacked
from caltrain.models.layers import Shape
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec
from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment
from caltrain.training.seeds import Draws, initialise
from caltrain.training.spec import Augment

OnStep = Callable[[int, int], None]
_AT_ONCE = 256
_PENALTY = 10.0
_AS_THEY_ARE = Augment()


@dataclass(frozen=True)
class HijackBudget:
    """What the host spends: steps before the run for pilot and decoder, rounds of the critic in each step of it.

    `rms`: the root mean square of the first gradients that it sends, where the plan's bound allows that. After `settle`
    steps they are half as large, and so on as 1 / (1 + step / settle): without that the FrontNet circles its goal.
    """

    rms: float = 5e-5
    settle: int = 64
    rehearsal: int = 400
    rounds: int = 2
    width: int = 32
    batch: int = 32


class Hijacker:
    """Knows what the host knows: of `public` pictures (N, C, H, W), the IRs, and by the plan all else.

    `varied`: the plan's augmentation. The pilot has to see pictures as the FrontNet sees them, or it pulls elsewhere.
    """

    def __init__(
        self,
        spec: ModelSpec,
        data: DataSchema,
        front: int,
        public: Tensor,
        *,
        budget: HijackBudget,
        max_rms: float,
        seed: int,
        varied: Augment = _AS_THEY_ARE,
        on_step: OnStep = lambda _done, _of: None,
    ) -> None:
        self._public, self._budget = public, budget
        self._rms = min(budget.rms, max_rms)
        self._generator = torch.Generator().manual_seed(seed)
        self._varied, self._seed, self._batches = varied, seed.to_bytes(32, "big"), 0
        self._steps = 0
        own = build(spec, input_shape=data.shape)
        initialise(own, self._seed)
        self._pilot = Cut(Subject(spec, data, own.eval(), ""), front)
        planes: Shape = tuple(self._pilot.stacked(public[:2]).shape[1:])
        decoder = up_convolutional(planes, tuple(public.shape[1:]), budget.width, 1)
        self._decoder = draw(decoder, self._generator)
        self._critic = draw(_critic(planes), self._generator)
        self._judging = torch.optim.Adam(self._critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
        self._rehearse([*own.parameters(), *self._decoder.parameters()], on_step)
        own.requires_grad_(requires_grad=False)

    def _rehearse(self, parameters: list[nn.Parameter], on_step: OnStep) -> None:
        """Pilot and decoder learn to carry one's own pictures. From then on they stay."""
        optimiser = torch.optim.Adam(parameters, lr=1e-3)
        for step in range(self._budget.rehearsal):
            pictures = self._some(self._budget.batch)
            loss = similar(self._decoder(self._pilot.stacked(pictures)), pictures)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            on_step(step + 1, self._budget.rehearsal)

    def gradients(self, live: Live) -> Live:
        """What to send back for what crossed in a step: tensors like `live`, all of one size. The critic learns too.

        The critic is Wasserstein's with a gradient penalty (arXiv:1704.00028), as in the paper.
        """
        with torch.no_grad():
            fake = stacked(live)
            real = self._pilot.stacked(self._some(len(fake)))
        for _ in range(self._budget.rounds):
            self._judge(real, fake)
        watched = tuple(tensor.detach().clone().requires_grad_() for tensor in live)
        grads = torch.autograd.grad(-self._critic(stacked(watched)).sum(), watched)
        size = self._rms / (1 + self._steps / self._budget.settle)
        self._steps += 1
        return tuple(grad * (size / grad.square().mean().sqrt().clamp_min(1e-30)) for grad in grads)

    def _judge(self, real: Tensor, fake: Tensor) -> None:
        share = torch.rand((len(real), 1, 1, 1), generator=self._generator)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self._critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss = self._critic(fake).mean() - self._critic(real).mean() + _PENALTY * penalty
        self._judging.zero_grad()
        loss.backward()
        self._judging.step()

    def reconstruct(self, live: Live) -> Tensor:
        """Pictures (N, C, H, W) in 0..1: what the decoder makes of what crossed."""
        with torch.inference_mode():
            return torch.cat([self._decoder(part).clamp(0, 1) for part in torch.split(stacked(live), _AT_ONCE)])

    def _some(self, count: int) -> Tensor:
        drawn = self._public[torch.randint(len(self._public), (count,), generator=self._generator)]
        self._batches += 1
        return augment(drawn, self._varied, Draws(self._seed, 0, self._batches))


def _critic(planes: Shape, *, width: int = 32) -> nn.Module:
    """Scores (N, 1) of planes (N, C, h, w)."""
    height, across = (-(-side // 4) for side in planes[1:])
    return nn.Sequential(
        nn.Conv2d(planes[0], width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * height * across, 1),
    )
