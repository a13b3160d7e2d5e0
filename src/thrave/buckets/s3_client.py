"""How to reach an S3-compatible store, and with which key; and the URLs of its buckets and objects.

Plain data. Nothing here opens a connection or reads the environment.

HTTP to a store, through a proxy or not: a bounded number of connections with timeouts, and S3's errors.

A request is sent and its response is read, complete and no longer than the caller allows. Every failure is a
BucketError; nothing is sent twice here (`retrying.py`). No message holds a URL, a header, a body or a password.

Every wait has an end: for a free connection, for a new one, for the line to move, for the whole of a request's body,
and for the whole of a response, its headers and an error's document included. Whether the caller may still send
(`write_guard.py`) is checked once the connection is there, and before each piece of a body.

It is urllib3, which botocore brings, for signed requests and forms alike.

Signed requests to a store: the signature of AWS's version 4.

The signature is botocore's own. Its client is not used: that holds one access key and reads the user's environment, and
here one set of connections serves the service's key and its accounts' alike.

The content is not part of the signature (`UNSIGNED-PAYLOAD`): its MD5 is, as the header Content-MD5, which every store
checks. That costs one hash instead of two.
"""

import base64
import io
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPResponse, responses
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, unquote, urlencode, urlsplit
from xml.etree import ElementTree as ET

import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, EmptyPoolError, HTTPError, NewConnectionError, ProxyError
from urllib3.exceptions import TimeoutError as HTTPTimeout

