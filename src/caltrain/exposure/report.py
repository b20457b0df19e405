"""An exposure report as data: what each cut gives away by every measure, beside what it costs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from caltrain.crypto.digests import Digest, canonical_json, digest
from caltrain.exposure.attacks.labels import Groups, LabelFigures
from caltrain.exposure.choice import Choice
from caltrain.exposure.cost import CutCost
from caltrain.exposure.figures import Count, Estimate, KlFigures, Scores
from caltrain.exposure.policy import Policy
from caltrain.exposure.speed import Speed
from caltrain.models.spec import Cut

Named = Annotated[dict[str, Estimate], msgspec.Meta(max_length=64)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How it was measured: by which attacks with which budget, on how many pictures, from which draws."""

    attacks: tuple[str, ...]
    budget: str
    targets: Count
    candidates: Count
    own: Count
    maps: Count | None
    tolerance: float
    seed: int
    threads: Count


class Judge(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The validator of the papers' assessment, and how often it is right on the candidates."""

    model: Digest
    accuracy: Estimate


class CutReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One cut. `plain`: measures without an attack; `attacks`: scores by adversary; `seconds`: what each took."""

    cost: CutCost
    speed: Speed | None = None
    plain: Named = {}
    kl: KlFigures | None = None
    attacks: dict[str, Scores] = {}
    labels: LabelFigures | None = None
    seconds: dict[str, float] = {}

    @property
    def price(self) -> float:
        """What a choice goes by: the share of compute inside; layers where a stage hides it, as then at every cut."""
        return float(self.cost.front) if self.cost.compute is None else self.cost.compute

    def figures(self) -> dict[str, Estimate]:
        """By the keys of a policy's bounds: `whitebox.ssim`, `kl_ratio`."""
        found = dict(self.plain)
        if self.kl is not None:
            found |= {"kl": self.kl.kl, "kl_ratio": self.kl.ratio}
        for name, scores in self.attacks.items():
            found |= {f"{name}.{measure}": value for measure, value in of_scores(scores).items()}
        if self.labels is not None:
            found["label_purity"] = self.labels.purity
        return found


class DefenceReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A cut with a defence: what attacks still get, the accuracy as it is, and after tuning the rest of the model."""

    front: Cut
    defence: str
    attacks: dict[str, Scores]
    accuracy: Estimate
    tuned: Estimate


class ExposureReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole assessment of one model.

    `floor_at`: for each measure the first cut from which on it is no better than guessing without an IR (the better
    floor's interval is reached), None where it never is. `broken`: cuts that the papers' rule calls safe, with the
    attacks that beat the floor there. `spearman`: rank correlation of each measure with the depth of the cut.
    `head_gradients`: the label groups in what goes out in ternary training, wherever the FrontNet ends.
    """

    version: Literal[1] = 1
    model: Digest
    data: str
    accuracy: Estimate
    judge: Judge | None
    settings: Settings
    floors: dict[str, Scores]
    cuts: dict[Cut, CutReport]
    papers_cut: Cut | None
    floor_at: dict[str, Cut | None]
    spearman: dict[str, float]
    broken: dict[Cut, tuple[str, ...]]
    head_gradients: Groups | None = None
    policy: Policy | None = None
    choice: Choice | None = None
    assumptions: tuple[str, ...] = ()
    defences: tuple[DefenceReport, ...] = ()

    def digest(self) -> str:
        """Digest of the report: what a statement names."""
        return digest("exposure-report/v1", canonical_json(self))


class ExposureStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What whoever assessed signs: this report is of this model, and this cut was chosen (DSSE kind `exposure`)."""

    version: Literal[1] = 1
    model: Digest
    report: Digest
    policy: Policy | None
    front: Cut | None


MEASURES = ("psnr", "ssim", "perceptual", "reidentification")


def of_scores(scores: Scores) -> dict[str, Estimate]:
    """The four measures by name."""
    return {name: getattr(scores, name) for name in MEASURES}
