"""The upload policy: a document, signed by the bucket's owner, that says what may be stored in the bucket until when.

`UploadPolicy.verify` reads a policy from a request, `check_upload` applies its conditions as Amazon S3 does, and
`form_fields` builds the form of an upload under it. The policy comes from clients and is not trusted. No network is
used, and callers pass the time.
"""

import base64
import binascii
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Never, Self

from thrave.buckets.errors import (
    AccessDenied,
    EntityTooLarge,
    EntityTooSmall,
    InvalidArgument,
    InvalidPolicyDocument,
    SignatureDoesNotMatch,
)

# Where AWS's documentation ("POST Policy") and the service differ, the rules are those of the service, as recorded from
# it (LocalStack's snapshots validated against AWS; issue threads): a condition that is not met is 403 AccessDenied.
# Names are compared without regard to case, values with. A condition on a field that the form does not have is not met,
# not even `["starts-with", "$f", ""]`.

POLICY_CHARACTERS = 4096
"""Maximum length of a policy as sent (Eucalyptus 4.4)."""

OPERATORS = frozenset({"eq", "starts-with", "content-length-range"})
"""All operators of S3, in lower case."""

# Fields that every form has and that no condition needs to name (AWS S3 documentation, "POST Policy").
_UNCONDITIONAL = frozenset({"awsaccesskeyid", "signature", "x-amz-signature", "policy", "file"})
_IGNORED = "x-ignore-"

# Values for bundles, if the policy leaves a field open; otherwise the value or the start that the policy names is used.
_DEFAULTS = {"acl": "ec2-bundle-read", "content-type": "application/octet-stream"}

_V4_FIELDS = ("x-amz-algorithm", "x-amz-credential", "x-amz-date")
_V4_ALGORITHM = "AWS4-HMAC-SHA256"
_CREDENTIAL = re.compile(r"(?P<id>[^/]+)/(?P<date>[0-9]{8})/(?P<region>[^/]+)/s3/aws4_request")
_EXPIRATION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z?")


@dataclass(frozen=True)
class Upload:
    """The data of an upload that conditions are compared with."""

    fields: Mapping[str, str]
    """Fields of the form by lower-case name, and `bucket`."""
    content_length: int | None
    """Bytes of the object; None if not known yet: then every length is allowed."""


@dataclass(frozen=True)
class PolicyCondition:
    """One condition in the form of a list: `["eq", "$acl", "private"]`."""

    operator: str
    arguments: tuple[str | int, str | int]

    def __str__(self) -> str:
        return json.dumps([self.operator, *self.arguments], ensure_ascii=False)

    @property
    def field(self) -> str | None:
        """Lower-case name of the field; None for a length, or if the name has no `$`."""
        name = self.arguments[0]
        return name[1:].lower() if isinstance(name, str) and name.startswith("$") else None

    @property
    def value(self) -> str:
        """What the field must be or start with."""
        return str(self.arguments[1])

    def check(self, upload: Upload) -> None:
        """Compare an upload with this condition.

        Raises:
            AccessDenied: The condition is not met.
            EntityTooSmall, EntityTooLarge: The object's length is not in the range.
        """
        if self.operator.lower() == "content-length-range":
            self._check_length(upload.content_length)
            return
        value = None if self.field is None else upload.fields.get(self.field)
        if value is None:
            is_met = False
        elif self.operator.lower() == "eq":
            is_met = value == self.value
        else:
            # Content-Type is the only field that may be a list; each item must start with the value.
            items = value.split(",") if self.field == "content-type" else [value]
            is_met = all(item.startswith(self.value) for item in items)
        if not is_met:
            raise self._failure()

    def _check_length(self, content_length: int | None) -> None:
        bounds = [str(bound) for bound in self.arguments]
        if not all(re.fullmatch(r"[0-9]{1,19}", bound) for bound in bounds):
            raise self._failure()
        minimum, maximum = (int(bound) for bound in bounds)
        if content_length is None:
            return
        if content_length < minimum:
            raise EntityTooSmall
        if content_length > maximum:
            raise EntityTooLarge

    def _failure(self) -> AccessDenied:
        return AccessDenied.by_policy(f"Policy Condition failed: {self}")


