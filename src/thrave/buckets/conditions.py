r"""The conditions of an upload policy: what they may say, and whether an upload meets them.

The rules are those of an HTML-form upload to Amazon S3 ("POST Policy" in AWS's documentation), and where the
documentation and the service differ, those of the service as recorded from it (LocalStack's snapshots validated against
AWS; issue threads): a condition that is not met is 403 AccessDenied; names are compared without regard to case, values
with; a condition on a field that the form does not have is not met, not even by `["starts-with", "$f", ""]`.
Everything here comes from strangers and nothing here has a clock.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from thrave.buckets.errors import AccessDenied, BucketError, EntityTooLarge, EntityTooSmall, InvalidPolicyDocument

Argument = str | int


@dataclass(frozen=True)
class Upload:
    """An object on its way into a bucket, as a policy sees it."""

    fields: Mapping[str, str]
    """The form's fields by lower-case name, and `bucket`."""
    content_length: int | None
    """Bytes of the object; None while they are not known, which no length refuses."""


@dataclass(frozen=True)
class Condition:
    """One condition, in the form of a list: `["eq", "$acl", "private"]`."""

    operator: str
    arguments: tuple[Argument, Argument]

    def __str__(self) -> str:
        return json.dumps([self.operator, *self.arguments], ensure_ascii=False)

    @property
    def field(self) -> str | None:
        """The lower-case name of the field that it is about; None if it is about none (a length, or no `$`)."""
        name = self.arguments[0]
        return name[1:].lower() if isinstance(name, str) and name.startswith("$") else None

    @property
    def value(self) -> str:
        """What the field must be or begin with."""
        return str(self.arguments[1])

    def refusal(self, upload: Upload) -> BucketError | None:
        """The error with which S3 refuses an upload for this condition, None if it is met."""
        return OPERATORS[self.operator.lower()](self, upload)


def _eq(condition: Condition, upload: Upload) -> BucketError | None:
    return None if _given(condition, upload) == condition.value else _failed(condition)


def _starts_with(condition: Condition, upload: Upload) -> BucketError | None:
    given = _given(condition, upload)
    if given is None:
        return _failed(condition)
    # Of all fields Content-Type alone may be a list, and each item of it must fit.
    items = given.split(",") if condition.field == "content-type" else [given]
    return None if all(item.startswith(condition.value) for item in items) else _failed(condition)


def _content_length_range(condition: Condition, upload: Upload) -> BucketError | None:
    bounds = [str(bound) for bound in condition.arguments]
    if not all(re.fullmatch(r"[0-9]{1,19}", bound) for bound in bounds):
        return _failed(condition)
    least, most = (int(bound) for bound in bounds)
    if upload.content_length is None:
        return None
    if upload.content_length < least:
        return EntityTooSmall()
    return EntityTooLarge() if upload.content_length > most else None


OPERATORS: Mapping[str, Callable[[Condition, Upload], BucketError | None]] = {
    "eq": _eq,
    "starts-with": _starts_with,
    "content-length-range": _content_length_range,
}
"""Every operator of S3's, by lower-case name."""


def read_condition(document: object) -> Condition:
    """Take one element of a policy's `conditions`.

    Args:
        document: As `json` reads it: `{"acl": "private"}`, which means `["eq", "$acl", "private"]`, or such a list.

    Raises:
        InvalidPolicyDocument: It is neither.
    """
    if isinstance(document, dict):
        return _read_simple_condition(document)
    if not isinstance(document, list):
        raise InvalidPolicyDocument("Invalid condition test: must be a List or Object.")
    if not document or not isinstance(document[0], str):
        raise InvalidPolicyDocument("Invalid Condition: missing operation identifier.")
    operator, *arguments = document
    if operator.lower() not in OPERATORS:
        raise InvalidPolicyDocument(f"Invalid Condition: unknown operation '{operator}'.")
    if len(arguments) != 2:
        raise InvalidPolicyDocument(f"Invalid {operator}: wrong number of arguments.")
    types = (str, int) if operator.lower() == "content-length-range" else (str,)
    if any(not isinstance(argument, types) or isinstance(argument, bool) for argument in arguments):
        raise InvalidPolicyDocument(f"Invalid {operator}: value must be a string.")
    return Condition(operator, (arguments[0], arguments[1]))


def _read_simple_condition(document: dict[str, object]) -> Condition:
    if len(document) != 1:
        raise InvalidPolicyDocument(
            "Invalid Simple-Condition: Simple-Conditions must have exactly one property specified."
        )
    ((name, value),) = document.items()
    if not isinstance(value, str):
        raise InvalidPolicyDocument("Invalid Simple-Condition: value must be a string.")
    return Condition("eq", (f"${name}", value))


def _given(condition: Condition, upload: Upload) -> str | None:
    return None if condition.field is None else upload.fields.get(condition.field)


def _failed(condition: Condition) -> BucketError:
    return AccessDenied.by_policy(f"Policy Condition failed: {condition}")