from thrave.buckets.base import check_key, check_readable_bucket_name
from thrave.buckets.errors import (
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
from thrave.concurrency import monotonic
from thrave.config import normal_endpoint
from thrave.write_guard import store_guard

Addressing = Literal["path", "virtual"]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """An access key that the store knows, or temporary ones with their session token."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A forward proxy.

    Attributes:
        url: `http://HOST:PORT`, without user and password.
        authorization: The header Proxy-Authorization; None if the proxy wants no user.
    """

    url: str
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, url: str) -> Self:
        """Read a proxy's URL, as settings and `https_proxy` have it: `[http://][USER[:PASSWORD]@]HOST[:PORT][/]`.

        User and password may be percent-encoded. They are sent in UTF-8 (RFC 7617).

        Raises:
            StoreSettingError: It is no such URL; the message holds nothing of it.
        """
        text = url.strip()
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            user, at, where = parts.netloc.rpartition("@")
            normal = normal_endpoint(parts._replace(netloc=where).geturl())
        except ValueError:
            raise StoreSettingError(
                "The URL of the proxy cannot be used: write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with "
                "special characters of user and password percent-encoded"
            ) from None
        name, _, password = user.partition(":")
        given = f"{unquote(name)}:{unquote(password)}".encode()
        return cls(url=normal, authorization=f"Basic {base64.b64encode(given).decode()}" if at else None)

    @property
    def where(self) -> str:
        """Host and port, for people."""
        return urlsplit(self.url).netloc

    @property
    def headers(self) -> Mapping[str, str]:
        """What the proxy is sent: with each request by plain HTTP, with CONNECT for TLS."""
        return {} if self.authorization is None else {"Proxy-Authorization": self.authorization}


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """One store, and who calls it."""

    endpoint: str
    """`https://s3.eu-west-1.amazonaws.com`, `http://127.0.0.1:8333`; kept in its normal form."""
    region: str = "us-east-1"
    """For which requests are signed, and in which buckets are created."""
    credentials: Credentials | None = None
    """Without any, requests are not signed: what everybody may read can be read."""
    find_credentials: Callable[[], Credentials] | None = None
    """Gives the credentials of each request, where they change while the process runs."""
    addressing: Addressing = "path"
    """Where a bucket's name stands: in the path, or before the endpoint's host name."""
    ca: Path | None = None
    """Certificates (PEM) that sign the store's, instead of the system's."""
    proxy: str | None = field(default=None, repr=False)  # its URL may hold a password
    """`http://USER:PASSWORD@HOST:PORT` of a proxy."""
    connections: int = 16
    """How many are open at once; one more waits for one of them."""
    timeout: float = 30.0
    """Seconds in which anything must move on a connection."""
    send_timeout: float | None = None
    """Seconds in which a connection must come about, and each piece of a request be sent; None: `timeout`."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "endpoint", normal_endpoint(self.endpoint))
        except ValueError as error:
            raise StoreSettingError(f"The URL of the store cannot be used: {error}") from None

    def current_credentials(self) -> Credentials | None:
        """The credentials with which the next request is signed."""
        return self.credentials if self.find_credentials is None else self.find_credentials()

    def url(self, bucket: str | None = None, key: str = "", query: Mapping[str, str] | None = None) -> str:
        """The URL of an object, of a bucket, or (None) of the store.

        Every URL that is sent to a store is made here, quoted as it is signed.

        Raises:
            InvalidBucketName, InvalidArgument: No URL can hold that bucket or key unchanged.
        """
        path = ""
        scheme, host = self.endpoint.split("://")
        if bucket is not None:
            check_readable_bucket_name(bucket)
            check_key(key)
            if self._has_host_of_its_own(bucket):
                host = f"{bucket}.{host}"
                path = quote(key, safe="/-_.~")
            else:
                path = quote(bucket, safe="-_.~") + (f"/{quote(key, safe='/-_.~')}" if key else "")
        text = f"?{urlencode(query, quote_via=quote, safe='-_.~')}" if query else ""
        return f"{scheme}://{host}/{path}{text}"

    def _has_host_of_its_own(self, bucket: str) -> bool:
        """Whether a bucket's name can stand before the host's. If not, it stands in the path.

        An address has no names before it, a name with capitals or underscores is no host's, and a certificate for
        `*.HOST` does not match a name with dots.
        """
        host = urlsplit(self.endpoint).hostname or ""
        dotted = "." in bucket and self.endpoint.startswith("https:")
        return self.addressing == "virtual" and not dotted and not _is_address(host) and bool(_LABELS.fullmatch(bucket))


_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"


_LABELS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


Buffer = bytes | memoryview


_PIECE = 256 << 10  # bytes that are sent within one `timeout`


_PIECE_OF_TLS = 16 << 10  # the longest record of TLS: Python's timeout is one for each record


LONGEST = 20
"""Times `timeout`: within that a body must have been sent, and within that again a response must have been read."""


_ERROR_BYTES = 64 << 10  # of an error's document


_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class HttpResponse:
    """A store's answer: success, for the transport raises the others."""

    status: int
    headers: Mapping[str, str]
    """Names in any case."""
    body: bytes

    @property
    def content_length(self) -> int:
        """Bytes that the object has which the answer is about.

        Raises:
            StoreError: It does not say, or says something else.
        """
        said = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,19}", said):
            raise StoreError("UnexpectedResponse", 0, "The store does not say how long the object is")
        return int(said)


