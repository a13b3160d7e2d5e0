"""Failures of a store: each gives a clear error without a secret, and a retry where it can help."""

import hashlib
import socket
import threading

import pytest

from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET, verified
from support.servers.scripted_store import SILENCE, error, http, scripted
from thrave.buckets import retrying_store, s3_client
from thrave.buckets.errors import (
    AccessDenied,
    BucketAlreadyExists,
    BucketError,
    InvalidArgument,
    NoSuchBucket,
    StoreError,
    TransientError,
    UnreachableError,
)
from thrave.buckets.retrying_store import RetryingStore
from thrave.buckets.s3_client import Credentials, HttpTransport, StoreConfig
from thrave.buckets.s3_objects import MAX_OBJECT, S3ObjectClient
from thrave.buckets.s3_store import ServiceKeyStore

TOKEN = "a-session-token"
KEY = Credentials(access_key_id=ACCESS_KEY_ID, secret_access_key=SECRET, session_token=TOKEN)
DATA = b"content"
ETAG = f'"{hashlib.md5(DATA).hexdigest()}"'
OTHER_ETAG = f'"{hashlib.md5(b"other").hexdigest()}"'


def connection(script, **changes):
    return StoreConfig(**{"endpoint": script.url, "credentials": KEY, "timeout": 0.4, **changes})


def put(objects):
    return objects.put("my-bucket", "win1.part.0", DATA)


def post(objects):
    return objects.put("my-bucket", "win1.part.0", DATA, policy=verified())


def head(objects):
    return objects.head("my-bucket", "win1.part.0")


def get(objects):
    return objects.get("my-bucket", "win1.part.0")


def get_range(objects):
    return objects.get_range("my-bucket", "win1.part.0", 0, 4)


def listing(objects):
    return [*objects.list("my-bucket", "win1")]


def delete(objects):
    return objects.delete("my-bucket", ["win1.part.0"])


EVERY_REQUEST = [put, post, head, get, get_range, listing, delete]
FAULTS = {
    "500": error(500, "InternalError"),
    "502 of a proxy": http(502, b"<html>Bad Gateway</html>"),
    "503 SlowDown": error(503, "SlowDown"),
    "503 without content": http(503),
    "504": http(504),
    "429": http(429),
    "408": error(408, "RequestTimeout"),
    "307": http(307, Location="http://127.0.0.1:1/"),
    "409 with a parallel request": error(409, "OperationAborted"),
    "closed without a response": b"\r\n",
    "closed within the headers": b"HTTP/1.1 200 OK\r\nContent-Le",
    "not HTTP": b"220 mail ESMTP\r\n",
    "no response": SILENCE,
}
REFUSALS = {
    "403": error(403, "AccessDenied"),
    "403 for a wrong clock": error(403, "RequestTimeTooSkewed"),
    "403 for the signature": error(403, "SignatureDoesNotMatch"),
    "400": error(400, "InvalidArgument"),
    "411": error(411, "MissingContentLength"),
    "301 of another region": error(301, "PermanentRedirect"),
    "302": http(302, Location="http://127.0.0.1:1/"),
    "501": error(501, "NotImplemented"),
}


def has_no_secrets(caught, script):
    secrets = (
        SECRET,
        TOKEN,
        verified().signature,
        verified().text,
        script.url,
    )
    return not any(secret in f"{caught.value} {caught.value!r}" for secret in secrets)


