"""Open Inference Protocol v2 over HTTP: requests and replies with JSON data or the binary tensor extension.

A body is JSON, or JSON followed by the tensors' bytes in their order; then the header `Inference-Header-Content-Length`
gives the JSON's length, and each binary tensor has a parameter `binary_data_size`. A sealed request is one tensor
`sealed` (UINT8, binary) with the request parameter `caltrain_sealed`: the host carries it blind.

Bodies are hostile: all that they claim is checked against what they are, and errors never repeat what they hold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec

from caltrain.crypto.decoders import json_decoder
from caltrain.errors import UNDECODABLE, ProtocolError
from caltrain.serving.oip_tensors import (
    MAX_RANK,
    Values,
    from_binary,
    from_json,
    malformed,
    mismatch,
    to_binary,
    to_json,
)

LENGTH_HEADER = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "caltrain_sealed")
"""What `/v2` lists: the second is the named extension for sealed requests."""
SEALED, SEALED_PARAMETER, SEALED_VERSION = "sealed", "caltrain_sealed", "v1"
MAX_TENSORS = 16
MAX_SEALED_HEAD = 64 << 10
"""Most bytes of JSON that a host parses for a stranger."""
_PATH = re.compile(r" - at `(\$[.\[\]a-z_0-9]{0,80})`\Z")
T = TypeVar("T")

TensorName = Annotated[str, msgspec.Meta(min_length=1, max_length=120)]
RequestId = Annotated[str, msgspec.Meta(max_length=120)]
Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=MAX_RANK)]
_Text = Annotated[str, msgspec.Meta(max_length=1000)]
Parameters = Annotated[dict[_Text, _Text | int | float | bool | None], msgspec.Meta(max_length=32)]


class Tensor(msgspec.Struct, frozen=True):
    """A named tensor. Numbers are an array of its shape; the elements of BYTES are in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Values