class HttpTransport:
    """The connections to one store. Safe to use from several threads."""

    def __init__(self, connection: StoreConfig) -> None:
        """Open nothing yet.

        Raises:
            StoreSettingError: The proxy or the file of certificates cannot be used.
        """
        self._where = urlsplit(connection.endpoint).netloc
        self._is_secure = connection.endpoint.startswith("https:")
        self._region = connection.region
        self._timeout = connection.timeout
        self._send_timeout = connection.send_timeout or connection.timeout
        self._proxy = None if connection.proxy is None else Proxy.read(connection.proxy)
        try:
            self._pool = _pool(connection, self._proxy)
        except (HTTPError, OSError, ValueError) as error:
            about = "the file of certificates" if self._is_secure else "the proxy"
            raise StoreSettingError(
                f"The store {self._where} cannot be called with {about} that is set: {_reason(error)}"
            ) from None

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Sequence[Buffer] = (), *, limit: int
    ) -> HttpResponse:
        """Send a request, and return its response.

        Args:
            method: `PUT`, …
            url: Quoted as it was signed.
            headers: All but Host and Content-Length.
            body: Its pieces; none is copied.
            limit: Bytes that a successful response may have; a longer one is an error.

        Raises:
            BucketError: The store responded with an error, or with more than was asked for.
            TransientError: There was no response, or not all of it.
        """
        length = sum(memoryview(piece).nbytes for piece in body)
        lengths = {"Content-Length": str(length)} if body or method in ("PUT", "POST") else {}
        try:
            answer = self._pool.urlopen(
                method,
                url,
                body=self._pieces(body) if length else None,
                headers={**headers, **lengths},
                redirect=False,
                preload_content=False,
                decode_content=False,
                pool_timeout=self._timeout,
            )
            with answer:
                if answer.status >= 300:
                    raise self._refusal(answer.status, answer.headers, answer.read(_ERROR_BYTES))
                return self._read(answer, limit)
        except (HTTPError, OSError) as error:
            raise self._failure(error) from None

    def _pieces(self, body: Sequence[Buffer]) -> Iterator[memoryview]:
        """Each piece is sent within the timeout: a line must move, and need not be fast."""
        until, length = monotonic() + LONGEST * self._timeout, _PIECE_OF_TLS if self._is_secure else _PIECE
        for piece in body:
            view = memoryview(piece).cast("B")
            for start in range(0, view.nbytes, length):
                store_guard.check()
                if monotonic() > until:
                    raise TransientError("NoResponse", 0, self._too_slow(f"the store {self._where}"))
                yield view[start : start + length]

    def _read(self, answer: urllib3.BaseHTTPResponse, limit: int) -> HttpResponse:
        pieces, left = list[bytes](), limit
        # An empty piece is the end; there it is known whether fewer bytes came than were promised.
        while piece := answer.read1(min(_PIECE, left + 1)):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                words = f"The store sent more than the {limit} bytes that were asked for"
                raise StoreError("UnexpectedResponse", 0, words)
        return HttpResponse(answer.status, answer.headers, b"".join(pieces))

    def _too_slow(self, named: str) -> str:
        return f"The line to {named} is too slow: no end after {LONGEST * self._timeout:g} s"

    def _refusal(self, status: int, headers: Mapping[str, str], document: bytes) -> BucketError:
        """The error of a response: S3's document, or what another server in between says."""
        fields = _fields(document)
        code = fields.get("Code", "")
        reason = responses.get(status, "no reason given")  # Ceph gives no message
        message = " ".join(fields.get("Message", "").split())[:_MESSAGE_CHARACTERS] or reason
        proxied = self._refusal_of_proxy(status, code, headers)
        if proxied is not None:
            return proxied
        region = fields.get("Region") or headers.get("x-amz-bucket-region")
        endpoint = fields.get("Endpoint")
        if self._is_elsewhere(status, code, region, endpoint):
            return WrongRegion(code or find_row("", status).code, status, message, region=region, endpoint=endpoint)
        if 300 <= status < 400:
            message += _place_of(headers.get("Location", ""))
        return error_from_response(code, status, message, headers)

    def _is_elsewhere(self, status: int, code: str, region: str | None, endpoint: str | None) -> bool:
        """Whether a response says that the bucket is in another region, or at another endpoint for good."""
        other = region is not None and region != self._region
        if status in (301, 307):
            return other or (status == 301 and bool(endpoint or code))
        # The response to HEAD has no code.
        return find_row(code, status).kind is Kind.REGION or (status == 400 and not code and other)

    def _refusal_of_proxy(self, status: int, code: str, headers: Mapping[str, str]) -> BucketError | None:
        """The error of a response that the proxy has sent instead of the store; None if it is the store's."""
        if status != 407 and (self._proxy is None or self._is_secure):
            return None
        is_page = headers.get("Content-Type", "").startswith("text/html") and not code
        if status != 407 and not (is_page and status in (401, 403, 405)):
            return None
        return _refused_by_proxy(self._proxy.where if self._proxy else "before the store", status)

    def _failure(self, error: Exception) -> BucketError:
        """The error of a request without a complete response."""
        chain = [*_chain(error)]
        proxied = self._proxy is not None and any(isinstance(one, ProxyError) for one in chain)
        where = self._proxy.where if self._proxy and proxied else self._where
        named = f"the proxy {where}" if proxied else f"the store {where}"
        for one in chain:
            if tunnel := re.match(r"Tunnel connection failed: ([0-9]{3})", str(one)):
                return _refused_by_proxy(self._proxy.where if self._proxy else "before the store", int(tunnel[1]))
            if isinstance(one, ssl.SSLCertVerificationError):
                message = f"The certificate of {where} is not trusted: {one.verify_message}"
                return StoreError("CertificateNotTrusted", 0, message)
        reason, seconds = _reason(error), f"{self._timeout:g} s"
        connect_seconds = f"{self._send_timeout:g} s"
        unreachable = "ProxyUnreachable" if proxied else "ConnectionRefused"
        # The first of these that the error stands for says what has happened.
        for types, kind, code, message in (
            (_SlowResponseError, TransientError, "NoResponse", self._too_slow(named)),
            (socket.gaierror, UnreachableError, "NameNotResolved", f"The host name of {named} does not resolve"),
            (NewConnectionError, UnreachableError, unreachable, f"Cannot connect to {named}: {reason}"),
            (EmptyPoolError, NoConnectionError, "NoConnection", f"No connection to {named} was free for {seconds}"),
            (
                ConnectTimeoutError,
                UnreachableError,
                "ConnectTimeout",
                f"No connection to {named} within {connect_seconds}",
            ),
            (ssl.SSLError, TransientError, "TLSFailure", f"TLS with {named} failed: {reason}"),
            (HTTPTimeout, TransientError, "NoResponse", f"Nothing moved for {seconds} to {named}"),
            (ProxyError, UnreachableError, unreachable, f"No connection through {named}: {reason}"),
        ):
            if any(isinstance(one, types) for one in chain):
                return kind(code, 0, message)
        return TransientError("ConnectionLost", 0, f"The connection to {named} was lost: {reason}")


