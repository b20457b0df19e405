"""The tensors that the proxy takes and gives: one `input`; `probabilities`, `class` and `class_index`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from caltrain.client.served import Prediction
from caltrain.errors import DataError
from caltrain.serving.oip import InferReply, InferRequest, Tensor
from caltrain.serving.package import Package

INPUT = "input"
OUTPUTS = ("probabilities", "class", "class_index")
_DATATYPES = {"u8": "UINT8", "f32": "FP32"}


def metadata(package: Package, *, simulated: bool) -> dict[str, Any]:
    """What the protocol says of a model; `parameters` are ours."""
    terms, data = package.terms, package.data
    return {
        "name": terms.name,
        "versions": [str(terms.revision)],
        "platform": "caltrain",
        "inputs": [{"name": INPUT, "datatype": _DATATYPES[data.dtype], "shape": [-1, *data.shape]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, package.classes]},
            {"name": "class", "datatype": "BYTES", "shape": [-1]},
            {"name": "class_index", "datatype": "INT64", "shape": [-1]},
        ],
        "parameters": {
            "caltrain_simulated": simulated,
            "caltrain_package": package.digest(),
            "caltrain_model": package.model,
            "caltrain_measurement": terms.measurement,
        },
    }


def read_records(asked: InferRequest) -> NDArray[np.generic]:
    """The records of a request; the client checks their shape and element type.

    Raises DataError `infer.inputs`, `infer.outputs`.
    """
    tensor = asked.inputs[0]
    if len(asked.inputs) > 1 or tensor.name != INPUT or isinstance(tensor.values, tuple):
        raise DataError(
            "infer.inputs",
            f"the model takes one input, {INPUT!r}, of numbers",
            step="read request",
            fix="Look at the model's metadata.",
        )
    for output in asked.outputs:
        if output.name not in OUTPUTS or set(output.parameters) - {"binary_data"}:
            raise DataError(
                "infer.outputs",
                f"an output that is not one of {', '.join(OUTPUTS)}, or asked for with more than binary_data",
                step="read request",
                fix="Ask for outputs that the model's metadata names; the classification extension is not served.",
            )
    return tensor.values


def reply_to(asked: InferRequest, got: Prediction, package: Package) -> tuple[InferReply, set[str]]:
    """The outputs that were asked for, and which of them go in binary."""
    count, classes = got.probabilities.shape
    made = {
        "probabilities": Tensor("probabilities", "FP32", (count, classes), got.probabilities),
        "class": Tensor("class", "BYTES", (count,), tuple(name.encode() for name in got.classes)),
        "class_index": Tensor("class_index", "INT64", (count,), got.indices),
    }
    wanted = [output.name for output in asked.outputs] or OUTPUTS
    reply = InferReply(
        model=package.terms.name,
        version=str(package.terms.revision),
        id=asked.id,
        outputs=tuple(made[name] for name in wanted),
    )
    return reply, {name for name in wanted if asked.binary(name)}