class Requested(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An output that the caller names, with what it asks for (`binary_data`, extensions)."""

    name: TensorName
    parameters: Parameters = msgspec.field(default_factory=dict)


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request. Without `outputs` the caller wants all of them."""

    inputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Mapping[str, str | int | float | bool | None] = {}
    outputs: tuple[Requested, ...] = ()

    def binary(self, output: str) -> bool:
        """Whether the caller wants this output in binary: what it says of it, else of all (`binary_data_output`)."""
        named = next((o.parameters for o in self.outputs if o.name == output), {})
        return named.get("binary_data", self.parameters.get("binary_data_output", False)) is True


class InferReply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: TensorName
    datatype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Shape
    parameters: Parameters = msgspec.field(default_factory=dict)
    data: msgspec.Raw = msgspec.Raw()


_Heads = Annotated[tuple[_Head, ...], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: _Heads
    id: RequestId = ""
    parameters: Parameters = msgspec.field(default_factory=dict)
    outputs: Annotated[tuple[Requested, ...], msgspec.Meta(max_length=MAX_TENSORS)] = ()


class _Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    outputs: _Heads
    model_name: Annotated[str, msgspec.Meta(max_length=120)] = ""
    model_version: Annotated[str, msgspec.Meta(max_length=120)] = ""
    id: RequestId = ""
    parameters: Parameters = msgspec.field(default_factory=dict)


def parse_request(body: bytes, json_length: str | None) -> InferRequest:
    """Read a request; `json_length` is its length header. The caller bounds the body.

    Raises DataError `oip.malformed`, `oip.size`, `oip.datatype`.
    """
    head, rest = _split(body, json_length, _Request)
    _check_names([output.name for output in head.outputs])
    return InferRequest(
        inputs=_tensors(head.inputs, rest), id=head.id, parameters=head.parameters, outputs=head.outputs
    )


def parse_reply(body: bytes, json_length: str | None) -> InferReply:
    """Read a reply. Raises like `parse_request`."""
    head, rest = _split(body, json_length, _Reply)
    return InferReply(
        model=head.model_name, version=head.model_version, outputs=_tensors(head.outputs, rest), id=head.id
    )


def build_request(request: InferRequest, *, binary: Collection[str] = ()) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request; the inputs named in `binary` follow the JSON. Raises DataError `oip.size`."""
    inputs, follow = _heads(request.inputs, binary)
    outputs = [{"name": o.name, "parameters": o.parameters} for o in request.outputs]
    rest = {"id": request.id, "parameters": request.parameters, "outputs": outputs}
    return _body({key: value for key, value in rest.items() if value} | {"inputs": inputs}, follow)


def build_reply(reply: InferReply, *, binary: Collection[str] = ()) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a reply; the outputs named in `binary` follow the JSON. Raises DataError `oip.size`."""
    outputs, follow = _heads(reply.outputs, binary)
    return _body(_reply_head(reply.model, reply.version, reply.id) | {"outputs": outputs}, follow)


def pack_sealed(sealed: bytes, request_id: str = "") -> tuple[bytes, dict[str, str]]:
    """Body and headers of a sealed request."""
    asked = {"name": SEALED, "parameters": {"binary_data": True}}
    head: dict[str, object] = {"id": request_id} if request_id else {}
    head["parameters"] = {SEALED_PARAMETER: SEALED_VERSION}
    return _body(head | {"inputs": [_sealed_head(sealed)], "outputs": [asked]}, [sealed])


def unpack_sealed(body: bytes, json_length: str | None) -> tuple[str, bytes]:
    """Id and frame of a sealed request.

    Raises ProtocolError `infer.sealed-only` for a request with inputs in clear, DataError `oip.malformed`, `oip.size`.
    """
    if _json_end(body, json_length) <= MAX_SEALED_HEAD:  # longer, it holds inputs
        head, rest = _split(body, json_length, _Request)
        if head.parameters.get(SEALED_PARAMETER) == SEALED_VERSION:
            return head.id, _sealed(head.inputs, rest)
    raise ProtocolError(
        "infer.sealed-only",
        f"a request without the parameter {SEALED_PARAMETER} = {SEALED_VERSION}: this host reads no inputs",
        step="read request",
        fix="Ask through `caltrain proxy` on your own machine, or with the caltrain client: they seal the inputs.",
    )


def pack_sealed_reply(model: str, version: str, request_id: str, sealed: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the reply with a sealed answer."""
    return _body(_reply_head(model, version, request_id) | {"outputs": [_sealed_head(sealed)]}, [sealed])


def unpack_sealed_reply(body: bytes, json_length: str | None) -> bytes:
    """The sealed answer of a reply. Raises DataError `oip.malformed`, `oip.size`."""
    head, rest = _split(body, json_length, _Reply)
    return _sealed(head.outputs, rest)


def _json_end(body: bytes, json_length: str | None) -> int:
    if json_length is None:
        return len(body)
    if not (json_length.isascii() and json_length.isdigit() and len(json_length) <= 12):
        raise mismatch(f"{LENGTH_HEADER} is no number")
    if not 1 <= (end := int(json_length)) <= len(body):
        raise mismatch(f"{LENGTH_HEADER} is {end}, the body has {len(body)} bytes")
    return end


def _split(body: bytes, json_length: str | None, type_: type[T]) -> tuple[T, memoryview]:
    view, end = memoryview(body), _json_end(body, json_length)
    try:
        return json_decoder(type_).decode(view[:end]), view[end:]
    except UNDECODABLE as error:
        place = _PATH.search(str(error))
        raise malformed(f"its JSON does not have the protocol's form{f' at {place[1]}' if place else ''}") from None


def _sealed(heads: Sequence[_Head], rest: memoryview) -> bytes:
    head = heads[0]
    if len(heads) > 1 or (head.name, head.datatype) != (SEALED, "UINT8") or head.data:
        raise malformed(f"sealed, it has one binary tensor {SEALED!r} of UINT8")
    if head.shape != (len(rest),) or head.parameters.get("binary_data_size") != len(rest):
        raise mismatch(f"{len(rest)} bytes follow its JSON, which says otherwise")
    return bytes(rest)


def _sealed_head(sealed: bytes) -> dict[str, object]:
    size = len(sealed)
    return {"name": SEALED, "datatype": "UINT8", "shape": [size], "parameters": {"binary_data_size": size}}


def _reply_head(model: str, version: str, request_id: str) -> dict[str, object]:
    named: dict[str, object] = {"model_name": model, "model_version": version}
    return named | {"id": request_id} if request_id else named


def _tensors(heads: Sequence[_Head], rest: memoryview) -> tuple[Tensor, ...]:
    _check_names([head.name for head in heads])
    found, at = [], 0
    for head in heads:
        size = head.parameters.get("binary_data_size")
        if size is None:
            values = from_json(head.datatype, head.shape, head.data)
        elif head.data or type(size) is not int or size < 0:
            raise mismatch("a tensor's binary_data_size is not what follows the JSON, or it has data twice")
        else:
            values = from_binary(head.datatype, head.shape, rest[at : at + size])
            at += size
        found.append(Tensor(head.name, head.datatype, head.shape, values))
    if at != len(rest):
        raise mismatch(f"{len(rest)} bytes follow the JSON, the tensors take {at}")
    return tuple(found)


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise malformed("two tensors have one name")


def _heads(tensors: Sequence[Tensor], binary: Collection[str]) -> tuple[list[dict[str, object]], list[bytes]]:
    heads, follow = [], []
    for tensor in tensors:
        head: dict[str, object] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if tensor.name in binary:
            follow.append(raw := to_binary(tensor.datatype, tensor.values))
            head["parameters"] = {"binary_data_size": len(raw)}
        else:
            head["data"] = to_json(tensor.datatype, tensor.values)
        heads.append(head)
    return heads, follow


def _body(head: Mapping[str, object], follow: Sequence[bytes]) -> tuple[bytes, dict[str, str]]:
    raw = msgspec.json.encode(head)
    if not follow:
        return raw, {"Content-Type": "application/json"}
    return b"".join((raw, *follow)), {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(raw))}
