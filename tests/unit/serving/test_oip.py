"""The Open Inference Protocol's bodies: what goes in comes out, what lies about itself is refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from caltrain.errors import CaltrainError, DataError, ProtocolError
from caltrain.serving.oip import (
    LENGTH_HEADER,
    MAX_SEALED_HEAD,
    MAX_TENSORS,
    InferReply,
    InferRequest,
    Requested,
    Tensor,
    build_reply,
    build_request,
    pack_sealed,
    pack_sealed_reply,
    parse_reply,
    parse_request,
    unpack_sealed,
    unpack_sealed_reply,
)
from caltrain.serving.oip_tensors import MAX_RANK, NUMBERS
from support.samples import quick, refused

READERS = (parse_request, parse_reply, unpack_sealed, unpack_sealed_reply)
SECRET = "a-word-of-the-request"
HEAD = {"name": "input", "datatype": "UINT8", "shape": [2, 2]}


def body(rest: bytes = b"", **changes: Any) -> tuple[bytes, str | None]:
    """A request with one tensor, which `changes` change; `rest` follows its JSON."""
    raw = msgspec.json.encode({"inputs": [HEAD | changes]})
    return raw + rest, str(len(raw)) if rest else None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in all that counts, bit for bit."""
    if isinstance(one.values, tuple) or isinstance(other.values, tuple):
        return one == other
    return (
        (one.name, one.datatype, one.shape) == (other.name, other.datatype, other.shape)
        and one.values.dtype == other.values.dtype == NUMBERS[one.datatype]
        and one.values.shape == one.shape
        and one.values.tobytes() == other.values.tobytes()
    )


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any tensor: for JSON as for binary."""
    datatype = draw(st.sampled_from([*NUMBERS, "BYTES"]))
    shape = draw(hnp.array_shapes(max_dims=4, max_side=3))
    name = draw(st.text(min_size=1, max_size=20))
    if datatype == "BYTES":
        count = int(np.prod(shape))
        texts = draw(st.lists(st.text(max_size=5), min_size=count, max_size=count))
        return Tensor(name, datatype, shape, tuple(text.encode() for text in texts))
    width = NUMBERS[datatype].itemsize * 8
    numbers = (
        st.floats(allow_nan=False, allow_infinity=False, width=32 if width == 32 else 64)
        if NUMBERS[datatype].kind == "f"
        else None
    )
    return Tensor(name, datatype, shape, draw(hnp.arrays(NUMBERS[datatype], shape, elements=numbers)))


NAMED_TENSORS = st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda tensor: tensor.name)


@quick
@given(NAMED_TENSORS, st.data(), st.text(max_size=20))
def test_a_request_comes_back_as_it_was(given_tensors: list[Tensor], data: st.DataObject, request_id: str) -> None:
    binary = data.draw(st.sets(st.sampled_from([tensor.name for tensor in given_tensors])))
    outputs = (Requested("one", {"binary_data": True}), Requested("two"))
    request = InferRequest(inputs=tuple(given_tensors), id=request_id, parameters={"priority": 3}, outputs=outputs)
    raw, headers = build_request(request, binary=binary)
    got = parse_request(raw, headers.get(LENGTH_HEADER))
    assert all(map(same, got.inputs, request.inputs))
    assert (got.id, got.parameters, got.outputs) == (request_id, {"priority": 3}, outputs)
    assert (LENGTH_HEADER in headers) == bool(binary)


@quick
@given(NAMED_TENSORS, st.data())
def test_a_reply_comes_back_as_it_was(given_tensors: list[Tensor], data: st.DataObject) -> None:
    binary = data.draw(st.sets(st.sampled_from([tensor.name for tensor in given_tensors])))
    raw, headers = build_reply(InferReply(model="m", version="7", outputs=tuple(given_tensors), id="x"), binary=binary)
    got = parse_reply(raw, headers.get(LENGTH_HEADER))
    assert all(map(same, got.outputs, given_tensors))
    assert (got.model, got.version, got.id) == ("m", "7", "x")


@quick
@given(st.binary(min_size=1, max_size=300), st.text(max_size=20))
def test_sealed_bytes_come_back_as_they_were(sealed: bytes, request_id: str) -> None:
    raw, headers = pack_sealed(sealed, request_id)
    assert unpack_sealed(raw, headers[LENGTH_HEADER]) == (request_id, sealed)
    raw, headers = pack_sealed_reply("m", "1", request_id, sealed)
    assert unpack_sealed_reply(raw, headers[LENGTH_HEADER]) == sealed
    (output,) = parse_reply(raw, headers[LENGTH_HEADER]).outputs
    assert (output.name, output.datatype, output.shape) == ("sealed", "UINT8", (len(sealed),))


@quick
@given(st.binary(max_size=200), st.none() | st.integers(-1, 300).map(str) | st.text(max_size=5))
def test_any_bytes_are_read_or_refused_by_name(raw: bytes, length: str | None) -> None:
    for read in READERS:
        try:
            read(raw, length)
        except CaltrainError as error:
            assert error.code in {"oip.malformed", "oip.size", "oip.datatype"}  # noqa: PT017


@quick
@given(st.data())
def test_a_changed_byte_is_read_or_refused_by_name(data: st.DataObject) -> None:
    tensor = Tensor("input", "FP32", (2,), np.ones(2, "<f4"))
    texts = Tensor("texts", "BYTES", (2,), (b"one", b"two"))
    raw, headers = build_request(InferRequest(inputs=(tensor, texts), id=SECRET), binary={"input", "texts"})
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for read in READERS:
        try:
            read(bytes(changed), headers[LENGTH_HEADER])
        except (DataError, ProtocolError) as error:
            assert error.code.startswith(("oip.", "infer.sealed-only"))  # noqa: PT017


JSON_SHAPE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@quick
@given(JSON_SHAPE, st.sampled_from([*NUMBERS, "BYTES", "FP16"]), hnp.array_shapes(max_dims=3, max_side=3))
def test_any_data_are_read_as_their_shape_and_datatype_or_refused(
    data: Any, datatype: str, shape: tuple[int, ...]
) -> None:
    try:
        (tensor,) = parse_request(*body(datatype=datatype, shape=shape, data=data)).inputs
    except DataError:
        return
    assert tensor.shape == shape
    if isinstance(tensor.values, tuple):
        assert len(tensor.values) == int(np.prod(shape))
    else:
        assert tensor.values.shape == shape
        assert tensor.values.dtype == NUMBERS[datatype]


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_data_may_be_flat_or_nested(data: list[Any]) -> None:
    (tensor,) = parse_request(*body(data=data)).inputs
    assert np.array_equal(tensor.values, np.array([[1, 2], [3, 4]]))


def test_data_of_any_width_of_blanks_are_read() -> None:
    raw = b'{"inputs":[{"name":"a","datatype":"INT8","shape":[1,2],"data": [\n' + b" " * 500 + b"[ 1,\t-2]]}]}"
    (tensor,) = parse_request(raw, None).inputs
    assert np.array_equal(tensor.values, np.array([[1, -2]]))


def test_numbers_too_large_for_fp32_are_infinite_as_they_are_in_binary() -> None:
    (tensor,) = parse_request(*body(datatype="FP32", shape=[1], data=[1e300])).inputs
    assert np.isinf(tensor.values).all()


@pytest.mark.parametrize(
    ("code", "changes", "rest"),
    [
        ("oip.malformed", {}, b""),
        ("oip.size", {"data": []}, b""),
        ("oip.malformed", {"data": 7}, b""),
        ("oip.malformed", {"data": [[[1, 2], [3, 4]]]}, b""),
        ("oip.malformed", {"data": [[1, 2], [3]]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, 256]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, -1]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, 1.5]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, "4"]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, True]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, 10**400]}, b""),
        ("oip.malformed", {"data": [1, 2, 3, 4], "datatype": "BOOL"}, b""),
        ("oip.malformed", {"data": [1, 2, 3, 4], "datatype": "BYTES"}, b""),
        ("oip.size", {"data": [1, 2, 3]}, b""),
        ("oip.size", {"data": [[1, 2, 3, 4]]}, b""),
        ("oip.size", {"data": [["a"], ["b", "c"]], "datatype": "BYTES", "shape": [2, 1]}, b""),
        ("oip.datatype", {"data": [1, 2, 3, 4], "datatype": "FP16"}, b""),
        ("oip.datatype", {"parameters": {"binary_data_size": 4}, "datatype": SECRET[:16]}, b"1234"),
        ("oip.malformed", {"shape": []}, b""),
        ("oip.malformed", {"shape": [-1, 4]}, b""),
        ("oip.malformed", {"shape": [0]}, b""),
        ("oip.malformed", {"shape": [1] * (MAX_RANK + 1)}, b""),
        ("oip.malformed", {"name": ""}, b""),
        ("oip.malformed", {"name": "x" * 121}, b""),
        ("oip.malformed", {SECRET: 1}, b""),
        ("oip.malformed", {"parameters": {"a": [SECRET]}}, b""),
        ("oip.malformed", {"parameters": {"shared_memory_region": SECRET}}, b""),
        ("oip.size", {"parameters": {"binary_data_size": 5}}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": 3}}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": -4}}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": True}, "shape": [1]}, b"1"),
        ("oip.size", {"parameters": {"binary_data_size": 4.0}}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": 4}, "data": [1, 2, 3, 4]}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": 4}}, b"12345"),
        ("oip.size", {"data": [1, 2, 3, 4]}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": 4}, "datatype": "FP32"}, b"1234"),
        ("oip.size", {"parameters": {"binary_data_size": 4}, "shape": [1 << 39, 1 << 39]}, b"1234"),
        ("oip.malformed", {"parameters": {"binary_data_size": 4}, "datatype": "BOOL"}, b"\0\1\2\1"),
        ("oip.size", {"parameters": {"binary_data_size": 4}, "datatype": "BYTES", "shape": [1]}, b"\1\0\0\0"),
        ("oip.size", {"parameters": {"binary_data_size": 6}, "datatype": "BYTES", "shape": [1]}, b"\1\0\0\0ab"),
        ("oip.size", {"parameters": {"binary_data_size": 5}, "datatype": "BYTES", "shape": [2]}, b"\1\0\0\0a"),
        ("oip.size", {"parameters": {"binary_data_size": 3}, "datatype": "BYTES", "shape": [1]}, b"\0\0\0"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_refused(code: str, changes: dict[str, Any], rest: bytes) -> None:
    with refused(DataError, code) as caught:
        parse_request(*body(rest, **changes))
    assert SECRET[:16] not in str(caught.value)


@pytest.mark.parametrize("length", ["", "0", "-1", "+9", "1e1", "٣", "9999999999999", "9" * 5000, "0x10", SECRET])
def test_a_length_that_is_none_is_refused(length: str) -> None:
    raw, _ = body(data=[1, 2, 3, 4])
    with refused(DataError, "oip.size") as caught:
        parse_request(raw, length)
    assert SECRET not in str(caught.value)


def test_a_length_beyond_the_body_is_refused() -> None:
    raw, _ = body(data=[1, 2, 3, 4])
    parse_request(raw, str(len(raw)))
    with refused(DataError, "oip.size"):
        parse_request(raw, str(len(raw) + 1))


def test_sizes_cannot_go_back_to_bytes_that_were_taken() -> None:
    one, other = (HEAD | {"name": str(size), "parameters": {"binary_data_size": size}} for size in (-4, 12))
    raw = msgspec.json.encode({"inputs": [one, other]})
    with refused(DataError, "oip.size"):
        parse_request(raw + bytes(8), str(len(raw)))


def whole(**changes: Any) -> bytes:
    """A whole request, which `changes` change."""
    given_: dict[str, Any] = {"inputs": [HEAD | {"data": [1, 2, 3, 4]}]}
    return msgspec.json.encode(given_ | changes)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"inputs":' * 50_000,
        whole(inputs=[]),
        whole(inputs=[HEAD | {"data": [1, 2, 3, 4]}] * 2),
        whole(inputs=[HEAD | {"name": str(n), "data": [1, 2, 3, 4]} for n in range(MAX_TENSORS + 1)]),
        whole(outputs=[{"name": "one"}, {"name": "one"}]),
        whole(outputs=[{"name": str(n)} for n in range(MAX_TENSORS + 1)]),
        whole(id="x" * 121),
        whole(id=7),
        whole(parameters={str(n): n for n in range(33)}),
        whole(parameters={"x" * 1001: 1}),
        whole(**{SECRET: 1}),
    ],
)
def test_a_request_out_of_form_is_refused(raw: bytes) -> None:
    parse_request(whole(), None)
    with refused(DataError, "oip.malformed") as caught:
        parse_request(raw, None)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("of_all", "of_one", "binary"),
    [
        ({}, {}, False),
        ({"binary_data_output": True}, {}, True),
        ({"binary_data_output": True}, {"binary_data": False}, False),
        ({}, {"binary_data": True}, True),
        ({}, {"binary_data": 1}, False),
    ],
)
def test_what_is_said_of_an_output_counts_before_what_is_said_of_all(
    of_all: dict[str, bool], of_one: dict[str, Any], binary: bool
) -> None:
    tensor = Tensor("input", "UINT8", (1,), np.ones(1, np.uint8))
    request = InferRequest(inputs=(tensor,), parameters=of_all, outputs=(Requested("one", of_one),))
    assert request.binary("one") is binary


def test_bytes_that_are_no_text_are_not_put_into_json() -> None:
    reply = InferReply(model="m", version="1", outputs=(Tensor("t", "BYTES", (1,), (b"\xff",)),))
    with refused(DataError, "oip.malformed"):
        build_reply(reply)
    raw, headers = build_reply(reply, binary={"t"})
    assert parse_reply(raw, headers[LENGTH_HEADER]).outputs[0].values == (b"\xff",)


def test_a_plain_request_is_told_where_to_go() -> None:
    for changes in ({}, {"parameters": {"caltrain_sealed": "v2"}}):
        with refused(ProtocolError, "infer.sealed-only") as caught:
            unpack_sealed(whole(**changes), None)
        assert "caltrain proxy" in caught.value.fix


def test_no_host_parses_more_json_for_a_stranger_than_a_sealed_request_needs() -> None:
    sealed, headers = pack_sealed(b"frame")
    most = b" " * (MAX_SEALED_HEAD - int(headers[LENGTH_HEADER])) + sealed
    assert unpack_sealed(most, str(MAX_SEALED_HEAD)) == ("", b"frame")
    for longer, header in ((b" " + most, str(MAX_SEALED_HEAD + 1)), (b"{" * (MAX_SEALED_HEAD + 1), None)):
        with refused(ProtocolError, "infer.sealed-only"):
            unpack_sealed(longer, header)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("oip.malformed", {"name": "input"}),
        ("oip.malformed", {"datatype": "INT8"}),
        ("oip.malformed", {"data": [1, 2, 3, 4]}),
        ("oip.size", {"shape": [5]}),
        ("oip.size", {"shape": [2, 2]}),
        ("oip.size", {"parameters": {"binary_data_size": 3}}),
        ("oip.size", {"parameters": {}}),
    ],
)
def test_a_sealed_tensor_in_another_form_is_refused(code: str, changes: dict[str, Any]) -> None:
    sealed = {"name": "sealed", "datatype": "UINT8", "shape": [4], "parameters": {"binary_data_size": 4}}
    for key, read in (("inputs", unpack_sealed), ("outputs", unpack_sealed_reply)):
        parameters = {"parameters": {"caltrain_sealed": "v1"}}
        good, bad, two = (
            msgspec.json.encode({key: heads} | parameters)
            for heads in ([sealed], [sealed | changes], [sealed, sealed | {"name": "more"}])
        )
        read(good + b"1234", str(len(good)))
        with refused(DataError, code):
            read(bad + b"1234", str(len(bad)))
        with refused(DataError, "oip.malformed"):
            read(two + b"1234", str(len(two)))
        for cut in (good, good + b"123", good + b"12345"):
            with refused(DataError, "oip.size"):
                read(cut, str(len(good)))
