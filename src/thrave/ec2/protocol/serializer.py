"""Answers: the output of an operation, or an error, becomes XML.

What stands around the content differs between AWS's protocols and is a table of them, by the name that the service's
model has for its own: EC2's, and the query protocol of the older services, such as STS.
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

_PLAIN = re.compile("[ -%'-;=?-~]*")  # printable ASCII but for & < >: nearly every text there is, and ready as it is
_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


def serialize(operation: OperationModel, result: Result, *, version: str, request_id: str) -> bytes:
    """Write the answer to an operation, in the protocol of its service.

    Args:
        operation: Whose output shape describes the result.
        result: The output by member names. None leaves a member out. An empty list is written as an empty element,
            because clients look for the element itself: without it boto3's answer has no such key at all.
        version: The caller's `Version`.
        request_id: For the element of that name.
    """
    shape = operation.output_shape
    # An operation whose model has no output answers EC2's `return`, which boto 2 and ec2-api-tools look for.
    content = "<return>true</return>" if shape is None else _content(shape, result)
    return (_DECLARATION + _of(operation.service_model).answer(operation, content, version, request_id)).encode()


def error_document(service: ServiceModel, code: str, message: str, *, status: int, request_id: str) -> bytes:
    """Write an answer that is an error, with the HTTP `status`, in the service's protocol."""
    content = f"<Code>{_text(code)}</Code><Message>{_text(message)}</Message>"
    return (_DECLARATION + _of(service).error(service, content, status, request_id)).encode()


class _Envelope(NamedTuple):
    """What a protocol puts around an answer's content, and around an error's."""

    answer: Callable[[OperationModel, str, str, str], str]
    error: Callable[[ServiceModel, str, int, str], str]


def _of(service: ServiceModel) -> _Envelope:
    return _ENVELOPES[service.metadata["protocol"]]


def _ec2_answer(operation: OperationModel, content: str, version: str, request_id: str) -> str:
    """The namespace echoes the caller's version with AWS's trailing slash: ElasticFox and ec2-api-tools match on it."""
    return (
        f'<{operation.name}Response xmlns="http://ec2.amazonaws.com/doc/{version}/">'
        f"<requestId>{request_id}</requestId>{content}</{operation.name}Response>"
    )


def _ec2_error(_service: ServiceModel, content: str, _status: int, request_id: str) -> str:
    """No namespace, no type, and `RequestID` spelled like that."""
    return f"<Response><Errors><Error>{content}</Error></Errors><RequestID>{request_id}</RequestID></Response>"


def _query_answer(operation: OperationModel, content: str, _version: str, request_id: str) -> str:
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
    "ec2": _Envelope(_ec2_answer, _ec2_error),
    "query": _Envelope(_query_answer, _query_error),
}


def format_timestamp(moment: datetime) -> str:
    """Write a time as EC2 does: UTC, milliseconds, `Z`."""
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
    """Escape text: a carriage return would not survive a parser as it is; what XML cannot carry is replaced."""
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
