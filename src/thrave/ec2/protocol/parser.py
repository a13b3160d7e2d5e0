"""Parses a request: a form becomes the input of an operation, checked against the model member by member.

Each error has EC2's own code, and a message for the caller. Source: "Error codes for the Amazon EC2 API" (AWS).

    ProtocolError
    ├── MalformedQueryStringError   not UTF-8 after percent-decoding
    ├── TooManyParametersError      more than any call needs
    ├── InvalidQueryParameterError  a parameter given twice, or one name used as a value and as a structure
    ├── InvalidCharacterError       a character that an XML response cannot contain
    ├── UnknownParameterError       a name that the operation does not have
    ├── MissingParameterError       a required member is missing
    └── InvalidValueError           not of the member's type
"""

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, ClassVar, TypeAlias
from urllib.parse import parse_qsl

from botocore.model import OperationModel, Shape

Parameters: TypeAlias = Mapping[str, Any]
"""Input of an operation, by the member names of the model; the types are the model's."""

Result: TypeAlias = Mapping[str, Any]
"""Output of an operation, by the member names of the model. A member whose value is None is omitted."""

Node: TypeAlias = "str | dict[str, Node]"
"""A value, or the nodes below each next step of a parameter's name."""

MAX_PARAMETERS = 1500  # the longest calls name 1,000 ids, or 200 filter values

# Deeper than any input in EC2's model. A limit, so that a name that consists of dots costs nothing.
MAX_DEPTH = 16

# Parameters of the request, not of the operation: the protocol's own two, those of signature version 2, those of a
# presigned URL.
ENVELOPE = frozenset(
    {"Action", "Version"}
    | {"AWSAccessKeyId", "Signature", "SignatureVersion", "SignatureMethod"}
    | {"Timestamp", "Expires", "SecurityToken"}
    | {"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires"}
    | {"X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Security-Token"}
)

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production Char
_LIST_INDEX = re.compile(r"[1-9][0-9]{0,3}")
_INTEGER = re.compile(r"-?[0-9]{1,19}")


