"""Authentication of requests that botocore signed: valid ones, and each with one defect that a server must detect."""

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hashlib import sha256
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from botocore.auth import SigV2Auth, SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from thrave.ec2.authentication import Ec2Request, authenticate
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import ProtocolError
from thrave.identity.accounts import AccessKey, KeyCache

FORM = "application/x-www-form-urlencoded; charset=utf-8"
HOST = "127.0.0.1:8773"
BODY = b"Action=DescribeBundleTasks&Version=2016-11-15&Filter.1.Name=state&Filter.1.Value.1=%2A"
KEY = AccessKey(
    access_key_id="AKIDEXAMPLE",
    secret_access_key="wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    account_id="123456789012",
    status="Active",
    create_date=datetime(2026, 1, 1, tzinfo=UTC),
)
INACTIVE = replace(KEY, access_key_id="AKIDINACTIVE", status="Inactive")
KEYS = {key.access_key_id: key for key in (KEY, INACTIVE)}


def received(aws_request, body=b""):
    """What arrives of a request that botocore has signed."""
    url = urlsplit(aws_request.url)
    headers = {"host": url.netloc, **{name.lower(): value for name, value in aws_request.headers.items()}}
    return Ec2Request(aws_request.method, url.path, url.query.encode(), tuple(headers.items()), body)


def header_signed(*, key=KEY, region="us-east-1", service="ec2", body=BODY, url=f"http://{HOST}/", **headers):
    request = AWSRequest("POST", url, data=body, headers={"Content-Type": FORM, **headers})
    SigV4Auth(Credentials(key.access_key_id, key.secret_access_key), service, region).add_auth(request)
    return received(request, body)


def presigned(*, key=KEY, expires=3600, extra=""):
    request = AWSRequest("GET", f"http://{HOST}/?{BODY.decode()}{extra}")
    SigV4QueryAuth(Credentials(key.access_key_id, key.secret_access_key), "ec2", "us-east-1", expires).add_auth(request)
    return received(request)


def v2_signed(*, key=KEY, host=HOST, sign_host=None, method="POST", **changes):
    form = {
        "Action": "DescribeBundleTasks",
        "Filter.1.Value.1": "a b*~/日",
        "AWSAccessKeyId": key.access_key_id,
        "SignatureVersion": "2",
        "SignatureMethod": "HmacSHA256",
        "Timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z",
        **changes,
    }
    form = {name: value for name, value in form.items() if value is not None}
    signer = SigV2Auth(Credentials(key.access_key_id, key.secret_access_key))
    form["Signature"] = signer.calc_signature(AWSRequest(method, f"http://{sign_host or host}/"), form)[1]
    encoded = urlencode(form).encode()
    query, body = (b"", encoded) if method == "POST" else (encoded, b"")
    return Ec2Request(method, "/", query, (("host", host),), body)


def with_header(request, name, value):
    """The request with a header set, or removed (None)."""
    others = [(each, old) for each, old in request.headers if each != name]
    return replace(request, headers=tuple(others if value is None else [*others, (name, value)]))


def with_authorization(request, *edits):
    authorization = request.header("authorization")
    for old, new in edits:
        assert old in authorization
        authorization = authorization.replace(old, new)
    return with_header(request, "authorization", authorization)


def with_query(request, **changes):
    form = {name: value for name, (value,) in parse_qs(request.query.decode()).items()}
    form.update({name.replace("_", "-"): value for name, value in changes.items()})
    return replace(
        request, query=urlencode({name: value for name, value in form.items() if value is not None}).encode()
    )


def verdict(request, *, later=timedelta()):
    """The code of the refusal, or the account that has signed."""
    try:
        return authenticate(request, KEYS.get, KeyCache(), datetime.now(UTC) + later).account_id
    except EC2Error as error:
        return error.code


