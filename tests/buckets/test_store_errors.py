"""Errors of a store: who must act on each, retries, and stores that lack a feature."""

import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from support.servers.forward_proxy import forwarding
from support.servers.scripted_store import SILENCE, error, http, scripted
from thrave.buckets import retrying_store
from thrave.buckets.errors import (
    TABLE,
    BucketError,
    Kind,
    NoConnectionError,
    StoreError,
    StoreSettingError,
    TransientError,
    UnreachableError,
    WrongRegion,
    error_from_response,
    find_row,
)
from thrave.buckets.retrying_store import retry_store
from thrave.buckets.s3_client import Credentials, StoreConfig
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.s3_store import ServiceKeyStore
from thrave.config import Settings
from thrave.drivers import open_store, store_config

KEY = Credentials(access_key_id="AKIA", secret_access_key="secret")


def connection(url, **changes):
    return StoreConfig(**{"endpoint": url, "credentials": KEY, "timeout": 20.0, **changes})


def get(connection):
    return S3ObjectClient(connection).get("my-bucket", "key")


@pytest.mark.parametrize("status", range(300, 600))
@pytest.mark.parametrize("code", ["", "NoSuchCodeAtAll"])
def test_status_decides_if_the_code_is_unknown(status, code):
    made = error_from_response(code, status, "words")
    assert made.kind is find_row("", status).kind
    assert isinstance(made, TransientError) == (made.kind is Kind.TRANSIENT)
    assert made.code
    final_5xx = {501, 505, 506, 507, 508, 510, 511}
    assert (made.kind is Kind.TRANSIENT) == (
        (status >= 500 and status not in final_5xx) or status in {307, 408, 409, 421, 425, 429}
    )


@pytest.mark.parametrize("code", [key for key in TABLE if isinstance(key, str) and not key.endswith("xx")])
def test_code_decides_before_the_status(code):
    assert error_from_response(code, 400, "message").kind is TABLE[code].kind


