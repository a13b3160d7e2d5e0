"""HTTP requests to an S3-compatible store: configuration, connections with limits and timeouts, and signatures.

Every failure is a BucketError; nothing is retried here (`retrying_store`). No message contains a URL with a query, a
header, a body or a password. Nothing reads the environment.
"""

# urllib3, which botocore brings, sends all requests. Every wait has a limit: for a free connection, for a new one, for
# the next bytes, for the whole body of a request, and for the whole response with headers and error document. Whether
# the process may still send (`write_guard`) is checked when there is a connection, and before each piece of a body.
#
# The signature (AWS version 4) is botocore's. Its client is not used: it has one access key and reads the user's
# environment, while here the keys of the service and of its accounts share one set of connections. The signature does
# not include the content (`UNSIGNED-PAYLOAD`), but its MD5 in the header Content-MD5, which every store checks. So the
# content is hashed once instead of twice.

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
Buffer = bytes | memoryview

MAX_DOCUMENT = 16 << 20
"""Maximum bytes of an XML document of S3; 1,000 keys of a listing have at most 3 MiB, escaped."""

MAX_DURATION_FACTOR = 20
"""Times `StoreConfig.timeout` within which a whole request body must be sent; the same for reading a whole response."""

_PIECE = 256 << 10  # bytes that must be sent within one timeout
_TLS_PIECE = 16 << 10  # the longest TLS record: Python applies the timeout to each record
_MAX_ERROR_BYTES = 64 << 10  # of an error document
_MAX_MESSAGE = 500  # characters
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_LABELS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """An access key of the store, or temporary credentials with their session token."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A forward proxy.

    Attributes:
        url: `http://HOST:PORT`, without user and password.
        authorization: The header Proxy-Authorization; None without a user.
    """

    url: str
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse a proxy's URL from a setting or `https_proxy`: `[http://][USER[:PASSWORD]@]HOST[:PORT][/]`.

        User and password may be percent-encoded. They are sent in UTF-8 (RFC 7617).

        Raises:
            StoreSettingError: The URL is not valid. The message contains no part of the URL.
        """
        text = url.strip()
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            user, at, host = parts.netloc.rpartition("@")
            normal = normal_endpoint(parts._replace(netloc=host).geturl())
        except ValueError:
            raise StoreSettingError(
                "The URL of the proxy cannot be used: write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with "
                "special characters of user and password percent-encoded"
            ) from None
        name, _, password = user.partition(":")
        credentials = f"{unquote(name)}:{unquote(password)}".encode()
        return cls(url=normal, authorization=f"Basic {base64.b64encode(credentials).decode()}" if at else None)

    @property
    def address(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.url).netloc

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers for the proxy: in each request with plain HTTP, in CONNECT with TLS."""
        return {} if self.authorization is None else {"Proxy-Authorization": self.authorization}


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """A store, and how to connect to it."""

    endpoint: str
    """`https://s3.eu-west-1.amazonaws.com`, `http://127.0.0.1:8333`; stored in its normal form."""
    region: str = "us-east-1"
    """Region of the signatures and of new buckets."""
    credentials: Credentials | None = None
    """None: requests are not signed, and can read public objects only."""
    find_credentials: Callable[[], Credentials] | None = None
    """Returns the credentials for each request, if they change while the process runs."""
    addressing: Addressing = "path"
    """Whether the bucket's name is in the path, or before the endpoint's host name."""
    ca: Path | None = None
    """CA certificates for the store (PEM), instead of the system's."""
    proxy: str | None = field(default=None, repr=False)  # the URL may contain a password
    """`http://USER:PASSWORD@HOST:PORT` of a proxy."""
    max_connections: int = 16
    """Open at the same time; further requests wait for a free connection."""
    timeout: float = 30.0
    """Seconds without a byte sent or received on a connection after which a request fails."""
    send_timeout: float | None = None
    """Seconds for a new connection, and for sending each piece of a request; None: `timeout`."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "endpoint", normal_endpoint(self.endpoint))
        except ValueError as error:
            raise StoreSettingError(f"The URL of the store cannot be used: {error}") from None

    def current_credentials(self) -> Credentials | None:
        """Return the credentials for the next request."""
        return self.credentials if self.find_credentials is None else self.find_credentials()

    def url(self, bucket: str | None = None, key: str = "", query: Mapping[str, str] | None = None) -> str:
        """Return the URL of an object, of a bucket, or (None) of the store, quoted as for the signature.

        Raises:
            InvalidBucketName, InvalidArgument: No URL can contain that bucket or key unchanged.
        """
        path = ""
        scheme, host = self.endpoint.split("://")
        if bucket is not None:
            check_readable_bucket_name(bucket)
            check_key(key)
            if self._has_bucket_host(bucket):
                host = f"{bucket}.{host}"
                path = quote(key, safe="/-_.~")
            else:
                path = quote(bucket, safe="-_.~") + (f"/{quote(key, safe='/-_.~')}" if key else "")
        text = f"?{urlencode(query, quote_via=quote, safe='-_.~')}" if query else ""
        return f"{scheme}://{host}/{path}{text}"

    def _has_bucket_host(self, bucket: str) -> bool:
        """Whether a bucket's name is before the host name; otherwise it is in the path.

        Not possible before an IP address, with capitals or underscores in the name, or, with TLS, with a dot in the
        name, since a certificate for `*.HOST` does not match it.
        """
        host = urlsplit(self.endpoint).hostname or ""
        has_tls_dot = "." in bucket and self.endpoint.startswith("https:")
        is_possible = not has_tls_dot and not _is_ip_address(host) and bool(_LABELS.fullmatch(bucket))
        return self.addressing == "virtual" and is_possible


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class HttpResponse:
    """A successful response; `HttpTransport` raises all others as errors."""

    status: int
    headers: Mapping[str, str]
    """Case-insensitive."""
    body: bytes

    @property
    def content_length(self) -> int:
        """Size of the object in bytes.

        Raises:
            StoreError: The header is missing or invalid.
        """
        text = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise StoreError("UnexpectedResponse", 0, "The store does not report the size of the object")
        return int(text)


class HttpTransport:
    """The connections to one store. Thread-safe."""

    def __init__(self, config: StoreConfig) -> None:
        """Prepare the connections; none is opened yet.

        Raises:
            StoreSettingError: The proxy or the file of certificates cannot be used.
        """
        self._address = urlsplit(config.endpoint).netloc
        self._is_secure = config.endpoint.startswith("https:")
        self._region = config.region
        self._timeout = config.timeout
        self._send_timeout = config.send_timeout or config.timeout
        self._proxy = None if config.proxy is None else Proxy.parse(config.proxy)
        try:
            self._pool = _create_pool(config, self._proxy)
        except (HTTPError, OSError, ValueError) as error:
            setting = "the file of certificates" if self._is_secure else "the proxy"
            raise StoreSettingError(
                f"The store {self._address} cannot be used with {setting} that is set: {_describe_cause(error)}"
            ) from None

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Sequence[Buffer] = (), *, limit: int
    ) -> HttpResponse:
        """Send a request and return its response.

        Args:
            method: `PUT`, …
            url: Quoted as it was signed.
            headers: Without Host and Content-Length.
            body: Pieces, which are not copied.
            limit: Maximum bytes of a successful response.

        Raises:
            BucketError: The store responded with an error, or with more than `limit`.
            TransientError: No response, or an incomplete one.
        """
        length = sum(memoryview(piece).nbytes for piece in body)
        lengths = {"Content-Length": str(length)} if body or method in ("PUT", "POST") else {}
        try:
            response = self._pool.urlopen(
                method,
                url,
                body=self._pieces(body) if length else None,
                headers={**headers, **lengths},
                redirect=False,
                preload_content=False,
                decode_content=False,
                pool_timeout=self._timeout,
            )
            with response:
                if response.status >= 300:
                    raise self._error_from(response.status, response.headers, response.read(_MAX_ERROR_BYTES))
                return self._read(response, limit)
        except (HTTPError, OSError) as error:
            raise self._error_without_response(error) from None

    def _pieces(self, body: Sequence[Buffer]) -> Iterator[memoryview]:
        """Split a body: the timeout applies to each piece, so a slow connection is allowed and a stalled one is not."""
        deadline, length = monotonic() + MAX_DURATION_FACTOR * self._timeout, _TLS_PIECE if self._is_secure else _PIECE
        for piece in body:
            view = memoryview(piece).cast("B")
            for start in range(0, view.nbytes, length):
                store_guard.check()
                if monotonic() > deadline:
                    raise TransientError("NoResponse", 0, self._too_slow(f"the store {self._address}"))
                yield view[start : start + length]

    def _read(self, response: urllib3.BaseHTTPResponse, limit: int) -> HttpResponse:
        pieces, remaining = list[bytes](), limit
        # Read until an empty piece: only then urllib3 raises an error for fewer bytes than Content-Length.
        while piece := response.read1(min(_PIECE, remaining + 1)):
            pieces.append(piece)
            remaining -= len(piece)
            if remaining < 0:
                raise StoreError("UnexpectedResponse", 0, f"The store sent more than the maximum of {limit} bytes")
        return HttpResponse(response.status, response.headers, b"".join(pieces))

    def _too_slow(self, server: str) -> str:
        return f"The connection to {server} is too slow: not finished after {MAX_DURATION_FACTOR * self._timeout:g} s"

    def _error_from(self, status: int, headers: Mapping[str, str], document: bytes) -> BucketError:
        """Return the error of a response from the store, or from a server in between."""
        fields = _parse_error(document)
        code = fields.get("Code", "")
        reason = responses.get(status, "no reason given")  # Ceph sends no message
        message = " ".join(fields.get("Message", "").split())[:_MAX_MESSAGE] or reason
        if (proxy_error := self._proxy_error(status, code, headers)) is not None:
            return proxy_error
        region = fields.get("Region") or headers.get("x-amz-bucket-region")
        endpoint = fields.get("Endpoint")
        if self._is_wrong_region(status, code, region, endpoint):
            return WrongRegion(code or find_row("", status).code, status, message, region=region, endpoint=endpoint)
        if 300 <= status < 400:
            message += _format_redirect(headers.get("Location", ""))
        return error_from_response(code, status, message, headers)

    def _is_wrong_region(self, status: int, code: str, region: str | None, endpoint: str | None) -> bool:
        """Whether the bucket is in another region, or permanently at another endpoint."""
        is_other = region is not None and region != self._region
        if status in (301, 307):
            return is_other or (status == 301 and bool(endpoint or code))
        # The response to HEAD has no code.
        return find_row(code, status).kind is Kind.REGION or (status == 400 and not code and is_other)

    def _proxy_error(self, status: int, code: str, headers: Mapping[str, str]) -> BucketError | None:
        """Return the error of a response that the proxy created; None if the store created the response."""
        if status != 407 and (self._proxy is None or self._is_secure):
            return None
        is_page = headers.get("Content-Type", "").startswith("text/html") and not code
        if status != 407 and not (is_page and status in (401, 403, 405)):
            return None
        return self._refused_by_proxy(status)

    def _error_without_response(self, error: Exception) -> BucketError:
        """Return the error of a request without a complete response."""
        causes = [*_find_causes(error)]
        is_proxy = self._proxy is not None and any(isinstance(cause, ProxyError) for cause in causes)
        address = self._proxy.address if self._proxy and is_proxy else self._address
        server = f"the proxy {address}" if is_proxy else f"the store {address}"
        for cause in causes:
            if tunnel := re.match(r"Tunnel connection failed: ([0-9]{3})", str(cause)):
                return self._refused_by_proxy(int(tunnel[1]))
            if isinstance(cause, ssl.SSLCertVerificationError):
                message = f"The certificate of {address} is not trusted: {cause.verify_message}"
                return StoreError("CertificateNotTrusted", 0, message)
        reason, timeout, connect_timeout = _describe_cause(error), f"{self._timeout:g} s", f"{self._send_timeout:g} s"
        unreachable = "ProxyUnreachable" if is_proxy else "ConnectionRefused"
        # The first row with one of the causes applies.
        for types, kind, code, message in (
            (_SlowResponseError, TransientError, "NoResponse", self._too_slow(server)),
            (socket.gaierror, UnreachableError, "NameNotResolved", f"The host name of {server} does not resolve"),
            (NewConnectionError, UnreachableError, unreachable, f"Cannot connect to {server}: {reason}"),
            (EmptyPoolError, NoConnectionError, "NoConnection", f"No connection to {server} was free for {timeout}"),
            (
                ConnectTimeoutError,
                UnreachableError,
                "ConnectTimeout",
                f"No connection to {server} within {connect_timeout}",
            ),
            (ssl.SSLError, TransientError, "TLSFailure", f"TLS with {server} failed: {reason}"),
            (HTTPTimeout, TransientError, "NoResponse", f"No byte sent to or received from {server} for {timeout}"),
            (ProxyError, UnreachableError, unreachable, f"No connection through {server}: {reason}"),
        ):
            if any(isinstance(cause, types) for cause in causes):
                return kind(code, 0, message)
        return TransientError("ConnectionLost", 0, f"The connection to {server} was lost: {reason}")

    def _refused_by_proxy(self, status: int) -> BucketError:
        proxy = f"The proxy {self._proxy.address if self._proxy else 'before the store'}"
        reason = f"{status} {responses.get(status, '')}".strip()
        if status == 407:
            return StoreError(
                "ProxyAuthenticationRequired", 0, f"{proxy} requires another user and password ({reason})"
            )
        if status >= 500 and find_row("", status).kind is Kind.TRANSIENT:
            return TransientError("ProxyFailed", 0, f"{proxy} cannot reach the store ({reason})")
        return StoreError("ProxyRefused", 0, f"{proxy} refuses the request ({reason})")


def _create_pool(config: StoreConfig, proxy: Proxy | None) -> urllib3.PoolManager:
    is_secure = config.endpoint.startswith("https:")
    manager = (
        urllib3.PoolManager
        if proxy is None
        else partial(urllib3.ProxyManager, proxy.url, proxy_headers=dict(proxy.headers))
    )
    pool = manager(
        maxsize=config.max_connections,
        block=True,
        retries=False,
        timeout=urllib3.Timeout(connect=config.send_timeout or config.timeout, read=config.timeout),
        ssl_context=ssl.create_default_context(cafile=config.ca) if is_secure else None,
    )
    pool.pool_classes_by_scheme = {"http": _Connections, "https": _SecureConnections}
    return pool


class _SlowResponseError(TimeoutError):
    """A response was not complete in time, although bytes arrived."""


class _TimedBytes(io.RawIOBase):
    """The bytes of one response, which must arrive within `MAX_DURATION_FACTOR` times the timeout of the socket.

    The socket's timeout applies to each read, so a server that sends single bytes would never reach it.
    """

    def __init__(self, received: io.RawIOBase, timeout: float) -> None:
        self._received = received
        self._deadline = monotonic() + MAX_DURATION_FACTOR * timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 (as the base class)
        if monotonic() > self._deadline:
            raise _SlowResponseError
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _TimedResponse(HTTPResponse):
    """Limits the time for a whole response, from the status line to the trailers; also for the response to CONNECT."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:  # noqa: ANN401 (as the base class)
        super().__init__(sock, *args, **options)
        timeout = sock.gettimeout()
        if timeout is not None:
            self.fp = io.BufferedReader(_TimedBytes(self.fp.detach(), timeout))