@dataclass(frozen=True, kw_only=True)
class UploadPolicy:
    """An upload policy with a verified signature.

    Clients encode the policy once in base64. If a user passes base64 text to boto3 or the AWS CLI 1, it is encoded
    twice; then the signature is of the outer text (by the CLI) or the inner text (by the user). A store decodes once
    and compares the signature with the text that it receives, so `text` is the signed text.
    """

    text: str = field(repr=False)
    """The signed base64 text, which a form upload sends as `Policy`."""
    signature: str = field(repr=False)
    access_key_id: str
    expiration: datetime
    conditions: tuple[PolicyCondition, ...] = field(repr=False)

    @classmethod
    def verify(cls, wire_text: str, signature: str, *, access_key_id: str, secret: str) -> Self:
        """Parse the policy of a request and verify its signature.

        Args:
            wire_text: The policy exactly as received, in base64 once or twice.
            signature: The signature as received; white space around it is ignored.
            access_key_id: Id of the key that should have signed.
            secret: The secret access key of that id.

        Raises:
            SignatureDoesNotMatch: The signature was not made over this text with this key.
            InvalidPolicyDocument: The text is too long, or is not a policy.
            InvalidArgument: The policy lacks a condition that a version 4 signature requires.
        """
        signature = signature.strip()
        if len(wire_text) > POLICY_CHARACTERS:
            raise InvalidPolicyDocument(f"longer than {POLICY_CHARACTERS} characters.")
        for text in (wire_text, _decode_inner_text(wire_text)):
            if text is not None and _is_signed(text, signature, access_key_id, secret):
                return cls.parse_trusted(text, signature, access_key_id)
        raise SignatureDoesNotMatch

    @classmethod
    def parse_trusted(cls, text: str, signature: str, access_key_id: str) -> Self:
        """Parse a policy whose signature was verified before, when the request was made.

        Raises:
            InvalidPolicyDocument: The text is not a policy.
        """
        expiration, conditions = _parse_document(text)
        return cls(
            text=text, signature=signature, access_key_id=access_key_id, expiration=expiration, conditions=conditions
        )

    def form_fields(self, key: str) -> dict[str, str]:
        """Return the fields of a form upload of one object in the order of sending; the file follows them.

        Only fields that the policy names are sent, since S3 refuses others. So `acl` is missing if no condition has it.
        """
        fields = {"key": key}
        for condition in self.conditions:
            name = condition.field
            if name and name not in _UNCONDITIONAL | {"bucket"}:
                default = _DEFAULTS.get(name, "")
                is_open = condition.operator.lower() == "starts-with" and default.startswith(condition.value)
                fields.setdefault(name, default if is_open else condition.value)
        if is_version_4(self.signature):
            return fields | {"policy": self.text, "x-amz-signature": self.signature}
        return fields | {"AWSAccessKeyId": self.access_key_id, "policy": self.text, "signature": self.signature}

    def check(self, bucket: str, fields: Mapping[str, str], *, content_length: int | None, now: datetime) -> None:
        """Refuse a form upload as S3 does.

        Args:
            bucket: Bucket of the upload.
            fields: Fields of the form.
            content_length: Bytes of the object; None if not known yet: then every length is allowed.
            now: Time of the upload, with a time zone.

        Raises:
            AccessDenied: The policy has expired, a condition is not met, or no condition names a field or the bucket.
            EntityTooSmall, EntityTooLarge: The length is not in a `content-length-range`.
        """
        if now > self.expiration:
            raise AccessDenied.by_policy("Policy expired.")
        upload = Upload({name.lower(): value for name, value in fields.items()} | {"bucket": bucket}, content_length)
        for condition in self.conditions:
            condition.check(upload)
        named = {condition.field for condition in self.conditions} | _UNCONDITIONAL
        if extra := [name for name in upload.fields if name not in named and not name.startswith(_IGNORED)]:
            raise AccessDenied.by_policy(f"Extra input fields: {', '.join(extra)}")

    def check_upload(self, bucket: str, key: str, *, content_length: int | None, now: datetime) -> None:
        """Refuse an upload with the fields of `form_fields` as S3 does.

        Raises:
            AccessDenied, EntityTooSmall, EntityTooLarge: See `check`.
        """
        self.check(bucket, self.form_fields(key), content_length=content_length, now=now)

    def check_bundle(self, bucket: str, prefix: str, *, now: datetime) -> None:
        """Refuse a policy that does not allow a whole bundle, before the instance is stopped.

        Two object keys are enough: a condition on `$key` names a whole key or its start. Conditions that allow both
        `PREFIX.part.0` and `PREFIX.manifest.xml` can only name a start of `PREFIX.`, so they allow every file of the
        bundle.

        Raises:
            AccessDenied: S3 would refuse a part or the manifest.
        """
        for ending in (".part.0", ".manifest.xml"):
            self.check_upload(bucket, prefix + ending, content_length=None, now=now)


