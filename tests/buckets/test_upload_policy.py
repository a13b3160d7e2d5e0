"""Upload policies: tables of documents and of uploads, with the results and messages of S3."""

from datetime import UTC, datetime, timedelta

import pytest

from support.buckets.upload_policies import (
    ACCESS_KEY_ID,
    FAR,
    bundle_document,
    document,
    verified,
)
from thrave.buckets.errors import AccessDenied, BucketError, InvalidPolicyDocument

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BUCKET = {"bucket": "my-bucket"}
KEY = ["starts-with", "$key", "winami"]


def answer(call):
    """The result of S3: None, or the error as in a bundle task."""
    try:
        call()
    except BucketError as error:
        return str(error)
    return None


ONE_PROPERTY = "Invalid Simple-Condition: Simple-Conditions must have exactly one property specified."
EXPIRED = "AccessDenied(403)- Invalid according to Policy: Policy expired."
MALFORMED = [
    ("[]", "Invalid JSON."),
    ("", "Invalid JSON."),
    ("{", "Invalid JSON."),
    ('{"expiration": "2030-01-01T00:00:00Z", "conditions": [],}', "Invalid JSON."),
    ("{'expiration': '2030-01-01T00:00:00Z', 'conditions': []}", "Invalid JSON."),
    ('{"expiration": "a", "expiration": "b", "conditions": []}', "Invalid JSON."),
    ({"conditions": []}, "Policy missing expiration."),
    ({"EXPIRATION": FAR, "conditions": []}, "Unexpected: 'EXPIRATION'"),
    ({"expiration": FAR}, "Policy missing conditions."),
    ({"expiration": FAR, "CONDITIONS": []}, "Unexpected: 'CONDITIONS'"),
    ({"expiration": FAR, "conditions": [], "Version": "1"}, "Unexpected: 'Version'"),
    ({"expiration": FAR, "conditions": {}}, "Invalid 'conditions' value: must be a List."),
    ({"expiration": FAR, "conditions": "x"}, "Invalid 'conditions' value: must be a List."),
    (document(5), "Invalid condition test: must be a List or Object."),
    (document("eq"), "Invalid condition test: must be a List or Object."),
    (document(None), "Invalid condition test: must be a List or Object."),
    (document({}), ONE_PROPERTY),
    (document({"bucket": "b", "acl": "a"}), ONE_PROPERTY),
    (document({"Content-Length": 6199034}), "Invalid Simple-Condition: value must be a string."),
    (document({"acl": ["a"]}), "Invalid Simple-Condition: value must be a string."),
    (document([]), "Invalid Condition: missing operation identifier."),
    (document([5, "$key", "x"]), "Invalid Condition: missing operation identifier."),
    (document(["ends-with", "$key", "x"]), "Invalid Condition: unknown operation 'ends-with'."),
    (document(["eq", "$key"]), "Invalid eq: wrong number of arguments."),
    (document(["starts-with", "$key", "a", "b"]), "Invalid starts-with: wrong number of arguments."),
    (document(["content-length-range", 0]), "Invalid content-length-range: wrong number of arguments."),
    (document(["eq", "$key", 5]), "Invalid eq: value must be a string."),
    (document(["content-length-range", True, 5]), "Invalid content-length-range: value must be a string."),
    (document(["content-length-range", 0.5, 5]), "Invalid content-length-range: value must be a string."),
    *(
        (document(BUCKET, expiration=expiration), f"Invalid 'expiration' value: '{expiration}'")
        for expiration in (
            "", "tomorrow", "2030-01-01", "2030-13-01T00:00:00Z", "2030-02-30T00:00:00Z", "2030-01-01T24:01:00Z",
            "2030-01-01 00:00:00Z", "2030-01-01T00:00:00+01:00", "2030-W01-1T00:00:00Z", "0000-01-01T00:00:00Z",
        )
    ),
    (document(BUCKET, expiration=1893456000), "Invalid 'expiration' value: must be a string."),
    (document(BUCKET, expiration=None), "Invalid 'expiration' value: must be a string."),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "message"), MALFORMED)