class _CheckedConnection(HTTPConnection):
    """Calls the write guard when there is a connection, before the first byte of a request."""

    response_class = _TimedResponse

    def request(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 (as urllib3's own)
        if self.is_closed:
            self.connect()
        if self.sock is not None:  # a reused connection still has the timeout of its last response
            self.sock.settimeout(self.timeout)
        store_guard.check()
        super().request(*args, **options)


class _CheckedSecureConnection(_CheckedConnection, HTTPSConnection):
    """Calls the write guard for a connection with TLS."""


class _Connections(urllib3.HTTPConnectionPool):
    ConnectionCls = _CheckedConnection


class _SecureConnections(urllib3.HTTPSConnectionPool):
    ConnectionCls = _CheckedSecureConnection


def _format_redirect(location: str) -> str:
    """Return the target of a redirect for a message; empty if it names no server."""
    try:
        parts = urlsplit(location)
        host = parts.hostname
    except ValueError:  # for example http://[x/
        return ""
    return f", to {parts.scheme or 'http'}://{parts.netloc.rpartition('@')[2]}" if host else ""


def _parse_error(document: bytes) -> Mapping[str, str]:
    """Return the elements of S3's error document; none for another document."""
    try:
        root = ET.fromstring(document)  # noqa: S314 (expat limits entities, and the length is limited)
    except (ET.ParseError, LookupError, ValueError):  # the last two: an unknown or unsupported encoding
        return {}
    return {child.tag.rpartition("}")[2]: (child.text or "")[:_MAX_MESSAGE] for child in root}


def _find_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors in its arguments, its wrapped error, its cause and its context, recursively."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        linked = (*cause.args, getattr(cause, "original_error", None), cause.__cause__, cause.__context__)
        waiting += [other for other in linked if isinstance(other, BaseException)]


def _describe_cause(error: BaseException) -> str:
    """Return the system's message for the cause of an error, or the name of the innermost error class."""
    causes = [*_find_causes(error)]
    message = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), None)
    return message or type(causes[-1]).__name__