# How clients sign, each in its way.
QUIRKS = {
    "boto 2: no space after commas": lambda: with_authorization(header_signed(), (", ", ",")),
    "spaces in SignedHeaders": lambda: with_authorization(
        header_signed(), ("content-type;host;x-amz-date", "content-type; host; x-amz-date")
    ),
    "SignedHeaders in another order": lambda: with_authorization(
        header_signed(), ("content-type;host;x-amz-date", "X-Amz-Date;host;content-type")
    ),
    "boto 2: region and service guessed from the host": lambda: header_signed(region="0", service="127"),
    "Ruby SDK: Host without port": lambda: header_signed(url="http://127.0.0.1/"),
    "Net::Amazon::EC2: Host signed without the port": lambda: with_header(
        header_signed(url="http://127.0.0.1/"), "host", HOST
    ),
    "JavaScript SDK: the body's digest as a header": lambda: header_signed(
        **{"X-Amz-Content-SHA256": sha256(BODY).hexdigest()}
    ),
    "a header that was not signed is added on the way": lambda: with_header(header_signed(), "user-agent", "a proxy's"),
    "Date instead of X-Amz-Date": lambda: header_signed(Date="Mon, 01 Jan 2001 00:00:00 GMT"),
    "presigned URL": presigned,
    "presigned URL, with parameters of like names": lambda: presigned(extra="&Date=x&Expires=x"),
    "presigned URL, encoded again on the way": lambda: with_query(presigned()),
    "version 2, POST": v2_signed,
    "version 2, GET": lambda: v2_signed(method="GET"),
    "version 2, Host signed without the port": lambda: v2_signed(sign_host="127.0.0.1"),
    "version 2, Host in capitals": lambda: v2_signed(host="LOCALHOST:8773", sign_host="localhost:8773"),
    "version 2, Timestamp without fraction": lambda: v2_signed(
        Timestamp=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ),
    "version 2, Expires": lambda: v2_signed(
        Timestamp=None, Expires=(datetime.now(UTC) + timedelta(hours=1)).isoformat()
    ),
}


@pytest.mark.parametrize("client", QUIRKS)
def test_authenticate_accepts_valid_signatures_of_all_clients(client):
    assert verdict(QUIRKS[client]()) == KEY.account_id


def other_key(**changes):
    return replace(KEY, **changes)


