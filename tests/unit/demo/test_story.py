"""Parts of the story that a whole run does not show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from caltrain.demo import story
from caltrain.demo.scenario import TRIALS, Scenario
from caltrain.errors import DataError
from caltrain.records.readers import Dataset
from caltrain.reports.pictures import png
from support.results import NOBODY, said


def scene(labels: list[int]) -> Scenario:
    test = Dataset(np.zeros((len(labels), 1, 8, 8), np.uint8), np.array(labels), tuple("0123456789"))
    return Scenario((), test, TRIALS["digits"].attack)


def test_inputs_to_trace_are_found_and_bounded() -> None:
    labels = [7, 1, 2] * 300
    assert list(story._rows_to_trace(scene(labels), np.array(labels))[:3]) == [1, 2, 4]
    assert len(story._rows_to_trace(scene(labels), np.array(labels))) == story.MAX_TRACED == 400


@pytest.mark.parametrize("predicted", [[7, 0, 0], [7, 7, 7]])
def test_a_model_that_gets_nothing_right_is_a_named_error(predicted: list[int]) -> None:
    with pytest.raises(DataError, match=r"^demo\.nothing-to-trace: "):
        story._rows_to_trace(scene([7, 1, 2]), np.array(predicted))


def test_the_verdict_is_told_in_a_line_or_two() -> None:
    assert story._verdict_in_words(said()) == (
        "responsible: dogwood (p at most 0.0002), by 26 records, estimated precision 97.5% (92.0% to 100.0%)"
    )
    assert story._verdict_in_words(NOBODY) == "cannot tell who is responsible: the reason"


def test_every_demo_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert [story._new_folder(tmp_path / "out", "digits").name for _ in range(3)] == [f"digits-{i}" for i in (1, 2, 3)]
    assert story._new_folder(tmp_path / "out", "mnist").name == "mnist-1"


def test_records_that_are_not_there_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^reader\.not-found: "):
        story.tell("mnist", console=Console(quiet=True), out=tmp_path / "out", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_words_name_the_simulated_enclave(tmp_path: Path) -> None:
    file = io.StringIO()
    with pytest.raises(DataError):
        story.tell("mnist", console=Console(file=file, width=80), out=tmp_path, data_dir=tmp_path)
    assert file.getvalue().startswith("CalTrain demo on mnist, ternary form\nsimulated enclave: ")
    assert all(len(line) <= 80 for line in file.getvalue().splitlines())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_the_record_pixel_by_pixel(channels: int) -> None:
    pixels = np.arange(channels * 20, dtype=np.uint8).reshape(channels, 4, 5)
    with Image.open(io.BytesIO(png(pixels))) as picture:
        assert picture.size == (5, 4)
        found = np.asarray(picture).reshape(4, 5, channels).transpose(2, 0, 1)
    assert (found == pixels).all()