@pytest.mark.parametrize("request_", EVERY_REQUEST, ids=lambda call: call.__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_temporary_failure_is_transient(request_, fault):
    with scripted(FAULTS[fault]) as script, pytest.raises(TransientError) as caught:
        request_(S3ObjectClient(connection(script)))
    assert has_no_secrets(caught, script)


@pytest.mark.parametrize("code", ["RequestTimeout", "IncompleteBody"])
def test_status_400_for_missing_bytes_is_transient(code):
    with scripted(error(400, code)) as script, pytest.raises(TransientError, match=code):
        put(S3ObjectClient(connection(script)))


@pytest.mark.parametrize("request_", EVERY_REQUEST, ids=lambda call: call.__name__)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_permanent_failure_is_final(request_, refusal):
    with scripted(REFUSALS[refusal]) as script, pytest.raises(BucketError) as caught:
        request_(S3ObjectClient(connection(script)))
    assert not isinstance(caught.value, TransientError)
    assert has_no_secrets(caught, script)
    if refusal not in ("400", "501"):  # these can mean that the store lacks an optional feature
        assert len(script.requests) == 1


@pytest.mark.parametrize("upload", [put, post])
@pytest.mark.parametrize(
    "answers",
    [
        [http(200, ETag=OTHER_ETAG)],
        [http(200), http(404)],
        [http(200), http(200, ETag=OTHER_ETAG, Content_Length=len(DATA))],
        [http(200), http(200, Content_Length=len(DATA) + 1)],
        [http(200, ETag='"a-multipart-upload-2"'), http(404)],
        [http(200, ETag=OTHER_ETAG, x_amz_server_side_encryption="aws:kms"), http(404)],
        [error(400, "BadDigest")],
    ],
    ids=["other ETag", "missing", "other ETag in HEAD", "longer", "no MD5, missing", "KMS, missing", "reported"],
)
def test_upload_that_the_store_lost_is_detected(upload, answers):
    with scripted(*answers) as script, pytest.raises(TransientError, match="BadDigest"):
        upload(S3ObjectClient(connection(script)))


@pytest.mark.parametrize("upload", [put, post])
@pytest.mark.parametrize(
    "answers",
    [
        [http(200, ETag=ETAG)],
        [http(204, ETag=ETAG.strip('"'))],
        [http(204), http(200, ETag=ETAG, Content_Length=len(DATA))],
        [http(200, ETag=OTHER_ETAG, x_amz_server_side_encryption="aws:kms"), http(200, Content_Length=len(DATA))],
    ],
    ids=["ETag", "ETag without quotes", "by HEAD", "KMS, by its size"],
)
def test_upload_that_the_store_has_is_confirmed(upload, answers):
    with scripted(*answers) as script:
        upload(S3ObjectClient(connection(script)))


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (get, http(200, bytes(10), Content_Length=20)),
        (get_range, http(206, bytes(2), Content_Length=4)),
        (listing, http(200, b"<ListBucketResult>", Content_Length=400)),
    ],
)
def test_truncated_response_is_transient(call, answer):
    with scripted(answer) as script, pytest.raises(TransientError):
        call(S3ObjectClient(connection(script)))


BOMB = b'<!DOCTYPE a [<!ENTITY b "%s">%s]><a>&c9;</a>' % (
    b"x" * 10_000,
    b"".join(b'<!ENTITY c%d "%s">' % (n, (b"&c%d;" % (n - 1) if n else b"&b;") * 10) for n in range(10)),
)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (get, http(200, b"", Content_Length=MAX_OBJECT + 1)),
        (get_range, http(206, bytes(4), Content_Range="bytes 7-10/20")),
        (listing, http(200, b"<ListBucketResult>")),
        (listing, http(200, b"")),
        (listing, http(200, BOMB)),
        (listing, http(200, b"", Content_Length=1 << 40)),
        (delete, http(200, b"<a><Error><Code>AccessDenied</Code><Message>no</Message></Error></a>")),
        (get, http(403, BOMB)),
        (get, error(403, "AccessDenied", "long " * 10_000)),
        (get, http(403, b"<Error><Code>\xc3\x28</Code></Error>")),
        (head, http(200, Content_Length="many")),
    ],
)
def test_invalid_response_is_a_short_error(call, answer):
    with scripted(answer) as script, pytest.raises(BucketError) as caught:
        call(S3ObjectClient(connection(script)))
    assert len(str(caught.value)) < 700


def test_refusal_has_the_message_of_s3():
    answer = error(403, "RequestTimeTooSkewed", "The difference\n is too large.")
    with scripted(answer) as script, pytest.raises(StoreError) as caught:
        get(S3ObjectClient(connection(script)))
    assert str(caught.value) == "RequestTimeTooSkewed(403)- The difference is too large."


@pytest.mark.parametrize("key", ["..", "a/../b", "./a", "a/.", "a" * 1025, "\ud800"])
def test_key_that_would_change_on_the_way_is_rejected_before_sending(key):
    with scripted(http(200)) as script, pytest.raises(InvalidArgument):
        S3ObjectClient(connection(script)).put("my-bucket", key, DATA)
    assert script.requests == []


def retrying_store_on(script, seconds=5.0):
    return RetryingStore(ServiceKeyStore(connection(script)), seconds)


@pytest.mark.parametrize("upload", [put, post])
def test_retry_waits_longer_after_each_temporary_failure(upload, pauses):
    faults = [error(503, "SlowDown"), b"\r\n", http(200, ETag=OTHER_ETAG), error(500, "InternalError")]
    with scripted(*faults, http(200, ETag=ETAG)) as script:
        upload(retrying_store_on(script))
    assert len(script.requests) == 5
    assert all(shortest / 8 <= pause <= shortest / 4 for pause, shortest in zip(pauses, [1, 2, 4, 8], strict=True))


