"""The adversaries who reconstruct pictures, by name, each with its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caltrain.exposure.attacks import inverter, shadow, whitebox
from caltrain.exposure.attacks.inverter import Inverter, seen, train_inverter
from caltrain.exposure.attacks.priors import Basis, basis_of
from caltrain.exposure.figures import BudgetName
from caltrain.exposure.material import Material
from caltrain.exposure.policy import Adversary
from caltrain.exposure.subject import Cut, stacked

OnStep = Callable[[int, int], None]


@dataclass
class Lineup:
    """Attacks on one cut after the other, with what they share. `on_step` is told (steps done, of) within an attack."""

    material: Material
    budget: BudgetName
    seed: int
    on_step: OnStep = lambda _done, _of: None
    _trained: tuple[Cut, Inverter] | None = None
    _basis: Basis | None = None

    def reconstruct(self, name: Adversary, cut: Cut) -> Tensor:
        """The targets (N, C, H, W), as that adversary gets them out of what crosses."""
        match name:
            case "inverter":
                return self._inverter(cut)(seen(cut, self.material.targets))
            case "whitebox":
                return self._whitebox(cut)
            case "shadow":
                budget = shadow.BUDGETS[self.budget]
                return shadow.shadow(cut, self.material, budget=budget, seed=self.seed, on_step=self.on_step)

    def _inverter(self, cut: Cut) -> Inverter:
        """Kept: who knows the FrontNet begins with an inverter as well. It has not seen what that practises on."""
        if self._trained is None or self._trained[0] is not cut:
            own = self.material.own[: -whitebox.PRACTICE]
            budget = inverter.BUDGETS[self.budget]
            trained = train_inverter(cut.stacked, own, budget=budget, seed=self.seed, on_step=self.on_step)
            self._trained = cut, trained
        return self._trained[1]

    def _whitebox(self, cut: Cut) -> Tensor:
        start, own = self._inverter(cut), self.material.own
        self._basis = self._basis or basis_of(own[: -whitebox.PRACTICE])
        with torch.inference_mode():
            observed = cut.ir(self.material.targets)
        return whitebox.whitebox(
            cut,
            observed,
            own,
            budget=whitebox.BUDGETS[self.budget],
            seed=self.seed,
            start=lambda live: start(stacked(live)),
            basis=self._basis,
            on_step=self.on_step,
        )
