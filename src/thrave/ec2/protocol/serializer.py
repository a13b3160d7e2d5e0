"""Writes responses: the output of an operation, or an error, as XML.

The elements around the content depend on the protocol that the service's model names: `ec2`, or `query` of the older
services, such as STS. `_ENVELOPES` is the table of both.
"""

import base64
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from botocore.model import OperationModel, ServiceModel, Shape

from thrave.ec2.protocol.parser import Blob, Result, replace_non_xml

_PLAIN = re.compile("[ -%'-;=?-~]*")  # printable ASCII except & < >: nearly every text, and needs no escaping
_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


def serialize(operation: OperationModel, result: Result, *, version: str, request_id: str) -> bytes:
    """Return the response of an operation, in the protocol of its service.

    Args:
        operation: Its output shape describes the result.
        result: The output by member names. A member that is None is omitted. An empty list becomes an empty element,
            since clients expect the element: without it the key is missing in boto3's response.
        version: The caller's `Version`.
        request_id: Value of the element with this name.
    """
    shape = operation.output_shape
    # Without an output in the model the response is EC2's `return`, which boto 2 and ec2-api-tools expect.
    content = "<return>true</return>" if shape is None else _content(shape, result)
    return (
        _DECLARATION + _envelope(operation.service_model).response(operation, content, version, request_id)
    ).encode()


def error_document(service: ServiceModel, code: str, message: str, *, status: int, request_id: str) -> bytes:
    """Return an error response for the HTTP status `status`, in the protocol of the service."""
    content = f"<Code>{_text(code)}</Code><Message>{_text(message)}</Message>"
    return (_DECLARATION + _envelope(service).error(service, content, status, request_id)).encode()


class _Envelope(NamedTuple):
    """The functions that write the elements around the content of a response, and of an error."""

    response: Callable[[OperationModel, str, str, str], str]
    error: Callable[[ServiceModel, str, int, str], str]


def _envelope(service: ServiceModel) -> _Envelope:
    return _ENVELOPES[service.metadata["protocol"]]


def _ec2_response(operation: OperationModel, content: str, version: str, request_id: str) -> str:
    """Return a response. ElasticFox and ec2-api-tools need the caller's version with a slash in the namespace."""
    return (
        f'<{operation.name}Response xmlns="http://ec2.amazonaws.com/doc/{version}/">'
        f"<requestId>{request_id}</requestId>{content}</{operation.name}Response>"
    )


def _ec2_error(_service: ServiceModel, content: str, _status: int, request_id: str) -> str:
    """Return an error as EC2 does: no namespace, no type, and `RequestID` in this spelling."""
    return f"<Response><Errors><Error>{content}</Error></Errors><RequestID>{request_id}</RequestID></Response>"


def _query_response(operation: OperationModel, content: str, _version: str, request_id: str) -> str:
    wrapper = operation.output_shape.serialization["resultWrapper"]
    return (
        f'<{operation.name}Response xmlns="{operation.service_model.metadata["xmlNamespace"]}">'
        f"<{wrapper}>{content}</{wrapper}><ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>"
        f"</{operation.name}Response>"
    )


def _query_error(service: ServiceModel, content: str, status: int, request_id: str) -> str:
    fault = "Receiver" if status >= 500 else "Sender"
    return (
        f'<ErrorResponse xmlns="{service.metadata["xmlNamespace"]}"><Error><Type>{fault}</Type>{content}</Error>'
        f"<RequestId>{request_id}</RequestId></ErrorResponse>"
    )


_ENVELOPES: Mapping[str, _Envelope] = {
    "ec2": _Envelope(_ec2_response, _ec2_error),
    "query": _Envelope(_query_response, _query_error),
}


def format_timestamp(moment: datetime) -> str:
    """Format a time as EC2 does: UTC, milliseconds, `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _content(shape: Shape, value: Any) -> str:  # noqa: ANN401  # the type is the shape's
    if shape.type_name == "structure":
        members = _members(shape)
        return "".join([_element(*members[name], each) for name, each in value.items() if each is not None])
    if shape.type_name == "list":
        tag = shape.member.serialization.get("name", "item")
        return "".join([_element(tag, shape.member, each) for each in value])
    return _SCALARS[shape.type_name](value)


def _element(tag: str, shape: Shape, value: Any) -> str:  # noqa: ANN401  # the type is the shape's
    content = _content(shape, value)
    return f"<{tag}>{content}</{tag}>" if content else f"<{tag}/>"


@cache
def _members(shape: Shape) -> dict[str, tuple[str, Shape]]:
    """Return a structure's members by their model names: (element name, its shape)."""
    return {name: (member.serialization.get("name", name), member) for name, member in shape.members.items()}


def _text(text: str) -> str:
    """Escape text. A parser would drop a plain carriage return; characters that XML cannot contain are replaced."""
    if _PLAIN.fullmatch(text):
        return text
    return escape(replace_non_xml(text), {"\r": "&#13;"})


def _boolean(value: object) -> str:
    return "true" if value else "false"


def _blob(blob: Blob) -> str:
    return base64.b64encode(blob.data).decode()


_SCALARS: Mapping[str, Callable[[Any], str]] = {
    "string": _text,
    "boolean": _boolean,
    "integer": str,
    "long": str,
    "float": repr,
    "double": repr,
    "timestamp": format_timestamp,
    "blob": _blob,
}