class SignedClient:
    """Sends requests to one store, signed with one access key or not signed."""

    def __init__(self, config: StoreConfig, transport: HttpTransport, credentials: Credentials | None = None) -> None:
        """Sign with `credentials`; without them with the current credentials of `config` for each request."""
        self._config = config
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
        limit: int = MAX_DOCUMENT,
    ) -> HttpResponse:
        """Send a request for an object, a bucket, or (None) all buckets.

        Raises:
            InvalidBucketName, InvalidArgument: The name of the bucket or the key is not possible.
            BucketError: See `HttpTransport.send`.
        """
        url = self._config.url(bucket, key, query)
        credentials = self._credentials or self._config.current_credentials()
        signed = self._sign(method, url, headers or {}, credentials)
        try:
            response = self._transport.send(method, url, signed, body, limit=limit)
        except BucketError as error:
            error.access_key_id = credentials.access_key_id if credentials else None
            raise
        has_length = any(name in response.headers for name in ("Content-Length", "Transfer-Encoding"))
        if response.status != 204 and not has_length:
            # Every store sends a length. Without it the headers were cut off, which Python's HTTP parser accepts.
            raise TransientError("ConnectionLost", 0, "The headers of the store's response were cut off")
        return response

    def _sign(self, method: str, url: str, headers: Mapping[str, str], key: Credentials | None) -> Mapping[str, str]:
        if key is None:
            return headers
        request = AWSRequest(method, url, headers=dict(headers))
        credentials = BotocoreCredentials(key.access_key_id, key.secret_access_key, key.session_token)
        _UnsignedPayload(credentials, "s3", self._config.region).add_auth(request)
        return dict(request.headers.items())


class _UnsignedPayload(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    def payload(self, _request: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"
