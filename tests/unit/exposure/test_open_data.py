"""Records by name or path, with the labels as the model numbers its classes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from caltrain.errors import CaltrainError, DataError
from caltrain.exposure.open_data import open_records
from caltrain.presets import PRESETS
from caltrain.records.schema import DataSchema
from support.samples import refused

DIGITS = PRESETS["digits"].data


def named(*classes: str) -> DataSchema:
    return msgspec.structs.replace(DIGITS, classes=classes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rng, labels = np.random.default_rng(0), np.arange(20) % 10
    images = rng.integers(0, 256, (20, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "records.npz", x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    return tmp_path / "records.npz"


def test_the_training_part_is_the_adversarys_and_the_test_part_is_others() -> None:
    own, others = open_records("digits", DIGITS)
    assert (len(own[0]), len(own[1]), len(others[0]), len(others[1])) == (1347, 1347, 450, 450)


def test_a_path_is_opened_as_whatever_lies_there(saved: Path) -> None:
    own, others = open_records(str(saved), DIGITS)
    assert own[1].tolist() == [*range(10), *range(10)]
    assert others[0].shape == (5, 1, 8, 8)


def test_classes_are_found_by_name_in_the_models_order(saved: Path) -> None:
    own, _ = open_records(str(saved), named(*(str(n) for n in range(9, -1, -1))))
    assert own[1].tolist()[:10] == list(range(9, -1, -1))


def test_numbers_for_names_are_taken_as_they_are(saved: Path) -> None:
    own, _ = open_records(str(saved), named(*"abcdefghij"))
    assert own[1].tolist()[:10] == list(range(10))


@pytest.mark.parametrize("classes", ["abc", "abcdefghijk"])
def test_other_classes_are_refused(classes: str, saved: Path) -> None:
    with refused(DataError, "exposure.schema"):
        open_records(str(saved), named(*classes))


@pytest.mark.parametrize("data", ["nothing", "/dev/null/x"])
def test_what_is_not_there_is_refused(data: str) -> None:
    with pytest.raises(CaltrainError, match=r"^reader\."):
        open_records(data, DIGITS)
