"""An unmodified tritonclient speaks to the proxy: what a user of other servers has already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.proxied import listening
from support.scripted_served import ScriptedServed, package, probabilities_of
from support.tiny import CLASSES, pictures

triton: Any = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
InferenceServerException: Any = pytest.importorskip("tritonclient.utils").InferenceServerException
ROWS = pictures(6, seed=4)


@pytest.fixture
def host() -> ScriptedServed:
    """The host behind the proxy."""
    return ScriptedServed()


@pytest.fixture
def client(host: ScriptedServed) -> Iterator[Any]:
    """A client of the proxy."""
    with listening(host) as address, triton.InferenceServerClient(address) as made:
        yield made


def given(rows: Any, datatype: str = "UINT8", *, binary: bool = True, name: str = "input") -> list[Any]:
    """The client's inputs."""
    tensor = triton.InferInput(name, list(rows.shape), datatype)
    tensor.set_data_from_numpy(rows, binary_data=binary)
    return [tensor]


def test_it_finds_the_server_and_the_model_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "input", "datatype": "UINT8", "shape": [-1, 1, 4, 4]}]
    assert metadata["parameters"]["caltrain_simulated"] is True


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("asked", ["nothing", "binary", "json", "mixed"])
def test_it_gets_the_answers(client: Any, asked: str, binary_in: bool) -> None:
    forms = {"binary": (True, True, True), "json": (False, False, False), "mixed": (True, False, True)}.get(asked)
    names = ("probabilities", "class", "class_index")
    outputs = forms and [
        triton.InferRequestedOutput(name, binary_data=form) for name, form in zip(names, forms, strict=True)
    ]
    got = client.infer("tiny", given(ROWS, binary=binary_in), outputs=outputs, request_id="mine")
    expected = probabilities_of(ROWS)
    assert np.array_equal(got.as_numpy("probabilities"), expected)
    assert got.as_numpy("probabilities").dtype == np.float32
    assert np.array_equal(got.as_numpy("class_index"), expected.argmax(1))
    found = [name.decode() if isinstance(name, bytes) else name for name in got.as_numpy("class")]
    assert found == [CLASSES[i] for i in expected.argmax(1)]
    assert got.get_response()["id"] == "mine"
    assert got.get_response()["model_version"] == "1"


def test_it_asks_a_model_of_floats() -> None:
    rows = pictures(3, seed=1, dtype="f32")
    with listening(ScriptedServed(package(dtype="f32"))) as address, triton.InferenceServerClient(address) as client:
        for binary in (True, False):
            got = client.infer("tiny", given(rows, "FP32", binary=binary), model_version="1")
            assert np.array_equal(got.as_numpy("probabilities"), probabilities_of(rows))


def test_it_asks_many_at_once(host: ScriptedServed) -> None:
    questions = [pictures(2, seed=seed) for seed in range(12)]
    with listening(host) as address, triton.InferenceServerClient(address, concurrency=6) as client:
        waiting = [client.async_infer("tiny", given(rows)) for rows in questions]
        for rows, due in zip(questions, waiting, strict=True):
            assert np.array_equal(due.get_result().as_numpy("probabilities"), probabilities_of(rows))


@pytest.mark.parametrize(
    ("code", "model", "inputs", "options"),
    [
        ("model.unknown", "other", given(ROWS), {}),
        ("model.unknown", "tiny", given(ROWS), {"model_version": "9"}),
        ("infer.inputs", "tiny", given(ROWS, name="image"), {}),
        ("ask.shape", "tiny", given(ROWS[:, :, :2]), {}),
        ("ask.shape", "tiny", given(ROWS.astype(np.float32), "FP32"), {}),
        ("oip.datatype", "tiny", given(ROWS.astype(np.uint16), "UINT16"), {}),
        ("infer.outputs", "tiny", given(ROWS), {"outputs": [triton.InferRequestedOutput("logits")]}),
        ("infer.outputs", "tiny", given(ROWS), {"outputs": [triton.InferRequestedOutput("class", class_count=2)]}),
        ("http.encoding", "tiny", given(ROWS), {"request_compression_algorithm": "gzip"}),
    ],
)
def test_it_is_told_what_is_wrong(
    client: Any, host: ScriptedServed, code: str, model: str, inputs: list[Any], options: dict[str, Any]
) -> None:
    with pytest.raises(InferenceServerException, match=code):
        client.infer(model, inputs, **options)
    assert host.frames == []
    assert client.infer("tiny", given(ROWS), response_compression_algorithm="gzip").as_numpy("class").shape == (6,)