INVALID_REQUESTS = {
    "no credentials": (lambda: Ec2Request("GET", "/", b"Action=x", (("host", HOST),), b""), "MissingParameter"),
    # Version 4 in the header
    "unknown key": (lambda: header_signed(key=other_key(access_key_id="AKIDNOBODY")), "AuthFailure"),
    "inactive key": (lambda: header_signed(key=INACTIVE), "AuthFailure"),
    "wrong secret": (lambda: header_signed(key=other_key(secret_access_key="x" * 40)), "AuthFailure"),
    "body changed": (lambda: replace(header_signed(), body=BODY.replace(b"state", b"stage")), "AuthFailure"),
    "body changed under a signed digest": (
        lambda: replace(
            header_signed(**{"X-Amz-Content-SHA256": sha256(BODY).hexdigest()}), body=BODY + b"&DryRun=true"
        ),
        "AuthFailure",
    ),
    "body left unsigned": (lambda: header_signed(**{"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"}), "AuthFailure"),
    "query added": (lambda: replace(header_signed(), query=b"DryRun=true"), "AuthFailure"),
    "method changed": (lambda: replace(header_signed(), method="GET"), "AuthFailure"),
    "path changed": (lambda: replace(header_signed(), path="/x"), "AuthFailure"),
    "host changed": (lambda: with_header(header_signed(), "host", "elsewhere"), "AuthFailure"),
    "signed header dropped": (lambda: with_header(header_signed(), "content-type", None), "AuthFailure"),
    "region changed": (lambda: with_authorization(header_signed(), ("us-east-1", "us-west-1")), "AuthFailure"),
    "scope of another date": (
        lambda: with_authorization(header_signed(), (f"/{datetime.now(UTC):%Y%m%d}/", "/20010101/")),
        "AuthFailure",
    ),
    "signature not ASCII": (lambda: with_authorization(header_signed(), ("Signature=", "Signature=é")), "AuthFailure"),
    "host not signed": (lambda: with_authorization(header_signed(), (";host", "")), "IncompleteSignature"),
    "no date": (lambda: with_header(header_signed(), "x-amz-date", None), "IncompleteSignature"),
    "date not a date": (
        lambda: with_header(header_signed(), "x-amz-date", f"{datetime.now(UTC):%Y%m%d}T996161Z"),
        "IncompleteSignature",
    ),
    "date in words": (lambda: with_header(header_signed(), "x-amz-date", "today"), "IncompleteSignature"),
    "another scheme": (lambda: with_header(header_signed(), "authorization", "Basic eDp5"), "IncompleteSignature"),
    "empty authorization": (lambda: with_header(header_signed(), "authorization", ""), "IncompleteSignature"),
    "no credential": (
        lambda: with_authorization(header_signed(), ("Credential=", "Cred=")),
        "IncompleteSignature",
    ),
    "short credential": (
        lambda: with_authorization(header_signed(), ("/us-east-1/ec2/", "/ec2/")),
        "IncompleteSignature",
    ),
    "scope of another kind": (
        lambda: with_authorization(header_signed(), ("aws4_request", "aws5_request")),
        "IncompleteSignature",
    ),
    "session token": (lambda: with_header(header_signed(), "x-amz-security-token", "t"), "IncompleteSignature"),
    "two methods": (
        lambda: replace(header_signed(), query=b"AWSAccessKeyId=AKIDEXAMPLE"),
        "IncompleteSignature",
    ),
    # Version 4 in the query string
    "presigned by an unknown key": (lambda: presigned(key=other_key(access_key_id="AKIDNOBODY")), "AuthFailure"),
    "presigned by a wrong secret": (lambda: presigned(key=other_key(secret_access_key="x" * 40)), "AuthFailure"),
    "presigned, action changed": (lambda: with_query(presigned(), Action="CancelBundleTask"), "AuthFailure"),
    "presigned, life lengthened": (lambda: with_query(presigned(), X_Amz_Expires="3601"), "AuthFailure"),
    "presigned, body added": (lambda: replace(presigned(), body=b"DryRun=true"), "AuthFailure"),
    "presigned, life too long": (lambda: presigned(expires=604801), "IncompleteSignature"),
    "presigned, no life": (lambda: presigned(expires=0), "IncompleteSignature"),
    "presigned, life not a number": (lambda: presigned(expires="٣"), "IncompleteSignature"),
    "presigned, no signature": (lambda: with_query(presigned(), X_Amz_Signature=None), "IncompleteSignature"),
    "presigned, another algorithm": (
        lambda: with_query(presigned(), X_Amz_Algorithm="AWS4-HMAC-SHA1"),
        "IncompleteSignature",
    ),
    # Version 2
    "v2, unknown key": (lambda: v2_signed(key=other_key(access_key_id="AKIDNOBODY")), "AuthFailure"),
    "v2, wrong secret": (lambda: v2_signed(key=other_key(secret_access_key="x" * 40)), "AuthFailure"),
    "v2, parameter added": (lambda: replace(v2_signed(), query=b"DryRun=true"), "AuthFailure"),
    "v2, host changed": (lambda: with_header(v2_signed(), "host", "elsewhere:8773"), "AuthFailure"),
    "v2, method changed": (lambda: replace(v2_signed(), method="GET"), "AuthFailure"),
    "v2, no host": (lambda: with_header(v2_signed(), "host", None), "IncompleteSignature"),
    "v2, host not a name": (lambda: with_header(v2_signed(), "host", "[::1"), "IncompleteSignature"),
    "v2, HmacSHA1": (lambda: v2_signed(SignatureMethod="HmacSHA1"), "InvalidParameterValue"),
    "v1": (lambda: v2_signed(SignatureVersion="1"), "InvalidParameterValue"),
    "v2, no method": (lambda: v2_signed(SignatureMethod=None), "MissingParameter"),
    "v2, no time": (lambda: v2_signed(Timestamp=None), "IncompleteSignature"),
    "v2, two times": (lambda: v2_signed(Expires="2030-01-01T00:00:00Z"), "IncompleteSignature"),
    "v2, time not a time": (lambda: v2_signed(Timestamp="now"), "InvalidParameterValue"),
    "v2, expired": (lambda: v2_signed(Timestamp=None, Expires="2020-01-01T00:00:00Z"), "RequestExpired"),
    "v2, expires never": (lambda: v2_signed(Timestamp=None, Expires="9999-01-01T00:00:00Z"), "RequestExpired"),
}


@pytest.mark.parametrize("case", INVALID_REQUESTS)
def test_authenticate_rejects_invalid_requests(case):
    request, code = INVALID_REQUESTS[case]
    assert verdict(request()) == code


