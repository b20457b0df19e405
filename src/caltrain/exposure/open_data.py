"""The records of an assessment, from a data set's name or path: whose they are, and their labels as the model has them.

The training part plays the adversary's own records, the test part those of others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caltrain.errors import DataError
from caltrain.records.readers import NAMES, Dataset, load, open_path
from caltrain.records.schema import DataSchema

Records = tuple[Tensor, Tensor]


def open_records(data: str, schema: DataSchema, *, folder: Path | None = None) -> tuple[Records, Records]:
    """(elements, labels) of the adversary and of others: a data set by name, looked for in `folder`, or by path.

    Raises as readers do, and DataError `exposure.schema` for other classes than the model's.
    """
    split = load(data, folder, download=False) if data in NAMES else open_path(Path(data))
    return _records(split.train, schema), _records(split.test, schema)


def _records(part: Dataset, schema: DataSchema) -> Records:
    return torch.from_numpy(part.images), torch.from_numpy(_numbers(part.class_names, schema)[part.labels])


def _numbers(names: tuple[str, ...], schema: DataSchema) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The model's number of each class of the data: by name, or as it is where one side has numbers for names."""
    if set(names) <= set(schema.classes):
        return np.array([schema.classes.index(name) for name in names], np.int64)
    if len(names) == len(schema.classes) and (_numbered(names) or _numbered(schema.classes)):
        return np.arange(len(names), dtype=np.int64)
    raise DataError(
        "exposure.schema",
        f"the data have the {len(names)} classes {', '.join(names)[:120]}, "
        f"the model the {len(schema.classes)} {', '.join(schema.classes)[:120]}",
        step="open records",
        fix="Give records of the data set that the model was trained on, or name the classes alike.",
    )


def _numbered(names: tuple[str, ...]) -> bool:
    return names == tuple(str(number) for number in range(len(names)))
