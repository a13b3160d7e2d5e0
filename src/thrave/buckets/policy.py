"""The upload policy: the caller's signed word on what may be put into their bucket, and until when.

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
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Never, Self

from thrave.buckets.conditions import Condition, Upload, read_condition
from thrave.buckets.errors import AccessDenied, InvalidArgument, InvalidPolicyDocument, SignatureDoesNotMatch
from thrave.buckets.signatures import is_version_4, signs_v2, signs_v4

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
    conditions: tuple[Condition, ...] = field(repr=False)

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


def _proposed(condition: Condition) -> str:
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


def _read_document(document: bytes) -> tuple[datetime, tuple[Condition, ...]]:
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


def _read_conditions(policy: dict[str, object]) -> tuple[Condition, ...]:
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
