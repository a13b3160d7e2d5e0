"""JSON documents that somebody else wrote, read so that nothing in them can be overlooked.

A name given twice, a number that is none, nesting without end: each is an error of ours, because a reader that is
content with the last of two `Effect`s decides something other than what stands there. What a document means is not
decided here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

from thrave.identity.errors import MalformedPolicyDocument

_SHOWN = 80  # characters of a value that a message repeats


def load(text: str) -> object:
    """Read JSON.

    Raises:
        MalformedPolicyDocument: It is none, or says something twice.
    """
    try:
        text.encode()
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedPolicyDocument("The document is nested too deeply.") from None
    except ValueError as error:  # of json and of Unicode both
        raise MalformedPolicyDocument(f"The document is not valid JSON: {ascii(str(error))[1:-1][:_SHOWN]}.") from None


def members(value: object, name: str) -> Mapping[str, object]:
    """Take a value for an object.

    Raises:
        MalformedPolicyDocument: It is something else.
    """
    if not isinstance(value, dict):
        raise MalformedPolicyDocument(f"{name} must be a JSON object.")
    return value


def one_or_more(value: object, name: str) -> Sequence[object]:
    """Take a value for a list of at least one; what is no list is a list of one, as everywhere in IAM's grammar.

    Raises:
        MalformedPolicyDocument: The list is empty.
    """
    values = value if isinstance(value, list) else [value]
    if not values:
        raise MalformedPolicyDocument(f"{name} is an empty list.")
    return values


def texts(value: object, name: str) -> Sequence[str]:
    """Take a value for a text or a list of them.

    Raises:
        MalformedPolicyDocument: It is something else, or an empty list.
    """
    values = one_or_more(value, name)
    if not all(isinstance(each, str) for each in values):
        raise MalformedPolicyDocument(f"{name} must be a text, or a list of texts.")
    return [str(each) for each in values]


def shown(value: object) -> str:
    """Write a value as JSON for a message: in ASCII, and cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedPolicyDocument(f"{shown(twice)} is given twice.")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedPolicyDocument(f"{name} is not valid JSON.")
