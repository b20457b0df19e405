"""Each kind of mistake, by records placed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.cases import Dossier, Links, Mispredictions
from caltrain.accountability.kinds import kinds_of
from caltrain.accountability.outcomes import Kind
from support.dossiers import Told, sure

AXES = torch.eye(6)
NOBODY = torch.empty(0, dtype=torch.int64)


def cloud(center: Tensor, count: int, seed: int, *, spread: float = 0.05) -> Tensor:
    noise = torch.randn((count, 6), generator=torch.Generator().manual_seed(seed)) * spread
    return F.normalize(F.normalize(center, dim=0) + noise, dim=1)


def dossier_of(*clouds: tuple[Tensor, int]) -> tuple[Dossier, list[Tensor]]:
    """Records in clouds of 40 with their label; also the rows of each cloud."""
    fingerprints = torch.cat([cloud(center, 40, seed) for seed, (center, _) in enumerate(clouds)])
    labels = torch.tensor([label for _, label in clouds]).repeat_interleave(40)
    sources = torch.zeros_like(labels)
    dossier = Dossier(Links(fingerprints, labels, sources, ("a", "b")), (Told(sure(labels), labels, sources),))
    return dossier, list(torch.arange(len(labels)).view(-1, 40))


def kind_of(dossier: Dossier, at: Tensor, predicted: int, *, suspects: Tensor = NOBODY) -> Kind:
    asked = Mispredictions(cloud(at, 3, 99, spread=0.02), torch.full((3,), predicted))
    (kind,) = set(kinds_of(dossier, asked, suspects=suspects))
    return kind


ORDINARY = ((AXES[0], 0), (AXES[1], 1), (AXES[2], 2))


def test_hard_is_what_lies_among_records_of_one_label_without_suspects() -> None:
    assert kind_of(dossier_of(*ORDINARY)[0], AXES[0], 0) == "hard"


def test_out_of_distribution_is_what_lies_far_from_every_record() -> None:
    assert kind_of(dossier_of(*ORDINARY)[0], AXES[5], 0) == "out-of-distribution"


def test_ambiguous_is_what_lies_among_records_of_several_labels() -> None:
    mixed = [(AXES[3], label) for label in (0, 1, 2)]
    assert kind_of(dossier_of(*ORDINARY, *mixed)[0], AXES[3], 0) == "ambiguous"


def test_trigger_is_what_lies_with_suspects_that_keep_to_themselves() -> None:
    dossier, rows = dossier_of(*ORDINARY, (AXES[0] + AXES[4], 0))
    assert kind_of(dossier, AXES[0] + AXES[4], 0, suspects=rows[3]) == "trigger"


def test_mislabelled_is_what_lies_with_suspects_among_records_of_other_labels() -> None:
    dossier, rows = dossier_of(*ORDINARY, (AXES[1], 1), (AXES[1], 0))
    assert kind_of(dossier, AXES[1], 0, suspects=rows[4]) == "mislabelled"


@pytest.mark.parametrize(("at", "predicted"), [(AXES[0], 0), (AXES[0] + AXES[4], 1), (AXES[1], 1)])
def test_what_lies_with_the_rest_of_its_class_or_was_predicted_another_is_not_the_suspects(
    at: Tensor, predicted: int
) -> None:
    dossier, rows = dossier_of(*ORDINARY, (AXES[0] + AXES[4], 0))
    assert kind_of(dossier, at, predicted, suspects=rows[3]) == "hard"


def test_where_all_of_a_class_are_suspects_its_mispredictions_are_theirs() -> None:
    dossier, rows = dossier_of(*ORDINARY)
    assert kind_of(dossier, AXES[0], 0, suspects=rows[0]) == "trigger"
    assert kind_of(dossier, AXES[1], 1, suspects=rows[0]) == "hard"


def test_one_suspect_among_many_is_no_kind() -> None:
    dossier, rows = dossier_of(*ORDINARY)
    assert kind_of(dossier, AXES[0], 0, suspects=rows[0][:1]) == "hard"


def test_without_any_record_everything_is_out_of_distribution() -> None:
    none = Links(torch.zeros((0, 6)), NOBODY, NOBODY, ())
    dossier = Dossier(none, (Told(torch.zeros((0, 3)), NOBODY, NOBODY),))
    asked = Mispredictions(AXES[:2], torch.tensor([0, 1]))
    assert kinds_of(dossier, asked, suspects=NOBODY) == ("out-of-distribution", "out-of-distribution")


def test_each_misprediction_has_its_own_kind_in_their_order() -> None:
    dossier, rows = dossier_of(*ORDINARY, (AXES[0] + AXES[4], 0))
    # More than are looked at together.
    fingerprints = torch.cat((cloud(AXES[0] + AXES[4], 100, 7), cloud(AXES[5], 100, 8), cloud(AXES[0], 1, 9)))
    asked = Mispredictions(fingerprints, torch.zeros(201, dtype=torch.int64))
    kinds = kinds_of(dossier, asked, suspects=rows[3])
    assert kinds == ("trigger",) * 100 + ("out-of-distribution",) * 100 + ("hard",)
