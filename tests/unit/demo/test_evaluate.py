"""The demo's figures, against examples counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caltrain.demo import evaluate
from caltrain.demo.evaluate import Lineage, same_weights
from caltrain.demo.scenario import Attack, Holding, Scenario
from caltrain.records.commitment import RecordRef
from caltrain.records.readers import Dataset

TARGET = 1


def holding(name: str, poisoned: list[int], mislabelled: list[int], count: int = 4) -> Holding:
    masks = [np.isin(np.arange(count), rows) for rows in (poisoned, mislabelled)]
    return Holding(name, np.zeros((count, 1, 2, 2), np.uint8), np.zeros(count, np.int64), masks[0], masks[1])


ANN, BOB, EVE = holding("ann", [], []), holding("bob", [], [2]), holding("eve", [0, 1], [])
LABELS = [0, 0, 1, 2, 2, 1]
TEST = Dataset(np.zeros((6, 1, 2, 2), np.uint8), np.array(LABELS), ("a", "b", "c"))
SCENE = Scenario((ANN, BOB, EVE), TEST, Attack(TARGET, 0, 0, np.zeros((1, 1), np.uint8)))


def ref(name: str, row: int) -> RecordRef:
    return RecordRef(name, "0" * 32, row)


LINEAGE = Lineage({ref(h.name, row): (h, row) for h in SCENE.holdings for row in range(4)})


def test_lineage_knows_what_was_done_to_each_record() -> None:
    assert [r for r in LINEAGE.rows if LINEAGE.is_poisoned(r)] == [ref("eve", 0), ref("eve", 1)]
    assert [r for r in LINEAGE.rows if LINEAGE.is_mislabelled(r)] == [ref("bob", 2)]
    assert (SCENE.culprit, SCENE.poison_share) == ("eve", 2 / 12)


def test_accuracy_is_over_the_whole_test_set() -> None:
    assert evaluate.accuracy(SCENE, np.array([0, 0, 1, 2, 0, 0])) == 4 / 6


def test_triggered_inputs_are_of_other_classes_and_right_without_the_trigger() -> None:
    # Right are rows 0, 2 and 3; row 2 is of the target's class.
    assert list(evaluate.triggered_inputs(SCENE, np.array([0, 1, 1, 2, 0, 0]))) == [0, 3]


def test_attack_success_is_over_all_inputs_of_other_classes() -> None:
    # Others are rows 0, 1, 3, 4; the trigger turns 0 and 4 into the target. Rows 2 and 5 do not count.
    assert evaluate.attack_success(SCENE, np.array([1, 0, 1, 2, 1, 1])) == 0.5


def test_precision_is_the_mean_share_of_planted_records() -> None:
    traced = [[ref("eve", 0), ref("eve", 1)], [ref("eve", 2), ref("eve", 0)], [ref("ann", 0), ref("bob", 2)]]
    assert evaluate.trace_precision(traced, LINEAGE) == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_trace_names_the_culprit_only_with_more_than_half_of_its_neighbours() -> None:
    traced = [
        [ref("eve", 0), ref("eve", 3), ref("ann", 0)],  # two of three, though one of them is clean
        [ref("eve", 0), ref("ann", 0)],  # half is not most
        [ref("eve", 0), ref("ann", 0), ref("bob", 0)],
        [ref("eve", 0)],
    ]
    assert evaluate.trace_contributor_accuracy(traced, "eve") == 0.5
    assert evaluate.trace_contributor_accuracy(traced, "ann") == 0


@pytest.mark.parametrize(
    ("named", "precision", "recall"),
    [
        ([], None, 0.0),
        ([ref("eve", 0), ref("eve", 1)], 1.0, 1.0),
        ([ref("eve", 0), ref("eve", 2), ref("bob", 2), ref("ann", 0)], 0.25, 0.5),
        ([ref("bob", 2)], 0.0, 0.0),  # a wrong label, but not planted
    ],
)
def test_a_verdict_is_held_against_what_was_planted(
    named: list[RecordRef], precision: float | None, recall: float
) -> None:
    assert evaluate.poison_precision(named, LINEAGE) == precision
    assert evaluate.poison_recall(named, LINEAGE) == recall


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (1.0, 1.0),  # above all others
        (0.0, 0.0),  # below all others
        (0.5, 9 / 11),  # below the two planted ones, which count as others
    ],
)
def test_auroc_is_of_the_mislabelled_against_all_others(own: float, expected: float) -> None:
    scores = dict.fromkeys(LINEAGE.rows, 0.25) | {ref("eve", 0): 0.75, ref("eve", 1): 0.75, ref("bob", 2): own}
    assert evaluate.mislabel_auroc(scores, LINEAGE) == pytest.approx(expected)


# --- weights --------------------------------------------------------------------------------------------------------


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "0.conv.weight": torch.randn((4, 2, 3, 3), generator=generator).contiguous(memory_format=torch.channels_last),
        "0.conv.bias": torch.zeros(4),
        "0.norm.count": torch.tensor(7),
        "1.weight": torch.randn((3, 4), generator=generator).requires_grad_(),
    }


def test_the_same_bits_are_the_same_weights_whatever_their_layout_in_memory() -> None:
    ours = weights()
    assert same_weights(ours, weights())
    assert same_weights(ours, {name: value.detach().clone().contiguous() for name, value in weights().items()})


def test_one_flipped_bit_anywhere_is_another_model() -> None:
    for name, value in weights().items():
        for element in range(value.numel()):
            theirs = {n: v.detach().clone().contiguous() for n, v in weights().items()}
            theirs[name].view(-1).view(torch.uint8)[element * value.element_size()] ^= 1
            assert not same_weights(weights(), theirs)
            assert not same_weights(theirs, weights())


def test_other_names_shapes_types_and_signs_of_zero_are_another_model() -> None:
    ours = weights()
    different: list[dict[str, torch.Tensor]] = [
        {name: value for name, value in ours.items() if name != "0.conv.bias"},
        ours | {"2.bias": torch.zeros(1)},
        {name.replace("1.", "2."): value for name, value in ours.items()},
        ours | {"1.weight": ours["1.weight"].reshape(4, 3)},
        ours | {"1.weight": ours["1.weight"].T.contiguous()},
        ours | {"1.weight": ours["1.weight"].double()},
        ours | {"0.norm.count": torch.tensor([7])},
        ours | {"0.norm.count": torch.tensor(7, dtype=torch.int32)},
        ours | {"0.conv.bias": -torch.zeros(4)},
        ours | {"0.conv.bias": torch.zeros(4, dtype=torch.int32)},  # the same bits
    ]
    for theirs in different:
        assert not same_weights(ours, theirs)
        assert not same_weights(theirs, ours)


def test_a_nan_is_the_same_as_itself() -> None:
    assert same_weights({"w": torch.tensor([torch.nan])}, {"w": torch.tensor([torch.nan])})
