"""Answers: the output of an operation, or an error, becomes XML."""

import base64
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any
from xml.sax.saxutils import escape

from botocore.model import OperationModel, Shape

from thrave.ec2.protocol.characters import replace_non_xml
from thrave.ec2.protocol.values import Blob, Result

_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


def serialize(operation: OperationModel, result: Result, *, version: str, request_id: str) -> bytes:
    """Write the answer to an operation.

    Args:
        operation: Whose output shape describes the result.
        result: The output by member names. None leaves a member out. An empty list is written as an empty element,
            because clients look for the element itself: without it boto3's answer has no such key at all.
        version: The caller's `Version`, echoed in the namespace as AWS does, with its trailing slash; clients that
            use XPath (ElasticFox, ec2-api-tools) match on it.
        request_id: For the element `requestId`.
    """
    return (
        f'{_DECLARATION}<{operation.name}Response xmlns="http://ec2.amazonaws.com/doc/{version}/">'
        f"<requestId>{request_id}</requestId>{_content(operation.output_shape, result)}</{operation.name}Response>"
    ).encode()


def error_document(code: str, message: str, request_id: str) -> bytes:
    """Write EC2's error answer: no namespace, no type, and `RequestID` spelled like that."""
    return (
        f"{_DECLARATION}<Response><Errors><Error><Code>{_text(code)}</Code><Message>{_text(message)}</Message>"
        f"</Error></Errors><RequestID>{request_id}</RequestID></Response>"
    ).encode()


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