@pytest.mark.parametrize(
    ("request_of", "later", "expected"),
    [
        (header_signed, timedelta(minutes=14), KEY.account_id),
        (header_signed, timedelta(minutes=-14), KEY.account_id),
        (header_signed, timedelta(minutes=16), "RequestExpired"),
        (header_signed, timedelta(minutes=-16), "RequestExpired"),
        (v2_signed, timedelta(minutes=14), KEY.account_id),
        (v2_signed, timedelta(minutes=16), "RequestExpired"),
        (v2_signed, timedelta(minutes=-16), "RequestExpired"),
        (presigned, timedelta(minutes=59), KEY.account_id),
        (presigned, timedelta(minutes=61), "RequestExpired"),
        (presigned, timedelta(minutes=-16), "RequestExpired"),
    ],
)
def test_authenticate_checks_the_age_of_a_request(request_of, later, expected):
    assert verdict(request_of(), later=later) == expected


def test_authenticate_does_the_same_work_for_unknown_key_and_wrong_signature(monkeypatch):
    """The canonical request is built once; each of the two forms of the host costs one HMAC per secret."""
    signed_with, canonical, responses = [], [], []
    signature, canonical_request = SigV4Auth.signature, SigV4Auth.canonical_request
    monkeypatch.setattr(
        SigV4Auth, "signature", lambda self, *args: signed_with.append(self.credentials) or signature(self, *args)
    )
    monkeypatch.setattr(
        SigV4Auth, "canonical_request", lambda self, *args: canonical.append(1) or canonical_request(self, *args)
    )
    key_cache = KeyCache()
    authenticate(header_signed(), KEYS.get, key_cache, datetime.now(UTC))
    for wrong in (other_key(access_key_id="AKIDNOBODY"), other_key(secret_access_key="x" * 40), INACTIVE):
        request = header_signed(key=wrong)
        signed_with.clear()
        canonical.clear()
        with pytest.raises(EC2Error) as refusal:
            authenticate(request, KEYS.get, key_cache, datetime.now(UTC))
        work = (len(canonical), len(signed_with))
        responses.append((refusal.value.status, refusal.value.code, refusal.value.message, work))
    assert (
        responses == [(401, "AuthFailure", "AWS was not able to validate the provided access credentials", (1, 4))] * 3
    )


def test_authenticate_uses_the_cache_for_a_recent_key():
    lookups, key_cache = [], KeyCache()
    for _ in range(3):
        authenticate(header_signed(), lambda name: lookups.append(name) or KEYS[name], key_cache, datetime.now(UTC))
    assert lookups == [KEY.access_key_id]


def test_authenticate_caches_only_keys_with_a_valid_signature():
    key_cache = KeyCache()
    for wrong in (other_key(access_key_id="AKIDNOBODY"), other_key(secret_access_key="x" * 40), INACTIVE):
        with pytest.raises(EC2Error):
            authenticate(header_signed(key=wrong), KEYS.get, key_cache, datetime.now(UTC))
        assert key_cache.find(wrong.access_key_id) is None


def test_authenticate_reads_an_http_date():
    request = AWSRequest("POST", f"http://{HOST}/", data=BODY, headers={"Date": "to be replaced"})
    SigV4Auth(Credentials(KEY.access_key_id, KEY.secret_access_key), "ec2", "us-east-1").add_auth(request)
    stale = with_header(received(request, BODY), "date", format_datetime(datetime.now(UTC) - timedelta(hours=1)))
    assert verdict(stale) in {"AuthFailure", "RequestExpired"}


@given(
    st.sampled_from(["AWS4-HMAC-SHA256 ", "AWS4-HMAC-SHA256", "AWS ", ""]),
    st.lists(
        st.sampled_from(["Credential=", "SignedHeaders=", "Signature=", "host", "AKIDEXAMPLE", "/", ",", ";", "é"])
    ),
)
def test_random_authorization_headers_get_an_ec2_error(scheme, parts):
    request = with_header(header_signed(), "authorization", scheme + "".join(parts))
    assert verdict(request) in {"IncompleteSignature", "AuthFailure"}


@given(st.binary(max_size=60), st.text(max_size=20), st.binary(max_size=60))
def test_random_requests_get_an_ec2_error(query, host, body):
    request = Ec2Request("POST", "/", b"AWSAccessKeyId=x&Signature=x&" + query, (("host", host),), body)
    with suppress(ProtocolError):
        assert verdict(request) in {"MissingParameter", "IncompleteSignature"}


def test_repr_of_a_request_has_no_signature():
    assert "Signature" not in repr(header_signed())
    assert "wJalr" not in repr(KEY)
