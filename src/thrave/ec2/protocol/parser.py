"""The characters that XML 1.0 can carry, by the Char production of its specification.

What the protocol refuses. Each error carries EC2's own code and a message for the caller.

    ProtocolError
    ├── MalformedQueryStringError   not UTF-8 once percent-decoded
    ├── TooManyParametersError      more than any call needs
    ├── InvalidQueryParameterError  the same parameter twice, or one name as a value and as a structure
    ├── InvalidCharacterError       a character that no XML answer could carry
    ├── UnknownParameterError       a name that the operation does not have
    ├── MissingParameterError       a required member is absent
    └── InvalidValueError           not of the member's type

Source of the codes: "Error codes for the Amazon EC2 API" (AWS).

The values that requests and answers are made of, in Python's terms.

Requests: a form becomes the input of an operation, checked against the model member by member.
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

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def is_xml(text: str) -> bool:
    """Say whether every character of a text may stand in an XML document."""
    return _NOT_XML.search(text) is None


def replace_non_xml(text: str) -> str:
    """Put U+FFFD in the place of every character that may not stand in an XML document."""
    return _NOT_XML.sub("\ufffd", text)


class ProtocolError(Exception):
    """A request that the protocol or the model refuses; its text is for the caller."""

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
    """A name or value holds a character that XML 1.0 cannot carry, such as NUL."""

    code = "InvalidCharacter"


class UnknownParameterError(ProtocolError):
    """The operation has no such parameter."""

    code = "UnknownParameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"The parameter {name} is not recognized")


class MissingParameterError(ProtocolError):
    """A parameter that is required is absent."""

    code = "MissingParameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"The request must contain the parameter {name}")


class InvalidValueError(ProtocolError):
    """A value is not of the type that the model gives its parameter."""

    code = "InvalidParameterValue"

    def __init__(self, name: str, value: str, wanted: str) -> None:
        super().__init__(f"Value ({value}) for parameter {name} is invalid. It must be {wanted}.")


Parameters: TypeAlias = Mapping[str, Any]
"""An operation's input, by the member names of the model; the types are the model's."""


Result: TypeAlias = Mapping[str, Any]
"""An operation's output, by the member names of the model. A member whose value is None is left out."""


@dataclass(frozen=True)
class Blob:
    """Bytes that travelled as base64. The text is kept as it came: an upload policy's signature is over the text.

    Attributes:
        text: The base64 exactly as received, line breaks included.
        data: What it decodes to.
    """

    text: str = field(repr=False)
    data: bytes = field(repr=False)

    @classmethod
    def from_text(cls, text: str) -> "Blob":
        """Decode base64, ignoring white space between its characters.

        Raises:
            ValueError: The text is not base64.
        """
        return cls(text, base64.b64decode("".join(text.split()), validate=True))


Node: TypeAlias = "str | dict[str, Node]"
"""A form unfolded at its dots: a value, or what stands under each next step of the name."""


# Parameters that belong to the request rather than to the operation: the protocol's own two, then those of signature
# version 2, then those of a presigned URL.
ENVELOPE = frozenset(
    {"Action", "Version"}
    | {"AWSAccessKeyId", "Signature", "SignatureVersion", "SignatureMethod"}
    | {"Timestamp", "Expires", "SecurityToken"}
    | {"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires"}
    | {"X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Security-Token"}
)


# Deeper than any input of EC2's model; a bound, so that a name made of dots costs nothing.
MAX_DEPTH = 16


# The longest calls name 1,000 ids, or give 200 filter values.
MAX_PARAMETERS = 1500


_LIST_INDEX = re.compile(r"[1-9][0-9]{0,3}")


_INTEGER = re.compile(r"-?[0-9]{1,19}")


