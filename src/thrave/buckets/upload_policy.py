"""The conditions of an upload policy: what they may say, and whether an upload meets them.

The rules are those of an HTML-form upload to Amazon S3 ("POST Policy" in AWS's documentation), and where the
documentation and the service differ, those of the service as recorded from it (LocalStack's snapshots validated against
AWS; issue threads): a condition that is not met is 403 AccessDenied; names are compared without regard to case, values
with; a condition on a field that the form does not have is not met, not even by `["starts-with", "$f", ""]`.
Everything here comes from strangers and nothing here has a clock.

The signature of an upload policy: AWS's signature version 2 for forms, and version 4.

Either is made over the policy's base64 text, exactly as it was sent, with the secret of the bucket owner's access key.
Version 2 is base64(HMAC-SHA1(secret, text)). Version 4 is hex(HMAC-SHA256(key, text)) with a key derived for a day,
a region and a service, which the policy's own conditions name (`x-amz-credential`). Comparisons take the same time
wherever the difference lies. Source: AWS S3 documentation, "HTML forms (AWS signature version 2)" and
"Authenticating Requests: Browser-Based Uploads Using POST (AWS Signature Version 4)".

The upload policy: the caller's signed word on what may be put into their bucket, and until when.

A policy is a JSON document in base64, signed by the bucket owner. `verify` reads one from a request, `check_upload`
says what it allows, in S3's words, and `form_fields` what a form upload under it must send. It knows the rules of
Amazon S3 and nothing of the network, and has no clock: the time is handed in.

Clients send the policy in base64 once or, when a user hands boto3 or the AWS CLI 1 a text that is base64 already,
twice; and of the twice encoded the signature is over the outer text (the CLI's own) or over the inner (made by the
user beforehand). Whatever was signed is what a store must be sent. A store decodes once only, so that it takes the
inner text but never the outer.
"""

import base64
import binascii
import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Never, Self

from thrave.buckets.errors import (
    AccessDenied,
    BucketError,
    EntityTooLarge,
    EntityTooSmall,
    InvalidArgument,
    InvalidPolicyDocument,
    SignatureDoesNotMatch,
)

Argument = str | int


@dataclass(frozen=True)
class Upload:
    """An object on its way into a bucket, as a policy sees it."""

    fields: Mapping[str, str]
    """The form's fields by lower-case name, and `bucket`."""
    content_length: int | None
    """Bytes of the object; None while they are not known, which no length refuses."""


@dataclass(frozen=True)
class PolicyCondition:
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


def _eq(condition: PolicyCondition, upload: Upload) -> BucketError | None:
    return None if _given(condition, upload) == condition.value else _failed(condition)


def _starts_with(condition: PolicyCondition, upload: Upload) -> BucketError | None:
    given = _given(condition, upload)
    if given is None:
        return _failed(condition)
    # Of all fields Content-Type alone may be a list, and each item of it must fit.
    items = given.split(",") if condition.field == "content-type" else [given]
    return None if all(item.startswith(condition.value) for item in items) else _failed(condition)


def _content_length_range(condition: PolicyCondition, upload: Upload) -> BucketError | None:
    bounds = [str(bound) for bound in condition.arguments]
    if not all(re.fullmatch(r"[0-9]{1,19}", bound) for bound in bounds):
        return _failed(condition)
    least, most = (int(bound) for bound in bounds)
    if upload.content_length is None:
        return None
    if upload.content_length < least:
        return EntityTooSmall()
    return EntityTooLarge() if upload.content_length > most else None


OPERATORS: Mapping[str, Callable[[PolicyCondition, Upload], BucketError | None]] = {
    "eq": _eq,
    "starts-with": _starts_with,
    "content-length-range": _content_length_range,
}
"""Every operator of S3's, by lower-case name."""


def read_condition(document: object) -> PolicyCondition:
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
    return PolicyCondition(operator, (arguments[0], arguments[1]))


def _read_simple_condition(document: dict[str, object]) -> PolicyCondition:
    if len(document) != 1:
        raise InvalidPolicyDocument(
            "Invalid Simple-Condition: Simple-Conditions must have exactly one property specified."
        )
    ((name, value),) = document.items()
    if not isinstance(value, str):
        raise InvalidPolicyDocument("Invalid Simple-Condition: value must be a string.")
    return PolicyCondition("eq", (f"${name}", value))


def _given(condition: PolicyCondition, upload: Upload) -> str | None:
    return None if condition.field is None else upload.fields.get(condition.field)


def _failed(condition: PolicyCondition) -> BucketError:
    return AccessDenied.by_policy(f"Policy Condition failed: {condition}")


_CREDENTIAL = re.compile(r"(?P<id>[^/]+)/(?P<date>[0-9]{8})/(?P<region>[^/]+)/s3/aws4_request")


def is_version_4(signature: str) -> bool:
    """Whether a signature has the form of version 4's (version 2's are 28 characters of base64)."""
    return re.fullmatch(r"[0-9a-f]{64}", signature) is not None


