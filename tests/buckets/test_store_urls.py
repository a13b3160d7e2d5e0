"""The normal form of endpoints, and URLs: every spelling of an endpoint gives the same requests."""

import pytest
from pydantic import ValidationError

from support.buckets.upload_policies import verified
from support.servers.scripted_store import http, scripted
from thrave.buckets.errors import BucketError, InvalidArgument, InvalidBucketName, StoreSettingError
from thrave.buckets.s3_client import Proxy, StoreConfig
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.s3_store import KeyOwner, OwnerKeyStore
from thrave.config import Settings, normal_endpoint
from thrave.drivers import store_config

SPELLINGS = {
    "https://s3.example.com": "https://s3.example.com",
    "https://s3.example.com/": "https://s3.example.com",
    "https://s3.example.com///": "https://s3.example.com",
    "HTTPS://S3.Example.COM": "https://s3.example.com",
    "https://s3.example.com:443/": "https://s3.example.com",
    "https://s3.example.com:8443": "https://s3.example.com:8443",
    "https://s3.example.com:80": "https://s3.example.com:80",
    "http://s3.example.com:80": "http://s3.example.com",
    "http://s3.example.com:0080": "http://s3.example.com",
    " \thttps://s3.example.com\n": "https://s3.example.com",
    "https://s3.example.com.": "https://s3.example.com",
    "https://s3.example.com:": "https://s3.example.com",
    "http://127.0.0.1:8333/": "http://127.0.0.1:8333",
    "http://[::1]:8333": "http://[::1]:8333",
    "http://[0:0:0:0:0:0:0:1]:80/": "http://[::1]",
    "http://[2001:DB8::A]": "http://[2001:db8::a]",
    "https://bücher.example": "https://xn--bcher-kva.example",
    "http://minio_1:9000": "http://minio_1:9000",
}
NO_ENDPOINTS = [
    "", "/", "s3.example.com", "s3.example.com:443", "ftp://s3.example.com", "https://", "https:///bucket",
    "https://s3.example.com/path", "https://user@s3.example.com", "https://user:password@s3.example.com",
    "https://s3.example.com?x=1", "https://s3.example.com?", "https://s3.example.com/#x", "https://s3.example.com:0",
    "https://s3.example.com:65536", "https://s3.example.com:x", "https://s3 .example.com", "https://s3\n.example.com",
    "https://[::1", "https://[::g]", "https://s3..example.com", "https://-s3.example.com", "https://s3.example.com\0",
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_endpoint_has_one_normal_form_wherever_it_is_read(spelling):
    expected = SPELLINGS[spelling]
    assert normal_endpoint(spelling) == normal_endpoint(expected) == expected
    settings = Settings(store="s3", s3_endpoint=spelling)
    assert settings.s3_endpoint == store_config(settings).endpoint == expected
    assert StoreConfig(endpoint=spelling).endpoint == expected


@pytest.mark.parametrize("url", NO_ENDPOINTS)
def test_invalid_endpoint_is_rejected_without_repeating_it(url):
    with pytest.raises(ValueError, match=r"\w"):
        normal_endpoint(url)
    with pytest.raises(ValidationError, match="s3_endpoint") as caught:
        Settings(store="s3", s3_endpoint=url)
    assert "password" not in str(caught.value)
    with pytest.raises(StoreSettingError) as refused:
        StoreConfig(endpoint=url)
    assert "password" not in str(refused.value)


REQUESTS = {
    "object": (lambda objects: objects.get("my-bucket", "a/b c"), "GET /my-bucket/a/b%20c HTTP/1.1"),
    "HEAD": (lambda objects: objects.head("my-bucket", "key"), "HEAD /my-bucket/key HTTP/1.1"),
    "bucket": (lambda objects: objects.owner("my-bucket"), "HEAD /my-bucket HTTP/1.1"),
    "put": (lambda objects: objects.put("my-bucket", "key", b""), "PUT /my-bucket/key HTTP/1.1"),
    "form": (
        lambda objects: objects.put("my-bucket", "win1.part.0", b"", policy=verified()),
        "POST /my-bucket HTTP/1.1",
    ),
    "listing": (
        lambda objects: [*objects.list("my-bucket", "a b")],
        "GET /my-bucket?prefix=a%20b&max-keys=1000&list-type=2&encoding-type=url HTTP/1.1",
    ),
    "delete": (lambda objects: objects.delete("my-bucket", ["key"]), "POST /my-bucket?delete= HTTP/1.1"),
    "buckets": (lambda objects: objects._is_own("my-bucket"), "GET /?prefix=my-bucket HTTP/1.1"),
}


@pytest.mark.parametrize("spell", [str, "{}/".format, str.upper, " {}// ".format, lambda url: url + "//"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_every_request_goes_to_the_same_url_however_the_endpoint_is_spelled(request_, spell):
    call, line = REQUESTS[request_]
    with scripted(http(200, b"<a></a>", ETag='"d41d8cd98f00b204e9800998ecf8427e"')) as script:
        connection = StoreConfig(endpoint=spell(script.url))
        call(OwnerKeyStore(connection, {}.get, key_owner=KeyOwner("111111111111", None)))
    assert script.requests[0] == line


@pytest.mark.parametrize(
    ("endpoint", "bucket", "expected"),
    [
        ("https://s3.example.com", "my-bucket", "https://my-bucket.s3.example.com/key"),
        ("https://s3.example.com:8443/", "my-bucket", "https://my-bucket.s3.example.com:8443/key"),
        ("http://s3.example.com", "my.bucket", "http://my.bucket.s3.example.com/key"),
        (
            "https://s3.example.com",
            "my.bucket",
            "https://s3.example.com/my.bucket/key",
        ),
        ("https://s3.example.com", "My_Bucket", "https://s3.example.com/My_Bucket/key"),
        ("https://s3.example.com", "n" * 64, f"https://s3.example.com/{'n' * 64}/key"),
        ("http://s3.example.com", "my..bucket", "http://s3.example.com/my..bucket/key"),
        ("https://s3.example.com", "alias-s3alias", "https://alias-s3alias.s3.example.com/key"),
        ("http://127.0.0.1:8333", "my-bucket", "http://127.0.0.1:8333/my-bucket/key"),
        ("http://[::1]:8333", "my-bucket", "http://[::1]:8333/my-bucket/key"),
    ],
)
def test_bucket_is_part_of_the_host_name_only_if_possible(endpoint, bucket, expected):
    assert StoreConfig(endpoint=endpoint, addressing="virtual").url(bucket, "key") == expected


@pytest.mark.parametrize("bucket", ["My_Old_Bucket", "UPPER", "my..dots", "-a", "a:b", "x" * 255, "p-s3alias", "a%2fb"])
def test_existing_bucket_of_any_name_has_a_url(bucket):
    url = StoreConfig(endpoint="http://s3.example.com").url(bucket, "key")
    assert url == f"http://s3.example.com/{bucket.replace('%', '%25').replace(':', '%3A')}/key"


@pytest.mark.parametrize("bucket", ["", ".", "..", "a/b", "a b", "a\n", "a\0", "\x7f", "ä", "x" * 256, "\ud800"])
def test_bucket_name_that_fits_no_url_is_rejected_before_sending(bucket):
    with pytest.raises(InvalidBucketName):
        StoreConfig(endpoint="http://s3.example.com").url(bucket, "key")


@pytest.mark.parametrize("key", ["..", "a/../b", "./a", "x" * 1025])
def test_key_that_fits_no_url_is_rejected(key):
    with pytest.raises(InvalidArgument):
        StoreConfig(endpoint="http://s3.example.com").url("bucket", key)


@pytest.mark.parametrize(
    ("url", "address", "authorization"),
    [
        ("http://proxy:3128", "http://proxy:3128", None),
        ("proxy:3128", "http://proxy:3128", None),
        ("HTTP://Proxy:80/", "http://proxy", None),
        ("http://joe@proxy:3128", "http://proxy:3128", "Basic am9lOg=="),
        ("http://joe:p%40ss%20word@proxy:3128/", "http://proxy:3128", "Basic am9lOnBAc3Mgd29yZA=="),
        ("joe:a:b@[::1]:3128", "http://[::1]:3128", "Basic am9lOmE6Yg=="),
        ("http://j%C3%BCrgen:%C3%A4@proxy", "http://proxy", "Basic asO8cmdlbjrDpA=="),
        ("http://joe:a@b@proxy:3128", "http://proxy:3128", "Basic am9lOmFAYg=="),
    ],
)
def test_proxy_is_read_with_its_user_and_password(url, address, authorization):
    proxy = Proxy.parse(url)
    assert (proxy.url, proxy.authorization) == (address, authorization)
    assert authorization is None or authorization not in repr(proxy)


@pytest.mark.parametrize(
    "url",
    [
        "", "socks5://joe:hunter2@proxy", "http://joe:hunter2@", "http://joe:hunter2@p:x", "http://joe:12/hunter2@p",
        "http://joe:12#hunter2@proxy:80", "http://joe:12?hunter2@proxy",
    ],
)  # fmt: skip
def test_invalid_proxy_is_rejected_without_showing_its_password(url):
    with pytest.raises(BucketError) as caught:
        S3ObjectClient(StoreConfig(endpoint="http://s3.example.com", proxy=url))
    assert "hunter2" not in f"{caught.value} {caught.value!r}"