def test_invalid_policy_document_is_rejected_with_the_message_of_s3(policy, message):
    with pytest.raises(InvalidPolicyDocument) as caught:
        verified(policy)
    assert str(caught.value) == f"InvalidPolicyDocument(400)- Invalid Policy: {message}"


@pytest.mark.parametrize(
    "expiration",
    [
        "2026-01-01T00:00:01Z", "2026-01-01T00:00:01.000Z", "2026-01-01T00:00:01.000000Z", "2026-01-01T00:00:01",
        "2026-01-01T00:00:01.000000000Z",
    ],
)  # fmt: skip
def test_policy_is_valid_until_its_expiration_in_every_clients_format(expiration):
    policy = verified(document(BUCKET, KEY, expiration=expiration))
    policy.check_upload("my-bucket", "winami", content_length=1, now=NOW + timedelta(seconds=1))
    with pytest.raises(AccessDenied) as caught:
        policy.check_upload("my-bucket", "winami", content_length=1, now=NOW + timedelta(seconds=1.001))
    assert str(caught.value) == EXPIRED


def failed(condition):
    return f"AccessDenied(403)- Invalid according to Policy: Policy Condition failed: {condition}"


def extra(fields):
    return f"AccessDenied(403)- Invalid according to Policy: Extra input fields: {fields}"


TOO_LARGE = "EntityTooLarge(400)- Your proposed upload exceeds the maximum allowed size"
TOO_SMALL = "EntityTooSmall(400)- Your proposed upload is smaller than the minimum allowed size"
META = "x-amz-meta-tag"

# conditions in addition to bucket and key, form fields in addition to the key, result of S3
FORMS = [
    ([], {}, None),
    ([{"acl": "private"}], {"acl": "private"}, None),
    ([{"acl": "private"}], {"acl": "Private"}, failed('["eq", "$acl", "private"]')),
    ([{"acl": "aws-exec-read"}], {"acl": "ec2-bundle-read"}, failed('["eq", "$acl", "aws-exec-read"]')),
    ([{"acl": "private"}], {}, failed('["eq", "$acl", "private"]')),
    ([{"acl": ""}], {}, failed('["eq", "$acl", ""]')),
    ([["eq", "$acl", "private"]], {"acl": "private"}, None),
    ([["EQ", "$acl", "private"]], {"acl": "private"}, None),
    ([["StArTs-WiTh", "$acl", "p"]], {"acl": "private"}, None),
    ([["EQ", "$acl", "private"]], {"acl": "public"}, failed('["EQ", "$acl", "private"]')),
    ([["eq", "acl", "private"]], {"acl": "private"}, failed('["eq", "acl", "private"]')),
    ([["starts-with", "acl", ""]], {"acl": "private"}, failed('["starts-with", "acl", ""]')),
    ([["starts-with", "$acl", "pri"]], {"acl": "private"}, None),
    ([["starts-with", "$acl", "Pri"]], {"acl": "private"}, failed('["starts-with", "$acl", "Pri"]')),
    ([["starts-with", "$acl", ""]], {"acl": "private"}, None),
    ([["starts-with", "$acl", ""]], {"acl": ""}, None),
    ([["starts-with", "$acl", ""]], {}, failed('["starts-with", "$acl", ""]')),
    ([["starts-with", "$Content-Type", ""]], {}, failed('["starts-with", "$Content-Type", ""]')),
    ([["starts-with", "$Content-Type", "image/"]], {"Content-type": "image/png"}, None),
    ([["starts-with", "$Content-Type", "image/"]], {"Content-Type": "image/png,image/gif"}, None),
    (
        [["starts-with", "$Content-Type", "image/"]],
        {"Content-Type": "image/png,text/plain"},
        failed('["starts-with", "$Content-Type", "image/"]'),
    ),
    ([["eq", "$Content-Type", "a,b"]], {"Content-Type": "a,b"}, None),
    ([["starts-with", f"${META}", "a"]], {META: "a,b"}, None),
    ([{"X-Amz-Meta-Tag": "x"}], {"x-amz-meta-TAG": "x"}, None),
    ([["starts-with", "$acl", "p"], ["eq", "$acl", "private"]], {"acl": "private"}, None),
    (
        [["starts-with", "$acl", "p"], ["eq", "$acl", "private"]],
        {"acl": "public-read"},
        failed('["eq", "$acl", "private"]'),
    ),
    ([{"acl": 'ä\n"x'}], {"acl": "x"}, failed('["eq", "$acl", "ä\\n\\"x"]')),
    ([], {"acl": "private"}, extra("acl")),
    ([], {"Content-Type": "text/plain"}, extra("content-type")),
    ([], {"success_action_status": "201"}, extra("success_action_status")),
    ([], {META: "x", "acl": "private"}, extra(f"{META}, acl")),
    ([], {"x-ignore-this": "x", "X-Ignore-That": "y"}, None),
    ([], {"AWSAccessKeyId": "x", "Policy": "x", "Signature": "x", "X-Amz-Signature": "x", "file": "x"}, None),
    ([["content-length-range", 0, 10]], {}, None),
    ([["content-length-range", 5, 5]], {}, None),
    ([["content-length-range", "5", "10"]], {}, None),
    ([["content-length-range", 6, 10]], {}, TOO_SMALL),
    ([["content-length-range", 0, 4]], {}, TOO_LARGE),
    ([["content-length-range", "0", "4"]], {}, TOO_LARGE),
    ([["content-length-range", 9, 1]], {}, TOO_SMALL),
    ([["content-length-range", "test", "10"]], {}, failed('["content-length-range", "test", "10"]')),
    ([["content-length-range", -1, 10]], {}, failed('["content-length-range", -1, 10]')),
    ([["content-length-range", 0, 10**30]], {}, failed(f'["content-length-range", 0, {10**30}]')),
    ([["content-length-range", "", ""]], {}, failed('["content-length-range", "", ""]')),
    ([["content-length-range", "$key", "5"]], {}, failed('["content-length-range", "$key", "5"]')),
]