def signature_v2(text: str, secret: str) -> str:
    """The version 2 signature of a text with a secret."""
    return base64.b64encode(hmac.digest(secret.encode(), _bytes(text), "sha1")).decode()


def signs_v2(signature: str, text: str, secret: str) -> bool:
    """Whether this is the text's version 2 signature with this secret."""
    return hmac.compare_digest(signature_v2(text, secret).encode(), _bytes(signature))


def signature_v4(text: str, secret: str, date: str, region: str) -> str:
    """The version 4 signature of a text with a secret, for a day (yyyymmdd) and a region."""
    key = f"AWS4{secret}".encode()
    for word in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return hmac.digest(key, _bytes(text), "sha256").hex()


def signs_v4(signature: str, text: str, secret: str, credential: str) -> bool:
    """Whether this is the text's version 4 signature with this secret.

    Args:
        signature: 64 hex digits.
        text: The policy in base64.
        secret: The secret access key.
        credential: `<access key id>/<yyyymmdd>/<region>/s3/aws4_request`.

    Raises:
        InvalidArgument: The credential is of another form.
    """
    scope = _CREDENTIAL.fullmatch(credential)
    if scope is None:
        raise InvalidArgument('the Credential is mal-formed; expecting "<YOUR-AKID>/YYYYMMDD/REGION/s3/aws4_request".')
    expected = signature_v4(text, secret, scope["date"], scope["region"])
    return hmac.compare_digest(expected.encode(), _bytes(signature))


def _bytes(text: str) -> bytes:
    # What came over the wire may not be encodable; it matches nothing then, which is the right answer.
    return text.encode(errors="replace")


POLICY_CHARACTERS = 4096
"""The longest policy, as sent (Eucalyptus 4.4)."""


# What a form always carries and no condition needs to name (AWS S3 documentation, "POST Policy").
_UNCONDITIONAL = frozenset({"awsaccesskeyid", "signature", "x-amz-signature", "policy", "file"})


_IGNORED = "x-ignore-"


# Where a policy leaves a field open, what bundles are stored with; else just what the policy wants it to begin with.
_DEFAULTS = {"acl": "ec2-bundle-read", "content-type": "application/octet-stream"}


_V4_FIELDS = ("x-amz-algorithm", "x-amz-credential", "x-amz-date")


_V4_ALGORITHM = "AWS4-HMAC-SHA256"


_EXPIRATION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z?")


@dataclass(frozen=True, kw_only=True)
class UploadPolicy:
    """A policy that was signed with an access key of the bucket's owner."""

    text: str = field(repr=False)
    """In base64, as it was signed: what a form upload sends as `Policy`."""
    signature: str = field(repr=False)
    access_key_id: str
    expiration: datetime
    conditions: tuple[PolicyCondition, ...] = field(repr=False)

    @classmethod
    def verify(cls, wire_text: str, signature: str, *, access_key_id: str, secret: str) -> Self:
        """Read a policy as it came in a request, and make sure that it was signed with this key.

        Args:
            wire_text: The policy exactly as received, in base64 once or twice.
            signature: As received; white space around it does not count.
            access_key_id: Whose signature it should be.
            secret: The secret access key of that id.

        Raises:
            SignatureDoesNotMatch: It is not the signature of this text with this key.
            InvalidPolicyDocument: The text is too long, or not a policy.
            InvalidArgument: It has the form of a version 4 signature, but its policy lacks what that needs.
        """
        signature = signature.strip()
        if len(wire_text) > POLICY_CHARACTERS:
            raise InvalidPolicyDocument(f"longer than {POLICY_CHARACTERS} characters.")
        for text in (wire_text, _inner_text(wire_text)):
            if text is not None and _is_signed(text, signature, access_key_id, secret):
                return cls.trusted(text, signature, access_key_id)
        raise SignatureDoesNotMatch

    @classmethod
    def trusted(cls, text: str, signature: str, access_key_id: str) -> Self:
        """Read a policy again whose signature was verified before (when the request was made).

        Raises:
            InvalidPolicyDocument: It is not a policy.
        """
        expiration, conditions = _read_document(_decode(_inner_text(text) or text))
        return cls(
            text=text, signature=signature, access_key_id=access_key_id, expiration=expiration, conditions=conditions
        )

    def form_fields(self, key: str) -> dict[str, str]:
        """The fields of a form upload of one object, in the order in which they are sent; the file comes after them.

        Only what the policy names is sent, as S3 refuses any other: its `acl` exactly, or none if it names none.
        """
        fields = {"key": key}
        for condition in self.conditions:
            if condition.field and condition.field not in _UNCONDITIONAL | {"bucket"}:
                fields.setdefault(condition.field, _proposed(condition))
        if is_version_4(self.signature):
            return fields | {"policy": self.text, "x-amz-signature": self.signature}
        return fields | {"AWSAccessKeyId": self.access_key_id, "policy": self.text, "signature": self.signature}

    def check(self, bucket: str, fields: Mapping[str, str], *, content_length: int | None, now: datetime) -> None:
        """Refuse a form upload as S3 does.

        Args:
            bucket: Where it goes.
            fields: The form's fields.
            content_length: Bytes of the object; None if they are not known yet: then no length is refused.
            now: The time of the upload, aware.

        Raises:
            AccessDenied: The policy has expired, a condition is not met, or none covers a field or the bucket.
            EntityTooSmall, EntityTooLarge: The object is out of a `content-length-range`.
        """
        if now > self.expiration:
            raise AccessDenied.by_policy("Policy expired.")
        given = {name.lower(): value for name, value in fields.items()}
        upload = Upload(given | {"bucket": bucket}, content_length)
        for condition in self.conditions:
            if refusal := condition.refusal(upload):
                raise refusal
        covered = {condition.field for condition in self.conditions} | _UNCONDITIONAL
        if extra := [name for name in upload.fields if name not in covered and not name.startswith(_IGNORED)]:
            raise AccessDenied.by_policy(f"Extra input fields: {', '.join(extra)}")

    def check_upload(self, bucket: str, key: str, *, content_length: int | None, now: datetime) -> None:
        """Refuse, as S3 does, an upload with the fields that `form_fields` sends.

        Raises:
            AccessDenied, EntityTooSmall, EntityTooLarge: See `check`.
        """
        self.check(bucket, self.form_fields(key), content_length=content_length, now=now)

    def check_bundle(self, bucket: str, prefix: str, *, now: datetime) -> None:
        """Refuse a policy that cannot take a whole bundle, before anything is stopped for it.

        Conditions on a key name it or its beginning. One that takes both the first part and the manifest can only say
        a beginning of `PREFIX.`, so it takes every other part and file of the bundle as well: two keys decide.

        Raises:
            AccessDenied: S3 would refuse a part or the manifest.
        """
        for ending in (".part.0", ".manifest.xml"):
            self.check_upload(bucket, prefix + ending, content_length=None, now=now)