def _refused_by_proxy(where: str, status: int) -> BucketError:
    reason = f"{status} {responses.get(status, '')}".strip()
    if status == 407:
        words = f"The proxy {where} wants another user and password ({reason})"
        return StoreError("ProxyAuthenticationRequired", 0, words)
    if status >= 500 and find_row("", status).kind is Kind.TRANSIENT:
        return TransientError("ProxyFailed", 0, f"The proxy {where} cannot reach the store ({reason})")
    return StoreError("ProxyRefused", 0, f"The proxy {where} does not let the request through ({reason})")


def _pool(connection: StoreConfig, proxy: Proxy | None) -> urllib3.PoolManager:
    is_secure = connection.endpoint.startswith("https:")
    make = (
        urllib3.PoolManager
        if proxy is None
        else partial(urllib3.ProxyManager, proxy.url, proxy_headers=dict(proxy.headers))
    )
    pool = make(
        maxsize=connection.connections,
        block=True,
        retries=False,
        timeout=urllib3.Timeout(connect=connection.send_timeout or connection.timeout, read=connection.timeout),
        ssl_context=ssl.create_default_context(cafile=connection.ca) if is_secure else None,
    )
    pool.pool_classes_by_scheme = {"http": _Connections, "https": _SecureConnections}
    return pool


class _SlowResponseError(TimeoutError):
    """A response was not complete in time, though its bytes kept coming."""