@pytest.mark.parametrize(("conditions", "fields", "expected"), FORMS)
def test_check_of_five_bytes_gives_the_result_of_s3(conditions, fields, expected):
    policy = verified(document(BUCKET, KEY, *conditions))
    form = {"key": "winami.part.0", **fields}
    assert answer(lambda: policy.check("my-bucket", form, content_length=5, now=NOW)) == expected


@pytest.mark.parametrize(
    ("policy", "bucket", "key", "expected"),
    [
        (document(BUCKET, KEY), "my-bucket", "winami", None),
        (document(BUCKET, KEY), "my-buckets", "winami", failed('["eq", "$bucket", "my-bucket"]')),
        (document(BUCKET, KEY), "my-bucket", "winam", failed('["starts-with", "$key", "winami"]')),
        (document(BUCKET, KEY), "my-bucket", "Winami", failed('["starts-with", "$key", "winami"]')),
        (document(["starts-with", "$bucket", "my-"], KEY), "my-bucket", "winami", None),
        (document(KEY), "my-bucket", "winami", extra("bucket")),
        (document(BUCKET), "my-bucket", "winami", extra("key")),
        (document(BUCKET, ["starts-with", "$key", ""]), "my-bucket", "winami", None),
        (document(BUCKET, {"key": "winami"}), "my-bucket", "winami", None),
        (document(BUCKET, {"KEY": "winami"}), "my-bucket", "winami", None),
        (document(), "my-bucket", "winami", extra("key, bucket")),
    ],
)
def test_check_enforces_bucket_and_key(policy, bucket, key, expected):
    assert answer(lambda: verified(policy).check_upload(bucket, key, content_length=5, now=NOW)) == expected