def _proposed(condition: PolicyCondition) -> str:
    default = _DEFAULTS.get(condition.field or "", "")
    is_open = condition.operator.lower() == "starts-with"
    return default if is_open and default.startswith(condition.value) else condition.value


def _is_signed(text: str, signature: str, access_key_id: str, secret: str) -> bool:
    if not is_version_4(signature):
        return signs_v2(signature, text, secret)
    _, conditions = _read_document(_decode(_inner_text(text) or text))
    said = {condition.field: condition.value for condition in conditions if condition.operator.lower() == "eq"}
    for name in _V4_FIELDS:
        if name not in said:
            raise InvalidArgument(f"A policy with a version 4 signature must have a condition on {name}.")
    if said["x-amz-algorithm"] != _V4_ALGORITHM:
        raise InvalidArgument(f"x-amz-algorithm only supports {_V4_ALGORITHM}.")
    same_key = said["x-amz-credential"].startswith(f"{access_key_id}/")
    return signs_v4(signature, text, secret, said["x-amz-credential"]) and same_key


def _inner_text(text: str) -> str | None:
    """The base64 text within a text that was encoded twice; None if it was encoded once, or is something else."""
    try:
        inner = _decode(text).decode("ascii")
        return inner if _decode(inner).lstrip().startswith(b"{") else None
    except (InvalidPolicyDocument, UnicodeDecodeError):
        return None


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidPolicyDocument("invalid Base64 encoding.") from None


def _read_document(document: bytes) -> tuple[datetime, tuple[PolicyCondition, ...]]:
    try:
        policy = json.loads(document.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
        json.dumps(policy, ensure_ascii=False).encode()  # no half of a surrogate pair in any string
    except (ValueError, RecursionError):
        raise InvalidPolicyDocument("Invalid JSON.") from None
    if not isinstance(policy, dict):
        raise InvalidPolicyDocument("Invalid JSON.")
    for name in policy:
        if name not in ("expiration", "conditions"):
            raise InvalidPolicyDocument(f"Unexpected: '{name}'")
    return _read_expiration(policy), _read_conditions(policy)


def _read_expiration(policy: dict[str, object]) -> datetime:
    if "expiration" not in policy:
        raise InvalidPolicyDocument("Policy missing expiration.")
    expiration = policy["expiration"]
    if not isinstance(expiration, str):
        raise InvalidPolicyDocument("Invalid 'expiration' value: must be a string.")
    try:
        if _EXPIRATION.fullmatch(expiration):
            return datetime.fromisoformat(expiration).replace(tzinfo=UTC)
    except ValueError:
        pass  # a 13th month, and the like
    raise InvalidPolicyDocument(f"Invalid 'expiration' value: '{expiration}'")


def _read_conditions(policy: dict[str, object]) -> tuple[PolicyCondition, ...]:
    if "conditions" not in policy:
        raise InvalidPolicyDocument("Policy missing conditions.")
    if not isinstance(policy["conditions"], list):
        raise InvalidPolicyDocument("Invalid 'conditions' value: must be a List.")
    return tuple(read_condition(condition) for condition in policy["conditions"])


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _refuse_constant(constant: str) -> Never:
    raise ValueError(constant)