@pytest.mark.parametrize(
    ("call", "requests"),
    # After a refused HEAD another object is put: without the right to list, S3 returns 403 for a missing object too.
    [
        (put, ["PUT"]),
        (head, ["HEAD", "PUT"]),
        (get, ["GET"]),
        (get_range, ["GET"]),
        (listing, ["GET"]),
        (delete, ["POST"]),
    ],
    ids=lambda call: getattr(call, "__name__", None),
)
def test_retry_tries_permanent_failure_once(call, requests, pauses):
    with scripted(*[error(403, "AccessDenied")] * len(requests)) as script, pytest.raises(AccessDenied):
        call(retrying_store_on(script))
    assert ([request.split()[0] for request in script.requests], pauses) == (requests, [])


def test_retry_raises_last_error_after_the_timeout(monkeypatch, pauses):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(retrying_store, "monotonic", lambda: next(clock))  # replaces the clock of the fixture
    answers = [error(503, "SlowDown", "first"), error(500, "InternalError", "last")]
    with scripted(*answers) as script, pytest.raises(TransientError, match="last"):
        get(retrying_store_on(script, 5))
    assert len(script.requests) == 2


class CheckFailedError(Exception):
    """The error of a check."""


def create(buckets):
    return buckets.create("my-bucket", "111111111111")


def remove(buckets):
    return buckets.remove("my-bucket", "111111111111")


@pytest.mark.parametrize("call", [*EVERY_REQUEST, create, remove], ids=lambda call: call.__name__)
def test_retrying_store_checks_before_each_attempt_of_each_call(call, pauses):
    """The right to write is lost during the first attempt."""

    def check():
        if script.requests:
            raise CheckFailedError

    with scripted(error(503, "SlowDown")) as script:
        for buckets in (
            RetryingStore(ServiceKeyStore(connection(script)), 60.0, before_attempt=check),
            retrying_store_on(script, 60.0).checking(check),
        ):
            script.requests.clear()
            with pytest.raises(CheckFailedError):
                call(buckets)
            assert len(script.requests) == 1


@pytest.mark.parametrize("moment", ["before the attempt", "when there is a connection", "after some of the body"])
def test_transport_stops_sending_a_body_when_a_check_fails(moment, monkeypatch):
    allowed = {"before the attempt": 0, "when there is a connection": 1, "after some of the body": 4}[moment]
    monkeypatch.setattr(s3_client, "_PIECE", 1)
    checks = []

    def check():
        checks.append(moment)
        if len(checks) > allowed:
            raise CheckFailedError

    with scripted(http(200, ETag=ETAG)) as script:
        with pytest.raises(CheckFailedError):
            put(RetryingStore(ServiceKeyStore(connection(script)), 60.0, before_attempt=check))
        script.over.set()
    assert script.requests in ([], [""])  # no complete request: a store ignores a part of one
    assert len(checks) == allowed + 1


@pytest.mark.parametrize(
    ("answer", "arrives"),
    [(SILENCE, True), (b"\r\n", True), (http(504), True), (error(503, "SlowDown"), False), (error(403, "no"), False)],
)
@pytest.mark.parametrize("call", [put, delete], ids=lambda call: call.__name__)
def test_retrying_store_records_requests_that_may_arrive_later(call, answer, arrives):
    with scripted(answer) as script:
        buckets = retrying_store_on(script, 0.0)
        with pytest.raises(BucketError):
            call(buckets.checking(lambda: None))
    assert buckets.unanswered == ({("my-bucket", "win1.part.0")} if arrives else set())


def test_retrying_store_records_no_request_without_a_connection():
    with scripted(http(200)) as script:
        pass
    buckets = retrying_store_on(script, 0.0)
    with pytest.raises(UnreachableError):
        put(buckets)
    assert buckets.unanswered == set()


def test_wait_for_a_free_connection_ends():
    with scripted(SILENCE) as script:
        objects = S3ObjectClient(connection(script, max_connections=1, timeout=0.2))
        pool = objects._transport._pool.connection_from_url(script.url)
        taken = pool._get_conn()
        with pytest.raises(UnreachableError, match=r"No connection to the store .* was free for 0\.2 s"):
            head(objects)
        pool._put_conn(taken)


def pieces(answer, *, slow):
    """Split a response into small pieces, beginning with its part `slow`."""
    headers = answer.partition(b"\r\n\r\n")[0]
    first = {"status": b"", "headers": headers[:-20], "body": headers + b"\r\n\r\n"}[slow]
    rest = answer[len(first) :]
    return [first] * bool(first) + [rest[start : start + 4] for start in range(0, len(rest), 4)]


