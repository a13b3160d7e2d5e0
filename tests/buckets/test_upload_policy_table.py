"""The table of upload policies, checked by Thrave and by Ceph RGW."""

from datetime import UTC, datetime

import pytest

from support.buckets.policy_table import (
    BUCKET,
    CASES,
    DIFFERENT_ON_RGW,
    KEY,
    NO_POLICY,
    NO_POLICY_ON_RGW,
    V4_CASES,
)
from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET, encoded, signed_v2, signed_v4
from support.servers import stores
from thrave.buckets.errors import BucketError
from thrave.buckets.s3_client import HttpTransport
from thrave.buckets.s3_objects import S3ObjectClient, encode_form
from thrave.buckets.upload_policy import UploadPolicy

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = [
    *(pytest.param(case, signed_v2, id=case.name) for case in CASES),
    *(pytest.param(case, lambda text: signed_v4(text, date="20260101"), id=f"V4 {case.name}") for case in V4_CASES),
]


@pytest.fixture(scope="module")
def post(rgw):
    """A function that sends a form to RGW and returns the code of its response."""
    connection = rgw.connection(stores.ALICE)
    S3ObjectClient(connection)._requests.send("PUT", BUCKET)
    transport = HttpTransport(connection)

    def post(fields, size):
        kind, body = encode_form(fields, bytes(size))
        return answer(lambda: transport.send("POST", f"{rgw.url}/{BUCKET}", {"Content-Type": kind}, body, limit=4096))

    return post


def answer(call):
    try:
        call()
    except BucketError as error:
        return error.code
    return ""


@pytest.mark.parametrize(("case", "sign"), ROWS)
def test_policy_gives_the_result_of_s3(case, sign):
    text = encoded(case.policy)

    def check():
        policy = UploadPolicy.verify(text, sign(text), access_key_id=ACCESS_KEY_ID, secret=SECRET)
        policy.check(BUCKET, {"key": KEY, **(case.fields or {})}, content_length=case.size, now=NOW)

    assert answer(check) == case.answer


@pytest.mark.rgw
@pytest.mark.parametrize(("case", "sign"), ROWS)
def test_ceph_rgw_gives_the_same_result(post, case, sign):
    text = encoded(case.policy)
    signed = {"x-amz-signature": sign(text)}
    if sign is signed_v2:
        signed = {"AWSAccessKeyId": ACCESS_KEY_ID, "signature": sign(text)}
    code = post({"key": KEY, **(case.fields or {}), "policy": text, **signed}, case.size)
    if case.name in DIFFERENT_ON_RGW:
        assert code == DIFFERENT_ON_RGW[case.name], "RGW has changed: remove the row, or correct the reason"
    elif case.answer == NO_POLICY:
        assert code in NO_POLICY_ON_RGW
    else:
        assert code == case.answer


def test_table_is_long_and_its_names_are_distinct():
    names = [row.id for row in ROWS]
    assert len(names) == len(set(names)) >= 80
    assert set(names) > set(DIFFERENT_ON_RGW)