@pytest.mark.parametrize(
    ("answer", "region", "endpoint"),
    [
        (
            http(301, b"<Error><Code>PermanentRedirect</Code><Endpoint>b.s3.eu-west-1.example</Endpoint></Error>",
                 x_amz_bucket_region="eu-west-1"),
            "eu-west-1", "b.s3.eu-west-1.example",
        ),
        (http(301, x_amz_bucket_region="eu-west-1"), "eu-west-1", None),
        (http(307, x_amz_bucket_region="eu-west-1"), "eu-west-1", None),
        (http(400, x_amz_bucket_region="eu-west-1"), "eu-west-1", None),
        (error(301, "PermanentRedirect"), None, None),
        (
            http(400, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"),
            "eu-west-1", None,
        ),
    ],
)  # fmt: skip
def test_other_region_is_named(answer, region, endpoint):
    with scripted(answer) as script, pytest.raises(WrongRegion) as caught:
        get(connection(script.url))
    assert (caught.value.region, caught.value.endpoint, caught.value.kind) == (region, endpoint, Kind.REGION)
    assert region is None or region in str(caught.value)


def test_redirect_of_another_server_names_no_region():
    answer = http(301, Location="https://user:hunter2@other.example/path?secret")
    with scripted(answer) as script, pytest.raises(StoreError, match=r"https://other\.example$") as caught:
        get(connection(script.url))
    assert caught.value.kind is Kind.SETTING


# Invalid responses, in every place that is parsed

ENCODINGS = ["gb2312", "no-such-encoding", "shift_jis", "utf-7"]


@pytest.mark.parametrize("location", ["http://[x/", "//[", "http://[::1", "", "\xff"])
def test_redirect_to_a_broken_url_is_an_error_of_the_setting(location):
    with scripted(http(302, Location=location)) as script, pytest.raises(StoreError) as caught:
        get(connection(script.url))
    assert caught.value.kind is Kind.SETTING


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_error_document_of_an_unknown_encoding_is_judged_by_its_status(encoding):
    page = f'<?xml version="1.0" encoding="{encoding}"?><html/>'.encode()
    with scripted(http(503, page)) as script, pytest.raises(TransientError) as caught:
        get(connection(script.url))
    assert caught.value.code == "SlowDown"


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16"])
def test_listing_in_unknown_encoding_is_rejected(encoding):
    page = f'<?xml version="1.0" encoding="{encoding}"?><html/>'.encode()
    with scripted(http(200, page)) as script, pytest.raises(StoreError):
        [*S3ObjectClient(connection(script.url)).list("my-bucket", "")]


def test_content_length_with_too_many_digits_is_an_error_of_the_store():
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\nConnection: close\r\n\r\n"
    with scripted(answer) as script, pytest.raises(BucketError):
        S3ObjectClient(connection(script.url)).head("my-bucket", "key")


@pytest.mark.parametrize("status", [411, 413, 414, 426, 431])
def test_refusal_of_an_intermediate_server_is_reported_to_the_operator(status):
    with scripted(http(status, b"<html>nginx</html>")) as script, pytest.raises(StoreError) as caught:
        get(connection(script.url))
    assert caught.value.is_store_failure
    assert caught.value.remedy


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return closed.getsockname()[1]


def test_refused_connection_and_unknown_host_are_unreachable():
    with pytest.raises(UnreachableError, match=r"Cannot connect to the store 127\.0\.0\.1:\d+: Connection refused"):
        get(connection(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(UnreachableError, match=r"host name of the store no-such-host\.invalid does not resolve"):
        get(connection("http://no-such-host.invalid"))


def test_server_that_sends_nothing_is_a_missing_response():
    with scripted(SILENCE) as script, pytest.raises(TransientError, match="No byte sent to or received from") as caught:
        get(connection(script.url, timeout=0.2))
    assert not isinstance(caught.value, UnreachableError)


@pytest.mark.parametrize("scheme", ["http", "https"])
class TestProxy:
    AUTHORIZATION = "Basic am9lOnJpZ2h0"

    def error_through(self, proxy, scheme):
        url = proxy.url.replace("//", "//joe:hunter2@")
        with pytest.raises(BucketError) as caught:
            get(connection(f"{scheme}://store.example:9", proxy=url))
        assert proxy.url.removeprefix("http://") in str(caught.value)
        assert "hunter2" not in f"{caught.value} {caught.value!r}"
        return caught.value

    def test_proxy_that_requires_another_password_is_named(self, scheme):
        with forwarding(self.AUTHORIZATION) as proxy:
            error = self.error_through(proxy, scheme)
        assert (error.code, error.kind) == ("ProxyAuthenticationRequired", Kind.SETTING)

    def test_proxy_that_refuses_the_request_is_named(self, scheme):
        with forwarding(self.AUTHORIZATION, refusal=403) as proxy:
            error = self.error_through(proxy, scheme)
        assert (error.code, error.kind) == ("ProxyRefused", Kind.SETTING)

    def test_missing_proxy_is_named(self, scheme):
        proxy = SimpleNamespace(url=f"http://127.0.0.1:{free_port()}")
        assert isinstance(self.error_through(proxy, scheme), UnreachableError)

    def test_proxy_that_does_not_resolve_is_named(self, scheme):
        assert isinstance(
            self.error_through(SimpleNamespace(url="http://no-such-host.invalid"), scheme), UnreachableError
        )


def first_pause(headers, pauses, timeout=100.0, **options):
    failure = TransientError("SlowDown", 503, "message")
    failure.headers = headers
    failures = [failure]

    def call():
        if failures:
            raise failures.pop()
        return "done"

    assert retry_store(call, timeout, lambda *_: None, **options) == "done"
    return pauses[0]


def test_retry_after_is_obeyed_within_the_timeout(pauses):
    answers = [http(503, Retry_After="30"), http(429, retry_after="7"), http(200)]
    with scripted(*answers) as script:
        retry_store(lambda: get(connection(script.url)), 100.0, lambda *_: None)
    assert pauses == [30, 7]


@pytest.mark.parametrize("text", ["3600", "999999999"])
def test_retry_after_beyond_the_timeout_waits_the_remaining_time(pauses, text):
    assert first_pause({"Retry-After": text}, pauses) == 100


@pytest.mark.parametrize("text", ["", "-5", "soon", "1e9", "9" * 400, "Mon, 01 Jan 2001 00:00:00 GMT", "nan",
                                  "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"])  # fmt: skip
def test_invalid_retry_after_is_ignored(pauses, text):
    assert first_pause({"Retry-After": text}, pauses) < 1


def test_retry_after_may_be_a_date(pauses):
    retry_at = datetime.now(UTC) + timedelta(seconds=50)
    assert 30 < first_pause({"Retry-After": format_datetime(retry_at, usegmt=True)}, pauses) <= 50


def test_unreachable_server_is_retried_as_often_as_requested(pauses):
    attempts = []

    def call():
        attempts.append(1)
        raise UnreachableError("ConnectionRefused", 0, "message")

    with pytest.raises(UnreachableError):
        retry_store(call, 100.0, lambda *_: None, unreachable_attempts=2)
    assert len(attempts) == 2


class CheckFailedError(Exception):
    pass


@pytest.mark.parametrize("ends", ["a connection is free", "the store fails", "the check fails"])
def test_wait_for_a_free_connection_does_not_count_toward_the_timeout(monkeypatch, ends):
    """Each wait is longer than the timeout. A check, such as a task's monitor, can end the wait."""
    clock = [1.0]
    monkeypatch.setattr(retrying_store, "sleep", lambda _: None)
    monkeypatch.setattr(retrying_store, "monotonic", lambda: clock[0])
    failures = [NoConnectionError("NoConnection", 0, "message") for _ in range(9)]
    failures.insert(4, TransientError("SlowDown", 503, "message"))

    def call():
        if failures:
            error = failures.pop()
            clock[0] += 300 if isinstance(error, NoConnectionError) else 1
            raise error
        if ends == "the store fails":
            clock[0] += 60
            raise TransientError("SlowDown", 503, "message")
        return "done"

    def check():
        if ends == "the check fails" and len(failures) == 5:
            raise CheckFailedError

    if ends == "a connection is free":
        assert retry_store(call, 100.0, lambda *_: None, before_attempt=check) == "done"
    else:
        with pytest.raises(TransientError if ends == "the store fails" else CheckFailedError):
            retry_store(call, 100.0, lambda *_: None, before_attempt=check)


@pytest.mark.parametrize(("timeout", "options"), [(5.0, {}), (0.0, {"before_attempt": lambda: None})])
def test_wait_for_a_free_connection_has_its_own_limit(monkeypatch, timeout, options):
    clock = iter(range(0, 9000, 300))
    monkeypatch.setattr(retrying_store, "sleep", lambda _: None)
    monkeypatch.setattr(retrying_store, "monotonic", lambda: next(clock))

    def call():
        raise NoConnectionError("NoConnection", 0, "message")

    with pytest.raises(NoConnectionError):
        retry_store(call, timeout, lambda *_: None, **options)


# Optional features of S3

LACKING = [error(501, "NotImplemented"), error(405, "MethodNotAllowed"), error(400, "InvalidArgument")]
DIGEST = '"9a0364b9e99bb480dd25e1f0284c8555"'  # of b"content"


def listing(*keys, more=""):
    listed = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
    return http(200, f"<ListBucketResult>{more}{listed}</ListBucketResult>".encode())


@pytest.mark.parametrize("lack", LACKING)
def test_store_without_multi_object_delete_is_supported(lack):
    with scripted(lack, http(204)) as script:
        S3ObjectClient(connection(script.url)).delete("my-bucket", ["a", "b"])
    assert [line.split()[0] for line in script.requests] == ["POST", "DELETE", "DELETE"]


@pytest.mark.parametrize("lack", LACKING)
def test_store_without_list_version_2_is_supported(lack):
    truncated = "<IsTruncated>true</IsTruncated>"
    with scripted(lack, lack, listing("a", "b", more=truncated), listing("c")) as script:
        assert [*S3ObjectClient(connection(script.url)).list("my-bucket", "")] == ["a", "b", "c"]
    assert "list-type" not in script.requests[2]
    assert "marker=b" in script.requests[3]


def test_listing_that_ignores_the_prefix_returns_no_other_keys():
    with scripted(listing("a", "win.part.0", "z")) as script:
        assert [*S3ObjectClient(connection(script.url)).list("my-bucket", "win")] == ["win.part.0"]


@pytest.mark.parametrize("pages", [[listing(more="<IsTruncated>true</IsTruncated>")],
                                   [listing("a", more="<IsTruncated>true</IsTruncated>")],
                                   [listing(str(number % 3), more="<IsTruncated>true</IsTruncated>")
                                    for number in range(9)]])  # fmt: skip
def test_listing_that_never_ends_is_an_error(pages):
    with scripted(*pages) as script, pytest.raises(StoreError, match="listing"):
        [*S3ObjectClient(connection(script.url)).list("my-bucket", "")]


@pytest.mark.parametrize(
    "answers", [[http(200, b"0123456789")], [error(501, "NotImplemented"), http(200, b"0123456789")]]
)
def test_store_without_ranges_is_supported(answers):
    with scripted(*answers) as script:
        assert S3ObjectClient(connection(script.url)).get_range("my-bucket", "key", 3, 4) == b"3456"


def test_store_without_content_md5_is_supported():
    with scripted(error(501, "NotImplemented"), http(200, ETag=DIGEST)) as script:
        S3ObjectClient(connection(script.url)).put("my-bucket", "key", b"content")
    assert len(script.requests) == 2


OWNER = "111111111111"


def test_store_without_conditional_writes_is_supported():
    answers = [
        error(404, "NoSuchBucket"), http(200), error(404, "NoSuchKey"), listing(), error(501, "NotImplemented"),
        error(404, "NoSuchKey"), http(200), http(200, f"{OWNER}\n".encode()),
    ]  # fmt: skip
    with scripted(*answers) as script:
        assert ServiceKeyStore(connection(script.url)).create("my-bucket", OWNER) is True
    assert [line.split()[0] for line in script.requests] == ["GET", "PUT", "GET", "GET", "PUT", "GET", "PUT", "GET"]


def test_create_with_refused_owner_leaves_no_bucket():
    answers = [error(404, "NoSuchBucket"), http(200), error(404, "NoSuchKey"), listing(), error(403, "QuotaExceeded"),
               http(204)]  # fmt: skip
    with scripted(*answers) as script, pytest.raises(StoreError, match="QuotaExceeded"):
        ServiceKeyStore(connection(script.url)).create("my-bucket", OWNER)
    assert script.requests[-1].startswith("DELETE /my-bucket ")


def test_store_that_rejects_a_create_bucket_body_is_supported():
    answers = [error(404, "NoSuchBucket"), error(400, "MalformedXML"), http(200), http(200, f"{OWNER}\n".encode())]
    with scripted(*answers) as script:
        ServiceKeyStore(connection(script.url, region="eu-west-1")).create("my-bucket", OWNER)
    assert [line.split()[0] for line in script.requests] == ["GET", "PUT", "PUT", "GET"]


# The service's credentials


def written(path, name):
    path.touch(mode=0o600)
    path.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = secret\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "credentials", "AKIAFIRST")


DAMAGE = [lambda path: path.unlink(), lambda path: path.chmod(0o644), lambda path: path.write_text("")]


def key_of(settings):
    return settings.current_credentials().access_key_id


def test_changed_credentials_take_effect_without_a_restart(file, tmp_path):
    connection = store_config(Settings(store="s3", s3_credentials_file=file))
    assert key_of(connection) == "AKIAFIRST"
    written(file, "AKIASECOND")
    assert key_of(connection) == "AKIASECOND"
    written(tmp_path / "new", "AKIATHIRD").replace(file)  # as an editor does
    assert key_of(connection) == "AKIATHIRD"


def test_changed_credentials_sign_the_next_request_of_an_open_store(file):
    settings = Settings(
        store="s3", upload_credentials="service", s3_credentials_file=file, s3_endpoint="http://127.0.0.1:1"
    )
    buckets, signed = open_store(settings, lambda _: None), []
    buckets._transport.send = lambda _method, _url, headers, *_, **__: signed.append(headers["Authorization"])
    for name in ("AKIAFIRST", "AKIASECOND"):
        written(file, name)
        with pytest.raises(AttributeError):  # the fake response is None
            buckets._requests.send("GET", "my-bucket")
    assert ["AKIAFIRST" in signed[0], "AKIASECOND" in signed[1]] == [True, True]


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.chmod(0o644), lambda path: path.write_text("")]
)
def test_unusable_changed_credentials_leave_the_earlier_in_use(file, damage):
    connection = store_config(Settings(store="s3", s3_credentials_file=file))
    damage(file)
    assert key_of(connection) == "AKIAFIRST"
    file.unlink(missing_ok=True)
    written(file, "AKIASECOND")
    assert key_of(connection) == "AKIASECOND"


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.chmod(0o644), lambda path: path.write_text("")]
)
def test_unusable_credentials_error_names_the_setting_and_no_s3_code(file, damage):
    damage(file)
    with pytest.raises(StoreSettingError, match=r"^The setting s3_credentials_file cannot be used: ") as caught:
        store_config(Settings(store="s3", s3_credentials_file=file))
    assert str(file) in str(caught.value)
    assert not any(word in str(caught.value) for word in ("(400)", "Errno"))
