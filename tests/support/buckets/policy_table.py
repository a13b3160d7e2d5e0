"""Upload policies, forms, and the responses of S3: one table for Thrave's check and for a store's.

Each upload is a form for the key `win.part.0` of the bucket `policy-table`, unless the row says otherwise. The answer
is S3's error code, or "" if the object is stored.
"""

from typing import NamedTuple

from support.buckets.upload_policies import ACCESS_KEY_ID, FAR

BUCKET = "policy-table"
KEY = "win.part.0"
DENIED, NO_POLICY, LARGE, SMALL = "AccessDenied", "InvalidPolicyDocument", "EntityTooLarge", "EntityTooSmall"


class Case(NamedTuple):
    """A row of the table."""

    name: str
    policy: object
    """The policy as a document, or as text."""
    answer: str = ""
    fields: dict[str, str] | None = None
    """Fields of the form, in addition to `key` or with another `key`."""
    size: int = 4
    """Bytes of the object."""


def _of(*conditions, expiration=FAR, **others):
    return {"expiration": expiration, "conditions": [{"bucket": BUCKET}, *conditions], **others}


_WIN = ["starts-with", "$key", "win"]
_PRIVATE = {"acl": "private"}


def _until(expiration):
    return _of(_WIN, expiration=expiration)


def _length(*bounds):
    return _of(_WIN, ["content-length-range", *bounds])


def _type(value):
    return {"Content-Type": value}


def _types(beginning):
    return _of(_WIN, ["starts-with", "$Content-Type", beginning])