@pytest.mark.parametrize(
    ("answer", "slow"),
    [
        (http(200, bytes(40)), "status"),
        (http(200, bytes(40)), "headers"),
        (http(200, bytes(40)), "body"),
        (http(503, bytes(40)), "headers"),
        (http(503, bytes(40)), "body"),
        (http(200, b"1;" + b"x" * 40, Transfer_Encoding="chunked"), "body"),
    ],
)
def test_attempt_ends_although_bytes_still_arrive(monkeypatch, answer, slow):
    monkeypatch.setattr(s3_client, "MAX_DURATION_FACTOR", 1)
    with scripted(pieces(answer, slow=slow)) as script:
        script.pause = 0.2
        with pytest.raises(
            TransientError, match=r"The connection to the store .* is too slow: not finished after 0\.3 s"
        ):
            get(S3ObjectClient(connection(script, timeout=0.3)))


def test_tunnel_request_ends_although_bytes_still_arrive(monkeypatch):
    monkeypatch.setattr(s3_client, "MAX_DURATION_FACTOR", 1)
    with scripted(pieces(http(200, bytes(40)), slow="headers")) as script:
        script.pause = 0.2
        with pytest.raises(TransientError, match=r"The connection to the store .* is too slow"):
            get(S3ObjectClient(connection(script, endpoint="https://store.example", proxy=script.url, timeout=0.3)))


def respond_once_and_read_no_more(listener, over):
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(http(200).replace(b"Connection: close\r\n", b""))
        over.wait()


def test_blocked_request_times_out_sooner_than_a_response():
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=respond_once_and_read_no_more, args=(listener, over))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = HttpTransport(StoreConfig(endpoint=url, max_connections=1, timeout=600, send_timeout=0.2))
        store.send("GET", f"{url}/", {}, limit=100)  # the connection is reused
        with pytest.raises(TransientError):
            store.send("PUT", f"{url}/key", {}, [bytes(64 << 20)], limit=100)
        over.set()
        thread.join()


def test_response_may_take_longer_than_a_send():
    with scripted([http(200)]) as script:
        script.pause = 0.5
        assert get(S3ObjectClient(connection(script, timeout=600, send_timeout=0.1))) == b""


def page(*keys, following=""):
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{following}</NextContinuationToken>"
    listed = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
    return http(200, f"<ListBucketResult>{more if following else ''}{listed}</ListBucketResult>".encode())


def test_list_that_fails_on_a_later_page_returns_every_key_once(pauses):
    faults = [page("b", "a", following="2"), error(503, "SlowDown")]
    with scripted(*faults, page("b", "a", following="2"), page("c", "d")) as script:
        assert [*retrying_store_on(script).list("my-bucket", "")] == ["b", "a", "c", "d"]
    assert "continuation-token=2" in script.requests[1]


def test_create_stores_bucket_and_owner_once(pauses):
    """The response to CreateBucket is lost."""
    answers = [
        error(404, "NoSuchBucket"),
        b"\r\n",  # the bucket was created
        error(404, "NoSuchKey"),
        page(),
        http(200, ETag=ETAG),
        http(200, b"111111111111\n"),
    ]
    with scripted(*answers) as script:
        retrying_store_on(script).create("my-bucket", "111111111111")
    methods = [line.split()[0] for line in script.requests]
    assert methods == ["GET", "PUT", "GET", "GET", "PUT", "GET"]


def test_bucket_belongs_to_the_account_that_stores_the_owner_first(pauses):
    answers = [error(404, "NoSuchKey"), page(), error(412, "PreconditionFailed"), http(200, b"222222222222\n")]
    with scripted(*answers) as script, pytest.raises(BucketAlreadyExists):
        retrying_store_on(script).create("my-bucket", "111111111111")


def test_slow_response_without_stall_is_read():
    """The timeout applies to each read, so a large object may take longer."""
    answer = http(200, bytes(10))
    with scripted([answer[start : start + 8] for start in range(0, len(answer), 8)]) as script:
        script.pause = 0.1
        assert S3ObjectClient(connection(script)).get("my-bucket", "key") == bytes(10)


def test_missing_bucket_is_reported_by_every_request_that_needs_it():
    with scripted(error(404, "NoSuchBucket")) as script:
        objects = S3ObjectClient(connection(script))
        assert head(objects) is None
        delete(objects)
        for call in (put, post, get, get_range, listing):
            with pytest.raises(NoSuchBucket):
                call(objects)