def replace_non_xml(text: str) -> str:
    """Replace every character that an XML 1.0 document cannot contain by U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


class ProtocolError(Exception):
    """The request does not fit the protocol or the model; the message is for the caller."""

    code: ClassVar[str]


class MalformedQueryStringError(ProtocolError):
    """The form is not percent-encoded UTF-8."""

    code = "MalformedQueryString"


class TooManyParametersError(ProtocolError):
    """The form has more parameters than any call needs."""

    code = "RequestEntityTooLarge"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request has more than {limit} parameters.")


class InvalidQueryParameterError(ProtocolError):
    """A parameter is given twice, or contradicts another."""

    code = "InvalidQueryParameter"


class InvalidCharacterError(ProtocolError):
    """A name or value has a character that XML 1.0 cannot contain, such as NUL."""

    code = "InvalidCharacter"


class UnknownParameterError(ProtocolError):
    """The operation has no such parameter."""

    code = "UnknownParameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"The parameter {name} is not recognized")


class MissingParameterError(ProtocolError):
    """A required parameter is missing."""

    code = "MissingParameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"The request must contain the parameter {name}")


class InvalidValueError(ProtocolError):
    """A value is not of the type that the model gives its parameter."""

    code = "InvalidParameterValue"

    def __init__(self, name: str, value: str, wanted: str) -> None:
        super().__init__(f"Value ({value}) for parameter {name} is invalid. It must be {wanted}.")


@dataclass(frozen=True)
class Blob:
    """Bytes that were sent as base64, and the text as received: the text is what an upload policy's signature signs.

    Attributes:
        text: The base64 text exactly as received, with its line breaks.
        data: The decoded bytes.
    """

    text: str = field(repr=False)
    data: bytes = field(repr=False)


def read_form(encoded: bytes) -> dict[str, str]:
    """Decode a form (a query string or a body) to values by parameter name.

    The number of parameters is checked before any of them is decoded.

    Raises:
        TooManyParametersError: More than `MAX_PARAMETERS`.
        MalformedQueryStringError: Not UTF-8.
        InvalidQueryParameterError: A parameter is given more than once.
        InvalidCharacterError: A character that XML cannot contain.
    """
    if encoded.count(b"&") >= MAX_PARAMETERS:
        raise TooManyParametersError(MAX_PARAMETERS)
    try:
        pairs = parse_qsl(encoded.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise MalformedQueryStringError("The request is not UTF-8.") from None
    form: dict[str, str] = {}
    for name, value in pairs:
        if _NOT_XML.search(name) or _NOT_XML.search(value):
            raise InvalidCharacterError("The request contains a character that XML does not allow.")
        if name in form:
            raise InvalidQueryParameterError(f"The parameter {name} is given more than once.")
        form[name] = value
    return form


def join_forms(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """Join the forms of a query string and of a body.

    Raises:
        TooManyParametersError: Together they have more than `MAX_PARAMETERS`.
        InvalidQueryParameterError: Both have the same parameter.
    """
    if len(first) + len(second) > MAX_PARAMETERS:
        raise TooManyParametersError(MAX_PARAMETERS)
    for name in first.keys() & second.keys():
        raise InvalidQueryParameterError(f"The parameter {name} is given more than once.")
    return {**first, **second}


def parse(operation: OperationModel, form: Mapping[str, str], also_required: Sequence[str] = ()) -> Parameters:
    """Parse a form to the input of an operation.

    A list may begin with any number and have gaps. A list of one member may have no number (`BundleId=bun-…`, as Dasein
    Cloud sends it). Parameters of the request (`ENVELOPE`) are skipped.

    Args:
        operation: Its input shape describes the form.
        form: As `read_form` returns it.
        also_required: Names in the form that must have a value, in addition to the members that the model requires.

    Raises:
        ProtocolError: The first error in the order of the form; missing members last.
    """
    parameters = _parse_structure(operation.input_shape, _build_tree(form), "")
    for name in also_required:
        if not form.get(name):
            raise MissingParameterError(name)
    return parameters


def _build_tree(form: Mapping[str, str]) -> dict[str, Node]:
    """Split names at their dots: `{"Filter.1.Name": "state"}` becomes `{"Filter": {"1": {"Name": "state"}}}`."""
    tree: dict[str, Node] = {}
    for name, value in form.items():
        if name in ENVELOPE:
            continue
        *path, last = name.split(".", MAX_DEPTH)
        branch = tree
        for step in path:
            below = branch.setdefault(step, {})
            if isinstance(below, str):
                raise InvalidQueryParameterError(f"The parameter {name} stands below another that has a value.")
            branch = below
        if last in branch:
            raise InvalidQueryParameterError(f"The parameter {name} has a value, and others stand below it.")
        branch[last] = value
    return tree


def _parse_structure(shape: Shape, node: Node, path: str) -> dict[str, Any]:
    if isinstance(node, str):
        raise InvalidValueError(path, node, "given member by member")
    members = _members(shape)
    prefix = f"{path}." if path else ""
    found = {}
    for step, below in node.items():
        if step not in members:
            raise UnknownParameterError(f"{prefix}{step}")
        name, member = members[step]
        found[name] = _parse_node(member, below, f"{prefix}{step}")
    for name in shape.required_members:
        if name not in found:
            raise MissingParameterError(f"{prefix}{_name_in_form(shape.members[name], name)}")
    return found


def _parse_node(shape: Shape, node: Node, path: str) -> Any:  # noqa: ANN401  # the type is the shape's
    if shape.type_name == "structure":
        return _parse_structure(shape, node, path)
    if shape.type_name == "list":
        return _parse_list(shape, node, path)
    if isinstance(node, dict):
        raise UnknownParameterError(f"{path}.{next(iter(node))}")
    return _SCALARS[shape.type_name](path, node)


def _parse_list(shape: Shape, node: Node, path: str) -> list[Any]:
    if isinstance(node, str):
        return [_parse_node(shape.member, node, path)] if node else []
    for step in node:
        if not _LIST_INDEX.fullmatch(step):
            raise UnknownParameterError(f"{path}.{step}")
    return [_parse_node(shape.member, node[step], f"{path}.{step}") for step in sorted(node, key=int)]


@cache
def _members(shape: Shape) -> dict[str, tuple[str, Shape]]:
    """Return a structure's members by their names in a form: (member name, its shape)."""
    return {_name_in_form(member, name): (name, member) for name, member in shape.members.items()}


def _name_in_form(member: Shape, name: str) -> str:
    """Return a member's name in a form: queryName, else locationName capitalised, else its own name."""
    if "queryName" in member.serialization:
        return str(member.serialization["queryName"])
    location = str(member.serialization.get("name", name))
    return location[0].upper() + location[1:]


def _parse_string(_path: str, text: str) -> str:
    return text


def _parse_boolean(path: str, text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise InvalidValueError(path, text, "true or false")
    return text.lower() == "true"


def _integer_parser(bits: int) -> Callable[[str, str], int]:
    limit = 1 << (bits - 1)

    def parse_integer(path: str, text: str) -> int:
        if not _INTEGER.fullmatch(text) or not -limit <= int(text) < limit:
            raise InvalidValueError(path, text, f"an integer of {bits} bits")
        return int(text)

    return parse_integer


def _parse_float(path: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidValueError(path, text, "a number")
    return number


def _parse_timestamp(path: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidValueError(path, text, "a time, such as 2026-11-23T08:33:40.000Z") from None


def _parse_blob(path: str, text: str) -> Blob:
    try:
        return Blob(text, base64.b64decode("".join(text.split()), validate=True))  # white space is allowed
    except ValueError:
        raise InvalidValueError(path, text, "base64") from None


_SCALARS: Mapping[str, Callable[[str, str], Any]] = {
    "string": _parse_string,
    "boolean": _parse_boolean,
    "integer": _integer_parser(32),
    "long": _integer_parser(64),
    "float": _parse_float,
    "double": _parse_float,
    "timestamp": _parse_timestamp,
    "blob": _parse_blob,
}