class _TimedBytes(io.RawIOBase):
    """The bytes of one response, which must all come within `LONGEST` times the timeout of the socket.

    The socket's own timeout is one for each read: a server that sends a byte now and then would never meet it.
    """

    def __init__(self, received: io.RawIOBase, timeout: float) -> None:
        self._received = received
        self._until = monotonic() + LONGEST * timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 (as the base class)
        if monotonic() > self._until:
            raise _SlowResponseError
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _TimedResponse(HTTPResponse):
    """Reads everything of a response in time: its first line, headers, body and trailers; a proxy's to CONNECT too."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:  # noqa: ANN401 (as the base class)
        super().__init__(sock, *args, **options)
        timeout = sock.gettimeout()
        if timeout is not None:
            self.fp = io.BufferedReader(_TimedBytes(self.fp.detach(), timeout))


class _CheckedConnection(HTTPConnection):
    """Checks, when the connection is there and before the first byte of a request, whether it may be sent."""

    response_class = _TimedResponse

    def request(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 (as urllib3's own)
        if self.is_closed:
            self.connect()
        if self.sock is not None:  # urllib3 leaves the timeout of the last response on a connection that is used again
            self.sock.settimeout(self.timeout)
        store_guard.check()
        super().request(*args, **options)


class _CheckedSecureConnection(_CheckedConnection, HTTPSConnection):
    """The same for TLS."""


class _Connections(urllib3.HTTPConnectionPool):
    ConnectionCls = _CheckedConnection


class _SecureConnections(urllib3.HTTPSConnectionPool):
    ConnectionCls = _CheckedSecureConnection


def _place_of(location: str) -> str:
    """Where a redirect leads, for people; empty if it names no server."""
    try:
        parts = urlsplit(location)
        host = parts.hostname
    except ValueError:  # such as http://[x/
        return ""
    return f", to {parts.scheme or 'http'}://{parts.netloc.rpartition('@')[2]}" if host else ""


def _fields(document: bytes) -> Mapping[str, str]:
    """The elements of S3's error document; none if it is something else."""
    try:
        root = ET.fromstring(document)  # noqa: S314 (expat stops entity bombs itself, and the length is bounded)
    except (ET.ParseError, LookupError, ValueError):  # the last two: an encoding that is not known, or not supported
        return {}
    return {child.tag.rpartition("}")[2]: (child.text or "")[:_MESSAGE_CHARACTERS] for child in root}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it stands for: its arguments, what it wraps and what caused it."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        linked = (*one.args, getattr(one, "original_error", None), one.__cause__, one.__context__)
        waiting += [other for other in linked if isinstance(other, BaseException)]


def _reason(error: BaseException) -> str:
    """The system's own word for what caused an error."""
    *_, last = _chain(error)
    said = next((one.strerror for one in _chain(error) if isinstance(one, OSError) and one.strerror), None)
    return said or type(last).__name__


SMALL = 16 << 20
"""Bytes: no document of S3's is longer (1000 keys of a listing have at most 3 MiB, escaped)."""


class SignedClient:
    """Requests to one store, signed with one access key, or not signed."""

    def __init__(
        self, connection: StoreConfig, transport: HttpTransport, credentials: Credentials | None = None
    ) -> None:
        """Sign with `credentials`, or else with those that the connection has at the time of each request."""
        self._connection = connection
        self._transport = transport
        self._credentials = credentials

    def send(
        self,
        method: str,
        bucket: str | None,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Sequence[Buffer] = (),
        limit: int = SMALL,
    ) -> HttpResponse:
        """Send a request about an object, a bucket, or (None) all buckets.

        Raises:
            InvalidBucketName, InvalidArgument: There can be no such bucket or key.
            BucketError: See Transport.send.
        """
        url = self._connection.url(bucket, key, query)
        credentials = self._credentials or self._connection.current_credentials()
        signed = self._signed(method, url, headers or {}, credentials)
        try:
            answer = self._transport.send(method, url, signed, body, limit=limit)
        except BucketError as error:
            error.access_key_id = credentials.access_key_id if credentials else None
            raise
        if answer.status != 204 and not any(name in answer.headers for name in ("Content-Length", "Transfer-Encoding")):
            # Every store says how long its answer is. Python takes a head that was cut off for one that ends there.
            raise TransientError("ConnectionLost", 0, "The headers of the store's response were cut off")
        return answer

    def _signed(self, method: str, url: str, headers: Mapping[str, str], key: Credentials | None) -> Mapping[str, str]:
        if key is None:
            return headers
        request = AWSRequest(method, url, headers=dict(headers))
        known = BotocoreCredentials(key.access_key_id, key.secret_access_key, key.session_token)
        _UnsignedPayload(known, "s3", self._connection.region).add_auth(request)
        return dict(request.headers.items())


class _UnsignedPayload(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    def payload(self, _request: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"
