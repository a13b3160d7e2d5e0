"""Any form of an authenticated caller gets a response or an EC2 error, and nothing else."""

from contextlib import suppress
from urllib.parse import urlencode

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.buckets.s3_storage import storage
from thrave.ec2.actions import ACTIONS
from thrave.ec2.app import authenticate_request, handle_request
from thrave.ec2.authentication import Ec2Request
from thrave.ec2.errors import EC2Error

INSTANCE = "i-12345678"

names = st.sampled_from(
    ["InstanceId", "BundleId", "BundleId.1", "InstanceId.1", "Filter.1.Name", "Filter.1.Value.1", "Filter.2.Value"]
    + [
        "MaxResults",
        "NextToken",
        "DryRun",
        "Storage",
        "Storage.S3",
        "RegionName",
        "ZoneId.1",
        "AttributeName.1",
        "Force",
    ]
    + [f"Storage.S3.{name}" for name in ("Bucket", "Prefix", "UploadPolicy", "UploadPolicySignature", "AWSAccessKeyId")]
) | st.text(max_size=10)
values = st.sampled_from(
    [INSTANCE, "state", "launch-time", "*", "\\", "5", "aS0w", "W10=", "AKIDNOBODY", "true"]
) | st.text(max_size=20)


def sent_by(key, form):
    """A request with a form, signed."""
    body = urlencode(form, errors="surrogatepass").encode()
    request = AWSRequest("POST", "http://localhost/", data=body)
    SigV4Auth(Credentials(key.access_key_id, key.secret_access_key), "ec2", "us-east-1").add_auth(request)
    headers = {"host": "localhost", **{name.lower(): value for name, value in request.headers.items()}}
    return Ec2Request("POST", "/", b"", tuple(headers.items()), body)


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_random_forms_get_responses_or_ec2_errors(service, action):
    service.add_instance(INSTANCE)
    s3 = storage(service.key)["S3"] | {"UploadPolicy": "e30="}
    whole = {"InstanceId": INSTANCE, **{f"Storage.S3.{name}": value for name, value in s3.items()}}
    base = st.sampled_from([whole, {}]) if action == "BundleInstance" else st.just({})

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(base, st.dictionaries(names, values, max_size=4))
    def check(base, changes):
        form = {**base, **changes, "Action": action, "Version": ACTIONS[action].service.newest_version}
        with suppress(EC2Error):
            request = sent_by(service.key, form)
            assert handle_request(
                service.backend, request, authenticate_request(service.backend, request, "an-id"), "an-id"
            ).startswith(b"<?xml")

    check()