CASES = [
    # Expiration
    Case("expires in 2099", _until("2099-01-01T00:00:00Z")),
    Case("expires in 2099, milliseconds", _until("2099-01-01T00:00:00.000Z")),
    Case("expires in 2099, microseconds, as the AWS CLI", _until("2099-01-01T00:00:00.000000Z")),
    Case("expires in 2099, no Z, as eutester", _until("2099-01-01T00:00:00")),
    Case("expired", _until("2020-01-01T00:00:00Z"), DENIED),
    Case("expired, milliseconds", _until("2020-01-01T00:00:00.999Z"), DENIED),
    Case("no expiration", {"conditions": [{"bucket": BUCKET}, _WIN]}, NO_POLICY),
    Case("expires at a number", _until(4070908800), NO_POLICY),
    Case("expires at nothing", _until(None), NO_POLICY),
    Case("expires at a word", _until("tomorrow"), NO_POLICY),
    Case("expires on a date", _until("2099-01-01"), NO_POLICY),
    Case("expires in a 13th month", _until("2099-13-01T00:00:00Z"), NO_POLICY),
    Case("expires at an empty string", _until(""), NO_POLICY),
    # Documents
    Case("empty", "", NO_POLICY),
    Case("a word", "policy", NO_POLICY),
    Case("a list", [], NO_POLICY),
    Case("cut off", '{"expiration": "2099-01-01T00:00:00Z", "conditions": [', NO_POLICY),
    Case("a comma too many", '{"expiration": "2099-01-01T00:00:00Z", "conditions": [],}', NO_POLICY),
    Case("single quotes", "{'expiration': '2099-01-01T00:00:00Z', 'conditions': []}", NO_POLICY),
    Case("no conditions", {"expiration": FAR}, NO_POLICY),
    Case("conditions an object", {"expiration": FAR, "conditions": {}}, NO_POLICY),
    Case("conditions a string", {"expiration": FAR, "conditions": "all"}, NO_POLICY),
    Case("conditions nothing", {"expiration": FAR, "conditions": None}, NO_POLICY),
    Case("no condition at all", {"expiration": FAR, "conditions": []}, DENIED),
    Case("another member", _of(_WIN, Version="2012-10-17"), NO_POLICY),
    Case("EXPIRATION in capitals", {"EXPIRATION": FAR, "conditions": [{"bucket": BUCKET}, _WIN]}, NO_POLICY),
    # Conditions
    Case("condition of no property", _of(_WIN, {}), NO_POLICY),
    Case("condition of two properties", _of({"key": KEY, "acl": "private"}), NO_POLICY, {"acl": "private"}),
    Case("condition with a number", _of(_WIN, {"acl": 5}), NO_POLICY),
    Case("condition with nothing", _of(_WIN, {"acl": None}), NO_POLICY),
    Case("condition with a list", _of(_WIN, {"acl": ["private"]}), NO_POLICY),
    Case("condition a string", _of(_WIN, "eq"), NO_POLICY),
    Case("condition a number", _of(_WIN, 5), NO_POLICY),
    Case("condition an empty list", _of(_WIN, []), NO_POLICY),
    Case("unknown operator", _of(_WIN, ["ends-with", "$key", "0"]), NO_POLICY),
    Case("operator a number", _of(_WIN, [5, "$key", "win"]), NO_POLICY),
    Case("eq without a value", _of(_WIN, ["eq", "$key"]), NO_POLICY),
    Case("eq with two values", _of(_WIN, ["eq", "$key", KEY, KEY]), NO_POLICY),
    Case("eq with a number", _of(_WIN, ["eq", "$key", 5]), NO_POLICY),
    Case("starts-with without a value", _of(["starts-with", "$key"]), NO_POLICY),
    # eq
    Case("key exactly", _of(["eq", "$key", KEY])),
    Case("key exactly, as a simple condition", _of({"key": KEY})),
    Case("key of another", _of(["eq", "$key", "win.part.1"]), DENIED),
    Case("key of another, as a simple condition", _of({"key": "win.part.1"}), DENIED),
    Case("key's beginning is not the key", _of(["eq", "$key", "win"]), DENIED),
    Case("key in capitals", _of({"key": KEY.upper()}), DENIED),
    Case("the name $KEY", _of(["eq", "$KEY", KEY])),
    Case("the name Key", _of({"Key": KEY})),
    Case("the name without $", _of(["eq", "key", KEY]), DENIED),
    Case("EQ", _of(["EQ", "$key", KEY])),
    Case("bucket as a list", {"expiration": FAR, "conditions": [["eq", "$bucket", BUCKET], _WIN]}),
    Case("bucket of another name", {"expiration": FAR, "conditions": [{"bucket": "other-table"}, _WIN]}, DENIED),
    Case("bucket in capitals", {"expiration": FAR, "conditions": [{"bucket": BUCKET.upper()}, _WIN]}, DENIED),
    Case("bucket by its beginning", {"expiration": FAR, "conditions": [["starts-with", "$bucket", "policy"], _WIN]}),
    Case("bucket not named", {"expiration": FAR, "conditions": [_WIN]}, DENIED),
    # starts-with
    Case("key by its beginning", _of(_WIN)),
    Case("key by the whole of it", _of(["starts-with", "$key", KEY])),
    Case("key by anything", _of(["starts-with", "$key", ""])),
    Case("key with another beginning", _of(["starts-with", "$key", "lin"]), DENIED),
    Case("key with a longer beginning", _of(["starts-with", "$key", KEY + "0"]), DENIED),
    Case("key with a beginning in capitals", _of(["starts-with", "$key", "WIN"]), DENIED),
    Case("key in a folder", _of(["starts-with", "$key", "a/b/"]), "", {"key": "a/b/win.part.0"}),
    Case("key outside of the folder", _of(["starts-with", "$key", "a/b/"]), DENIED, {"key": "a/bwin.part.0"}),
    Case("key not named", _of(), DENIED),
    Case("STARTS-WITH", _of(["STARTS-WITH", "$key", "win"])),
    Case("key outside of ASCII", _of(["starts-with", "$key", "ä"]), "", {"key": "ä.part.0"}),
    # acl
    Case("acl as named", _of(_WIN, _PRIVATE), "", {"acl": "private"}),
    Case("acl of another name", _of(_WIN, _PRIVATE), DENIED, {"acl": "public-read"}),
    Case("acl named and not given", _of(_WIN, _PRIVATE), DENIED),
    Case("acl given and not named", _of(_WIN), DENIED, {"acl": "private"}),
    Case("acl in capitals", _of(_WIN, _PRIVATE), DENIED, {"acl": "PRIVATE"}),
    Case("acl by the name ACL", _of(_WIN, {"ACL": "private"}), "", {"acl": "private"}),
    Case("acl in a field ACL", _of(_WIN, _PRIVATE), "", {"ACL": "private"}),
    Case("acl by its beginning", _of(_WIN, ["starts-with", "$acl", "priv"]), "", {"acl": "private"}),
    Case("acl by anything", _of(_WIN, ["starts-with", "$acl", ""]), "", {"acl": "private"}),
    Case("acl by anything and not given", _of(_WIN, ["starts-with", "$acl", ""]), DENIED),
    Case("acl of bundles", _of(_WIN, {"acl": "ec2-bundle-read"}), "", {"acl": "ec2-bundle-read"}),
    # Length of the object
    Case("length between", _length(0, 9)),
    Case("length the minimum", _length(4, 9)),
    Case("length the maximum", _length(0, 4)),
    Case("length exactly", _length(4, 4)),
    Case("too long by a byte", _length(0, 3), LARGE),
    Case("too short by a byte", _length(5, 9), SMALL),
    Case("empty and may be", _length(0, 0), "", size=0),
    Case("empty and may not be", _length(1, 9), SMALL, size=0),
    Case("length up to terabytes", _length(0, 1 << 40)),
    Case("length in strings", _length("0", "9")),
    Case("too long in strings", _length("0", "3"), LARGE),
    Case("minimum above maximum", _length(9, 0), SMALL),
    Case("negative minimum", _length(-1, 9), DENIED),
    Case("length in words", _length("none", "all"), DENIED),
    Case("length in halves", _length(0.5, 9), NO_POLICY),
    Case("length without a maximum", _length(0), NO_POLICY),
    Case("length of three", _length(0, 1, 2), NO_POLICY),
    Case("CONTENT-LENGTH-RANGE", _of(_WIN, ["CONTENT-LENGTH-RANGE", 0, 9])),
    Case("two lengths, both met", _of(_WIN, ["content-length-range", 0, 9], ["content-length-range", 2, 5])),
    Case("two lengths, one met", _of(_WIN, ["content-length-range", 0, 9], ["content-length-range", 0, 3]), LARGE),
    # Other fields
    Case("metadata not named", _of(_WIN), DENIED, {"x-amz-meta-a": "1"}),
    Case("metadata as named", _of(_WIN, {"x-amz-meta-a": "1"}), "", {"x-amz-meta-a": "1"}),
    Case("metadata with another value", _of(_WIN, {"x-amz-meta-a": "1"}), DENIED, {"x-amz-meta-a": "2"}),
    Case("metadata with any value", _of(_WIN, ["starts-with", "$x-amz-meta-a", ""]), "", {"x-amz-meta-a": "1"}),
    Case("metadata named and not given", _of(_WIN, {"x-amz-meta-a": "1"}), DENIED),
    Case("metadata with any value and not given", _of(_WIN, ["starts-with", "$x-amz-meta-a", ""]), DENIED),
    Case("metadata's name in capitals", _of(_WIN, {"X-Amz-Meta-A": "1"}), "", {"x-amz-meta-a": "1"}),
    Case("a field to be ignored", _of(_WIN), "", {"x-ignore-a": "1"}),
    Case("a field of no meaning, not named", _of(_WIN), DENIED, {"colour": "blue"}),
    Case("a field of no meaning, named", _of(_WIN, {"colour": "blue"}), "", {"colour": "blue"}),
    Case("type not named", _of(_WIN), DENIED, _type("image/png")),
    Case("type as named", _of(_WIN, _type("image/png")), "", _type("image/png")),
    Case("type by its beginning", _types("image/"), "", _type("image/png")),
    Case("type with another beginning", _types("text/"), DENIED, _type("image/png")),
    Case("types by their beginning", _types("image/"), "", _type("image/png,image/gif")),
    Case("types, one with another beginning", _types("image/"), DENIED, _type("image/png,text/html")),
    Case("cache control not named", _of(_WIN), DENIED, {"Cache-Control": "no-store"}),
    Case("cache control as named", _of(_WIN, {"Cache-Control": "no-store"}), "", {"Cache-Control": "no-store"}),
    Case("status not named", _of(_WIN), DENIED, {"success_action_status": "201"}),
    Case("status as named", _of(_WIN, {"success_action_status": "201"}), "", {"success_action_status": "201"}),
    # Several conditions on one field
    Case("the same condition twice", _of(_WIN, _WIN)),
    Case("eq and starts-with, both met", _of(_WIN, {"key": KEY})),
    Case("eq twice, one met", _of({"key": KEY}, {"key": "win.part.1"}), DENIED),
    Case("starts-with twice, one met", _of(_WIN, ["starts-with", "$key", "lin"]), DENIED),
]  # fmt: skip