def read_form(encoded: bytes) -> dict[str, str]:
    """Decode a form (a query string or a body): parameter names to values.

    The number of parameters is checked before any is decoded.

    Raises:
        TooManyParametersError: More than `MAX_PARAMETERS`.
        MalformedQueryStringError: Not UTF-8.
        InvalidQueryParameterError: A parameter is given more than once.
        InvalidCharacterError: A character that XML cannot carry.
    """
    if encoded.count(b"&") >= MAX_PARAMETERS:
        raise TooManyParametersError(MAX_PARAMETERS)
    try:
        pairs = parse_qsl(encoded.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise MalformedQueryStringError("The request is not UTF-8.") from None
    form: dict[str, str] = {}
    for name, value in pairs:
        if not (is_xml(name) and is_xml(value)):
            raise InvalidCharacterError("The request contains a character that XML does not allow.")
        if name in form:
            raise _given_twice(name)
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
        raise _given_twice(name)
    return {**first, **second}


def _given_twice(name: str) -> InvalidQueryParameterError:
    return InvalidQueryParameterError(f"The parameter {name} is given more than once.")


def parse(operation: OperationModel, form: Mapping[str, str], also_required: Sequence[str] = ()) -> Parameters:
    """Turn a form into the input of an operation.

    Lists may be numbered from any number upwards with gaps, or hold their one member un-numbered (`BundleId=bun-…`,
    as Dasein Cloud sends it). Parameters of the envelope (`ENVELOPE`) are passed over.

    Args:
        operation: Whose input shape describes the form.
        form: As `read_form` gives it.
        also_required: Names on the wire that must have a value, besides the members that the model requires.

    Raises:
        ProtocolError: The first that fits, in the form's order; missing members last.
    """
    parameters = _read_structure(operation.input_shape, _unfold(form), "")
    for name in also_required:
        if not form.get(name):
            raise MissingParameterError(name)
    return parameters


def _unfold(form: Mapping[str, str]) -> dict[str, Node]:
    """Unfold names at their dots: `{"Filter.1.Name": "state"}` to `{"Filter": {"1": {"Name": "state"}}}`."""
    tree: dict[str, Node] = {}
    for name, value in form.items():
        if name not in ENVELOPE:
            _place(tree, name, value)
    return tree


def _place(tree: dict[str, Node], name: str, value: str) -> None:
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


def _read(shape: Shape, node: Node, path: str) -> Any:  # noqa: ANN401  # the type is the shape's
    if shape.type_name == "structure":
        return _read_structure(shape, node, path)
    if shape.type_name == "list":
        return _read_list(shape, node, path)
    if isinstance(node, dict):
        raise UnknownParameterError(f"{path}.{next(iter(node))}")
    return _SCALARS[shape.type_name](path, node)


def _read_structure(shape: Shape, node: Node, path: str) -> dict[str, Any]:
    if isinstance(node, str):
        raise InvalidValueError(path, node, "given member by member")
    members = _members(shape)
    found = {}
    for step, below in node.items():
        if step not in members:
            raise UnknownParameterError(_join(path, step))
        name, member = members[step]
        found[name] = _read(member, below, _join(path, step))
    _require(shape, found, path)
    return found


def _require(shape: Shape, found: Mapping[str, Any], path: str) -> None:
    for name in shape.required_members:
        if name not in found:
            raise MissingParameterError(_join(path, _wire_name(shape.members[name], name)))


def _join(path: str, step: str) -> str:
    return f"{path}.{step}" if path else step


def _read_list(shape: Shape, node: Node, path: str) -> list[Any]:
    if isinstance(node, str):
        return [_read(shape.member, node, path)] if node else []
    for step in node:
        if not _LIST_INDEX.fullmatch(step):
            raise UnknownParameterError(f"{path}.{step}")
    return [_read(shape.member, node[step], f"{path}.{step}") for step in sorted(node, key=int)]


@cache
def _members(shape: Shape) -> dict[str, tuple[str, Shape]]:
    """Return a structure's members by their names on the wire: (member name, its shape)."""
    return {_wire_name(member, name): (name, member) for name, member in shape.members.items()}


def _wire_name(member: Shape, name: str) -> str:
    """Return a member's name in a request: queryName, else locationName capitalised, else its own name."""
    if "queryName" in member.serialization:
        return str(member.serialization["queryName"])
    location = str(member.serialization.get("name", name))
    return location[0].upper() + location[1:]


def _read_string(_path: str, text: str) -> str:
    return text


def _read_boolean(path: str, text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise InvalidValueError(path, text, "true or false")
    return text.lower() == "true"


def _integer_reader(bits: int) -> Callable[[str, str], int]:
    limit = 1 << (bits - 1)

    def read(path: str, text: str) -> int:
        if not _INTEGER.fullmatch(text) or not -limit <= int(text) < limit:
            raise InvalidValueError(path, text, f"an integer of {bits} bits")
        return int(text)

    return read


def _read_float(path: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidValueError(path, text, "a number")
    return number


def _read_timestamp(path: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidValueError(path, text, "a time, such as 2026-11-23T08:33:40.000Z") from None


def _read_blob(path: str, text: str) -> Blob:
    try:
        return Blob.from_text(text)
    except ValueError:
        raise InvalidValueError(path, text, "base64") from None


_SCALARS: Mapping[str, Callable[[str, str], Any]] = {
    "string": _read_string,
    "boolean": _read_boolean,
    "integer": _integer_reader(32),
    "long": _integer_reader(64),
    "float": _read_float,
    "double": _read_float,
    "timestamp": _read_timestamp,
    "blob": _read_blob,
}