# conditions of a policy, and the fields that are sent
PROPOSED = [
    ([], {}),
    ([{"acl": "ec2-bundle-read"}], {"acl": "ec2-bundle-read"}),
    ([{"acl": "private"}], {"acl": "private"}),
    ([["eq", "$ACL", "private"]], {"acl": "private"}),
    ([["starts-with", "$acl", ""]], {"acl": "ec2-bundle-read"}),
    ([["starts-with", "$acl", "ec2-"]], {"acl": "ec2-bundle-read"}),
    ([["starts-with", "$acl", "bucket-owner-full-control"]], {"acl": "bucket-owner-full-control"}),
    ([["starts-with", "$Content-Type", ""]], {"content-type": "application/octet-stream"}),
    ([["starts-with", "$Content-Type", "image/"]], {"content-type": "image/"}),
    ([{"x-amz-security-token": "session"}], {"x-amz-security-token": "session"}),
    ([["starts-with", "$x-amz-meta-tag", ""]], {"x-amz-meta-tag": ""}),
    ([{"success_action_status": "201"}, ["content-length-range", 0, 9]], {"success_action_status": "201"}),
    ([{"signature": "x"}, {"AwsAccessKeyId": "y"}, {"Policy": "z"}], {}),
]


@pytest.mark.parametrize(("conditions", "fields"), PROPOSED)
def test_form_has_exactly_the_fields_of_the_policy(conditions, fields):
    policy = verified(document(BUCKET, KEY, *conditions))
    assert policy.form_fields("winami.part.0") == {
        "key": "winami.part.0",
        **fields,
        "AWSAccessKeyId": ACCESS_KEY_ID,
        "policy": policy.text,
        "signature": policy.signature,
    }


CLIENTS = {
    "AWS CLI": bundle_document("my-bucket", "winami"),
    "euca2ools": document({"acl": "ec2-bundle-read"}, BUCKET, KEY),
    "eucaconsole": document({"acl": "ec2-bundle-read"}, BUCKET, KEY, {"x-amz-security-token": "session"}),
    "eutester": bundle_document("my-bucket", "winami", expiration="2099-07-01T16:52:13"),
    "jclouds and AWS's own text": document(BUCKET, KEY),
    "AWS's sample": document(BUCKET, KEY, {"acl": "ec2-bundle-read"}),
}


@pytest.mark.parametrize("policy", CLIENTS.values(), ids=CLIENTS.keys())
def test_policy_of_every_client_allows_a_whole_bundle(policy):
    verified(policy).check_bundle("my-bucket", "winami", now=NOW)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (document(BUCKET, {"acl": "ec2-bundle-read"}), extra("key")),
        (document(BUCKET, ["eq", "$key", "winami"]), failed('["eq", "$key", "winami"]')),
        (document(BUCKET, ["eq", "$key", "winami.part.0"]), failed('["eq", "$key", "winami.part.0"]')),
        (document(BUCKET, ["starts-with", "$key", "winami.part."]), failed('["starts-with", "$key", "winami.part."]')),
        (document(BUCKET, KEY, {"acl": "a"}, {"acl": "b"}), failed('["eq", "$acl", "b"]')),
        (
            document(BUCKET, KEY, expiration="2020-01-01T00:00:00Z"),
            EXPIRED,
        ),
    ],
    ids=["the PHP SDK's: no key", "the bare prefix", "one part", "parts only", "contradiction", "expired"],
)
def test_policy_that_allows_no_bundle_is_rejected_at_once(policy, expected):
    assert answer(lambda: verified(policy).check_bundle("my-bucket", "winami", now=NOW)) == expected


@pytest.mark.parametrize("beginning", ["", "w", "winami", "winami."])
@pytest.mark.parametrize("ending", [".part.0", ".part.00", ".part.9", ".part.123", ".manifest.xml", ".manifest.json"])
def test_policy_for_first_part_and_manifest_allows_the_whole_bundle(beginning, ending):
    policy = verified(document(BUCKET, ["starts-with", "$key", beginning]))
    policy.check_bundle("my-bucket", "winami", now=NOW)
    policy.check_upload("my-bucket", "winami" + ending, content_length=None, now=NOW)