def _parse_document(text: str) -> tuple[datetime, tuple[PolicyCondition, ...]]:
    """Parse a policy from base64, encoded once or twice; return its expiration and its conditions."""
    document = _decode(_decode_inner_text(text) or text)
    try:
        policy = json.loads(document.decode(), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        json.dumps(policy, ensure_ascii=False).encode()  # fails if a string has half of a surrogate pair
    except (ValueError, RecursionError):
        raise InvalidPolicyDocument("Invalid JSON.") from None
    if not isinstance(policy, dict):
        raise InvalidPolicyDocument("Invalid JSON.")
    for name in policy:
        if name not in ("expiration", "conditions"):
            raise InvalidPolicyDocument(f"Unexpected: '{name}'")
    expiration = _parse_expiration(policy)
    if "conditions" not in policy:
        raise InvalidPolicyDocument("Policy missing conditions.")
    if not isinstance(policy["conditions"], list):
        raise InvalidPolicyDocument("Invalid 'conditions' value: must be a List.")
    return expiration, tuple(_parse_condition(condition) for condition in policy["conditions"])


def _decode_inner_text(text: str) -> str | None:
    """Return the base64 text inside a text that was encoded twice; None if it was encoded once or is not base64."""
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


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _refuse_constant(constant: str) -> Never:  # NaN and Infinity, which JSON does not have
    raise ValueError(constant)


def _parse_expiration(policy: dict[str, object]) -> datetime:
    if "expiration" not in policy:
        raise InvalidPolicyDocument("Policy missing expiration.")
    expiration = policy["expiration"]
    if not isinstance(expiration, str):
        raise InvalidPolicyDocument("Invalid 'expiration' value: must be a string.")
    try:
        if _EXPIRATION.fullmatch(expiration):
            return datetime.fromisoformat(expiration).replace(tzinfo=UTC)
    except ValueError:
        pass  # for example month 13
    raise InvalidPolicyDocument(f"Invalid 'expiration' value: '{expiration}'")


def _parse_condition(document: object) -> PolicyCondition:
    """Parse an element of `conditions`: a list, or `{"acl": "private"}`, which means `["eq", "$acl", "private"]`."""
    if isinstance(document, dict):
        if len(document) != 1:
            raise InvalidPolicyDocument(
                "Invalid Simple-Condition: Simple-Conditions must have exactly one property specified."
            )
        ((name, value),) = document.items()
        if not isinstance(value, str):
            raise InvalidPolicyDocument("Invalid Simple-Condition: value must be a string.")
        return PolicyCondition("eq", (f"${name}", value))
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


# Signatures are made over the base64 text exactly as sent, with the secret of the bucket owner's access key. Version 2
# is base64(HMAC-SHA1(secret, text)). Version 4 is hex(HMAC-SHA256(key, text)), with a key derived for a day, a region
# and a service, which the policy's own condition on `x-amz-credential` names.
# Source: AWS S3 documentation, "HTML forms (AWS signature version 2)" and "Authenticating Requests: Browser-Based
# Uploads Using POST (AWS Signature Version 4)".


def _is_signed(text: str, signature: str, access_key_id: str, secret: str) -> bool:
    if not is_version_4(signature):
        return _is_equal(signature_v2(text, secret), signature)
    _, conditions = _parse_document(text)
    values = {condition.field: condition.value for condition in conditions if condition.operator.lower() == "eq"}
    for name in _V4_FIELDS:
        if name not in values:
            raise InvalidArgument(f"A policy with a version 4 signature must have a condition on {name}.")
    if values["x-amz-algorithm"] != _V4_ALGORITHM:
        raise InvalidArgument(f"x-amz-algorithm only supports {_V4_ALGORITHM}.")
    scope = _CREDENTIAL.fullmatch(values["x-amz-credential"])
    if scope is None:
        raise InvalidArgument('the Credential is mal-formed; expecting "<YOUR-AKID>/YYYYMMDD/REGION/s3/aws4_request".')
    expected = signature_v4(text, secret, scope["date"], scope["region"])
    return _is_equal(expected, signature) and scope["id"] == access_key_id


def is_version_4(signature: str) -> bool:
    """Whether a signature has the form of version 4 (version 2 has 28 characters of base64)."""
    return re.fullmatch(r"[0-9a-f]{64}", signature) is not None


def signature_v2(text: str, secret: str) -> str:
    """Return the version 2 signature of a text."""
    return base64.b64encode(hmac.digest(secret.encode(), _encode(text), "sha1")).decode()


def signature_v4(text: str, secret: str, date: str, region: str) -> str:
    """Return the version 4 signature of a text for a day (yyyymmdd) and a region."""
    key = f"AWS4{secret}".encode()
    for component in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, component.encode(), "sha256")
    return hmac.digest(key, _encode(text), "sha256").hex()


def _is_equal(expected: str, signature: str) -> bool:
    return hmac.compare_digest(expected.encode(), _encode(signature))  # in constant time


def _encode(text: str) -> bytes:
    # Received text may not be encodable; the replacement matches no signature.
    return text.encode(errors="replace")
