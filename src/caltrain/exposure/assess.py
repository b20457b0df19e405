"""The assessment of one model: every cut by every measure, beside what it costs (arXiv:1807.00969, and beyond it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from caltrain.exposure.asked import Asked, check_asked
from caltrain.exposure.attacks.labels import assess_labels, head_groups
from caltrain.exposure.choice import Choice, choose
from caltrain.exposure.correlation import channel_correlation, distance_correlation
from caltrain.exposure.cost import cost_of
from caltrain.exposure.defence_spec import DefenceSpec
from caltrain.exposure.defences import accuracy, defended, tuned_accuracy
from caltrain.exposure.figures import Estimate, KlFigures, Scores
from caltrain.exposure.findings import broken, depth_correlations, floor_at
from caltrain.exposure.kl import assess_kl, papers_cut
from caltrain.exposure.lineup import Lineup
from caltrain.exposure.maps import maps_of
from caltrain.exposure.material import Material
from caltrain.exposure.measures import floors, score
from caltrain.exposure.perceptual import distance_by
from caltrain.exposure.policy import ADVERSARIES, Adversary, weaker_adversary
from caltrain.exposure.precision import fast
from caltrain.exposure.report import CutReport, DefenceReport, ExposureReport, Judge, Settings
from caltrain.exposure.shown import unflattened
from caltrain.exposure.speed import images_per_second
from caltrain.exposure.statistics import mean_estimate
from caltrain.exposure.subject import Cut, Subject, candidate_cuts
from caltrain.exposure.validator import Validator, generator_as_validator

_SHOWN = 8
_SPEED_BATCH = 32
OnStep = Callable[[str, int, int], None]


@dataclass
class Gallery:
    """Some targets, the most telling map of each cut, and reconstructions by (cut, attack): (8, C, H, W) each."""

    inputs: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)
    pictures: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class Assessor:
    """One assessment as it goes on. `on_step` is told (what, done, of) and drives a progress bar."""

    def __init__(
        self,
        subject: Subject,
        material: Material,
        asked: Asked,
        *,
        validator: Validator | None,
        clock: Callable[[], float],
        on_step: OnStep = lambda _what, _done, _of: None,
    ) -> None:
        check_asked(subject, asked, material)
        self.subject, self.material, self.asked = subject, material, asked
        self.validator = validator or generator_as_validator(subject)
        self.cuts = tuple(sorted(set(asked.cuts))) or candidate_cuts(subject.spec)
        self.gallery = Gallery(material.targets[:_SHOWN])
        self._clock, self._on_step = clock, on_step
        self._distance = distance_by(self.validator.subject)
        self._lineup = Lineup(material, asked.budget, asked.seed)
        self._done, self._kl_seconds = 0, 0.0
        names = [name for name in ADVERSARIES if name in asked.attacks]
        self._names = sorted(names, key=lambda name: name != "inverter")  # the white box begins with its pictures
        self._total = len(self.cuts) * (len(asked.attacks) + 1) + len(asked.defences) * (len(names) + 1)

    def run(self, *, data: str, threads: int) -> ExposureReport:
        """All of it. Raises as the parts do."""
        asked, material = self.asked, self.material
        guesses = floors(material, self._distance, seed=asked.seed)
        kl = self._kl() if "kl" in asked.attacks else {}
        cuts = {front: self._cut(front, kl.get(front)) for front in self.cuts}
        figures = {front: cut.figures() for front, cut in cuts.items()}
        costs = {front: cut.price for front, cut in cuts.items()}
        choice = choose(asked.policy, figures, costs=costs) if asked.policy else None
        names = {name for cut in cuts.values() for name in cut.attacks}
        safe_from = papers_cut(kl, tolerance=asked.tolerance) if kl else None
        judge = self.validator.accuracy
        return ExposureReport(
            model=self.subject.digest,
            data=data,
            accuracy=accuracy(Cut(self.subject, self.cuts[0]), material.candidates, material.labels),
            judge=Judge(model=self.validator.subject.digest, accuracy=judge) if judge else None,
            settings=Settings(
                attacks=asked.attacks,
                budget=asked.budget,
                targets=len(material.targets),
                candidates=len(material.candidates),
                own=len(material.own),
                maps=asked.maps,
                tolerance=asked.tolerance,
                seed=asked.seed,
                threads=threads,
            ),
            floors=guesses,
            cuts=cuts,
            papers_cut=safe_from,
            floor_at=floor_at(cuts, guesses) if names else {},
            spearman=depth_correlations(cuts),
            broken=broken(cuts, guesses, tolerance=asked.tolerance),
            head_gradients=head_groups(self.subject, material.widened(), seed=asked.seed)
            if "labels" in asked.attacks
            else None,
            policy=asked.policy,
            choice=choice,
            assumptions=weaker_adversary(asked.policy) if asked.policy else (),
            defences=tuple(self._defence(spec, choice) for spec in asked.defences),
        )

    # -- the parts -----------------------------------------------------------------------------------------------

    def _kl(self) -> dict[int, KlFigures]:
        pictures, began = self.material.candidates[: self.asked.kl_inputs], self._clock()
        found = assess_kl(
            self.subject,
            self.cuts,
            self.validator,
            pictures,
            maps=self.asked.maps,
            seed=self.asked.seed,
            on_step=lambda done, of: self._tell("kl", done / of * len(self.cuts)),
        )
        self._done += len(self.cuts)
        self._kl_seconds = self._clock() - began
        return found

    def _cut(self, front: int, kl: KlFigures | None) -> CutReport:
        cut, material, seconds = Cut(self.subject, front), self.material, dict[str, float]()
        if kl is not None:
            self.gallery.maps[front] = self._telling(cut, kl.most_telling)
            seconds["kl"] = self._kl_seconds / len(self.cuts)  # one pass serves all cuts
        attacks = dict[str, Scores]()
        for name, pictures, taken in self._attack(cut):
            attacks[name] = score(pictures, material, self._distance, seed=self.asked.seed)
            self.gallery.pictures[front, name] = pictures[:_SHOWN]
            seconds[name] = taken
        labels = None
        if "labels" in self.asked.attacks:
            began = self._clock()
            labels = assess_labels(cut, material.widened(), seed=self.asked.seed)
            seconds["labels"] = self._clock() - began
            self._advance(f"cut {front}: labels")
        batch = material.own[:_SPEED_BATCH]
        return CutReport(
            cost=cost_of(self.subject.spec, self.subject.data, front),
            speed=images_per_second(self.subject, front, batch, clock=self._clock),
            plain=self._plain(cut),
            kl=kl,
            attacks=attacks,
            labels=labels,
            seconds=seconds,
        )

    def _attack(self, cut: Cut) -> list[tuple[Adversary, Tensor, float]]:
        """Every reconstruction of this cut and its seconds; the white box takes the inverter's for granted."""
        found = []
        for name in self._names:
            began, what = self._clock(), f"cut {cut.front}: {name}"
            self._lineup.on_step = partial(self._part, what)
            pictures = self._lineup.reconstruct(name, cut)
            found.append((name, pictures, self._clock() - began))
            self._advance(what)
        return found

    def _plain(self, cut: Cut) -> dict[str, Estimate]:
        with torch.inference_mode():
            targets = self.material.targets
            correlation = channel_correlation(cut.ir(targets), targets)
            distance = distance_correlation(cut.stacked(targets), targets)
        self._advance(f"cut {cut.front}: correlation")
        return {
            "channel_correlation": mean_estimate(correlation.numpy(), seed=self.asked.seed),
            "distance_correlation": distance,
        }

    def _defence(self, spec: DefenceSpec, choice: Choice | None) -> DefenceReport:
        """The defence at the chosen cut, at the nearest to it where none is, or at the shallowest that was assessed."""
        material, seed = self.material, self.asked.seed
        front = (choice.front or choice.nearest if choice else None) or self.cuts[0]
        cut = defended(Cut(self.subject, front), spec, material.own, seed=seed)
        attacks: dict[str, Scores] = {
            name: score(pictures, material, self._distance, seed=seed) for name, pictures, _ in self._attack(cut)
        }
        others = material.candidates, material.labels
        return DefenceReport(
            front=cut.front,
            defence=spec.text,
            attacks=attacks,
            accuracy=accuracy(cut, *others),
            tuned=self._tuned(cut, others),
        )

    def _tuned(self, cut: Cut, others: tuple[Tensor, Tensor]) -> Estimate:
        material, what = self.material, f"cut {cut.front}: tuning"
        with fast():
            own = material.own, material.own_labels
            found = tuned_accuracy(cut, own, others, seed=self.asked.seed, on_step=partial(self._part, what))
        self._advance(what)
        return found

    def _telling(self, cut: Cut, number: int) -> Tensor:
        with torch.inference_mode():
            shown = unflattened(self.subject, cut.front, cut.ir(self.gallery.inputs))
            return maps_of(shown, (self.subject.shape[1], self.subject.shape[2]), torch.tensor([number]))

    # -- progress ------------------------------------------------------------------------------------------------

    def _advance(self, what: str) -> None:
        self._done += 1
        self._tell(what, 0)

    def _part(self, what: str, done: int, of: int) -> None:
        self._tell(what, done / of)

    def _tell(self, what: str, part: float) -> None:
        self._on_step(what, round(1000 * (self._done + part)), 1000 * self._total)