_V4 = {
    "x-amz-algorithm": "AWS4-HMAC-SHA256",
    "x-amz-credential": f"{ACCESS_KEY_ID}/20260101/us-east-1/s3/aws4_request",
    "x-amz-date": "20260101T000000Z",
}


def _v4(*conditions, **changes):
    values = {**_V4, **changes}
    return _of(*conditions, *({name: value} for name, value in values.items() if value))


V4_CASES = [
    Case("a beginning", _v4(_WIN), "", _V4),
    Case("a beginning not met", _v4(["starts-with", "$key", "lin"]), DENIED, _V4),
    Case("expired", {**_v4(_WIN), "expiration": "2020-01-01T00:00:00Z"}, DENIED, _V4),
    Case("too long", _v4(_WIN, ["content-length-range", 0, 3]), LARGE, _V4),
    Case("another date in the form", _v4(_WIN), DENIED, {**_V4, "x-amz-date": "20260102T000000Z"}),
    Case("a field not named", _v4(_WIN), DENIED, {**_V4, "x-amz-meta-a": "1"}),
    Case("an acl as named", _v4(_WIN, _PRIVATE), "", {**_V4, "acl": "private"}),
    Case("an acl of another name", _v4(_WIN, _PRIVATE), DENIED, {**_V4, "acl": "public-read"}),
]

DIFFERENT_ON_RGW = {
    # RGW ignores unknown members.
    "another member": "",
    # RGW treats a missing field as an empty one; AWS does not.
    "acl by anything and not given": "",
    "metadata with any value and not given": "",
    # RGW does not support EC2's canned ACL.
    "acl of bundles": "InvalidArgument",
    # RGW checks the maximum first, accepts a negative minimum, and reports a word as an invalid number.
    "minimum above maximum": LARGE,
    "negative minimum": "",
    "length in words": "InvalidArgument",
    # RGW treats Content-Type as one type; AWS checks each item of a list.
    "types, one with another beginning": "",
}
"""Cases in which Ceph RGW 16 gives another answer, with the reason."""

NO_POLICY_ON_RGW = ("InvalidArgument", DENIED)
"""RGW has no InvalidPolicyDocument: it returns the first code for text that it cannot parse, otherwise the second."""
