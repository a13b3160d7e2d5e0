"""The HTTP server: listens, with or without TLS, and limits the resources of one client. No EC2 here.

uvicorn and httptools implement HTTP; this module adds the limits. Bytes are counted when they arrive, before they are
parsed: of the head of a request, of its body with the framing, and of requests sent before earlier ones are answered. A
client has `request_timeout` seconds to send a request, and as many to receive the response. Connections above
`max_connections` are closed at once. Plain HTTP is for loopback addresses only, unless `plain_http` allows more.

    ListeningError
    ├── AddressError          the service cannot listen on the address
    ├── CertificateError      the certificate and key cannot be used
    ├── FileLimitError        the process may not open enough files
    └── PlainHttpNotAllowed   plain HTTP on an address that other hosts can reach
"""

import asyncio
import ipaddress
import resource
import socket
import ssl
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httptools
import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from thrave.concurrency import start_thread
from thrave.config import MAX_MONITORING_CONNECTIONS, Settings

GRACEFUL_SHUTDOWN_TIMEOUT = 3  # seconds for the requests in progress when the service stops
KEEP_ALIVE_TIMEOUT = 5  # seconds that a connection may be idle between two requests
MAX_HEAD_SIZE = 128 * 1024  # bytes of a request line and headers; 64 KiB of them are for a query string
MAX_TARGET_SIZE = 66 * 1024  # bytes of a request's path and query string
MAX_HEADERS = 100
# Bytes of a body that are kept: the API's limit, and one more to detect that the limit is exceeded.
MAX_CONTENT_SIZE = 64 * 1024 + 1
MAX_BODY_SIZE = 8 * 1024 * 1024  # bytes of a body that are read; a too large body gets its error response earlier
MAX_CHUNKED_SIZE = 256 * 1024  # bytes of a chunked body that are read, with extensions and trailers
MAX_CHUNKS = 512
MAX_PIPELINED_REQUESTS = 8  # requests that a client may send before an earlier one is answered
MONITORING_TIMEOUT = 30.0  # seconds for a request to the monitoring listener, and for its response
SLICE = 16 * 1024  # bytes that are parsed before the limits are checked again

log = structlog.get_logger()


class ListeningError(Exception):
    """The service cannot listen with these settings."""


class AddressError(ListeningError):
    """The address is in use, not an address of this machine, or not an address at all."""


class CertificateError(ListeningError):
    """The certificate or the key is missing, damaged, encrypted, or they do not belong together."""


class FileLimitError(ListeningError):
    """The limit of open files is too low for the settings."""


class PlainHttpNotAllowed(ListeningError):
    """Every host on the network could read the requests."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """A certificate and its key.

    Attributes:
        certificate: PEM, followed by the intermediate certificates, if there are any.
        key: PEM, not encrypted.
    """

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raise CertificateError if a server cannot use the two files."""
        try:
            # Without a password OpenSSL would prompt for that of an encrypted key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            raise CertificateError(f"{self.certificate} and {self.key} cannot be used for TLS: {reason}") from error


class HttpServer:
    """Listens from its creation on, and serves an application.

    Args:
        settings: Address, certificate and limits.

    Raises:
        ListeningError: The settings cannot be used, or are not allowed.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        _raise_file_limit(settings.max_open_files)
        self._tls = _read_tls(settings)
        self._socket = _listen(settings.listen_address, settings.listen_port, "listen")
        if not (self._tls or settings.plain_http == "anywhere" or _is_loopback(self._socket)):
            self._socket.close()
            raise PlainHttpNotAllowed(
                f"Other hosts can reach {settings.listen_address}, and plain HTTP can be read by them: set "
                'tls_certificate_file and tls_key_file, or plain_http = "anywhere" if a proxy in front of the service '
                "uses TLS."
            )

    @property
    def url(self) -> str:
        """The URL for clients, with the actual port if the setting is 0."""
        return _url(self._socket, "https" if self._tls else "http")

    def serve(self, app: ASGIApp, on_listening: Callable[[str], None]) -> None:
        """Answer requests until SIGTERM or SIGINT; call `on_listening(url)` when requests are answered."""
        config = _server_config(app, self._settings.max_connections, self._settings.request_timeout, self._tls)
        _Server(config, partial(on_listening, self.url)).run(sockets=[self._socket])


class MonitoringServer:
    """Listens on the address of the monitoring settings from its creation on, and serves an application in a thread.

    Plain HTTP, without authentication: it serves nothing that is secret and changes nothing.

    Args:
        address: Address of this machine.
        port: 0: any free port.

    Raises:
        ListeningError: The service cannot listen on the address.
    """

    def __init__(self, address: str, port: int) -> None:
        self._socket = _listen(address, port, "monitoring")

    @property
    def url(self) -> str:
        """The URL, with the actual port."""
        return _url(self._socket, "http")

    def start(self, app: ASGIApp) -> None:
        """Answer requests from now on, until the process ends."""
        config = _server_config(app, MAX_MONITORING_CONNECTIONS, MONITORING_TIMEOUT, None)
        start_thread(
            "monitoring",
            lambda: _Server(config, lambda: None).run(sockets=[self._socket]),
            on_failure=lambda error: log.error("background job failed", job="monitoring", exc_info=error),
        )


def open_monitoring(settings: Settings) -> MonitoringServer | None:
    """Listen for monitoring, if the settings name a port. Raises ListeningError."""
    if settings.monitoring_port is None:
        return None
    return MonitoringServer(settings.monitoring_address, settings.monitoring_port)


def _server_config(app: ASGIApp, max_connections: int, request_timeout: float, tls: Tls | None) -> "_Config":
    config = _Config(
        app,
        http=ClientConnection,
        loop="asyncio",  # also if another one is installed: `_PEER` depends on it
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # any client could send them
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_TIMEOUT,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    config.max_connections = max_connections
    config.request_timeout = request_timeout
    if tls:
        config.load()
        assert config.ssl is not None
        config.ssl.sslobject_class = _TlsConnection
    return config


class _Config(uvicorn.Config):
    """uvicorn's settings, with those of a `ClientConnection`."""

    max_connections: int
    request_timeout: float


class _LimitExceeded(Exception):
    """A request exceeds a limit while it is parsed. The message is for the client."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ClientConnection(HttpToolsProtocol):
    """One client connection of uvicorn, with a request timeout and limits on what is parsed.

    One timer is enough. It runs while the client must act: send the rest of a request, receive a response, send its
    next request. It does not run while the service handles a request. When it ends, the connection is closed, and
    buffered data is dropped.
    """

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._max_connections = config.max_connections
        self._timeout = config.request_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._is_in_head = True  # of a request whose head has not ended, or before one
        self._received = 0  # bytes of this head, or of this body
        self._content = 0  # bytes of this body without its framing
        self._chunks = 0
        self._is_finished = False  # nothing more is parsed
        self._is_new = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Accept the connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            log.warning("too many connections", limit=self._max_connections, remote=self._remote)
            self._is_finished = True
            transport.abort()
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the received bytes slice by slice, up to the limits."""
        self._unset_keepalive_if_required()
        if self._is_new and data[:2] == _TLS_HANDSHAKE:
            log.warning("TLS on the port of plain HTTP", advice="TLS? Use http:// in the URL", remote=self._remote)
            self._is_finished = True
            self.transport.abort()
        self._is_new = False
        rest = memoryview(data)
        while rest and not self._is_finished:
            self._parse(rest[:SLICE])
            rest = rest[SLICE:]
        self._update_timer()

    def _parse(self, data: memoryview) -> None:
        self._received += len(data)
        try:
            self._check_size()
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request is handled as an ordinary one. The bytes after it are in a protocol that is not supported.
            self._is_finished = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            reason = error.__context__ if isinstance(error.__context__, _LimitExceeded) else None
            self._refuse(reason or _LimitExceeded("400 Bad Request", "Invalid HTTP request received."))
        except _LimitExceeded as reason:
            self._refuse(reason)

    def _check_size(self) -> None:
        if self._is_in_head and self._received > MAX_HEAD_SIZE:
            raise _LimitExceeded(*_HEAD_TOO_LARGE)
        if not self._is_in_head and self._received > (MAX_CHUNKED_SIZE if self._chunks else MAX_BODY_SIZE):
            raise _LimitExceeded("413 Content Too Large", "The request's body is too long.")

    def _refuse(self, reason: _LimitExceeded) -> None:
        """Send the reason as plain text, unless a response has begun, and close the connection."""
        log.warning("bad HTTP request", reason=str(reason), remote=self._remote)
        self._is_finished = True
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's annotation ignores the initial None
        if cycle is not None and cycle.more_body:  # the request of this cycle is the one that is refused
            was_answered = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
        else:
            was_answered = False
        if was_answered or self.pipeline:
            self.transport.close()
            return
        body = str(reason).encode()
        head = f"HTTP/1.1 {reason.status}\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """Start to count the head of a request; refuse the request if too many are waiting."""
        if len(self.pipeline) >= MAX_PIPELINED_REQUESTS:
            raise _LimitExceeded(
                "400 Bad Request", f"More than {MAX_PIPELINED_REQUESTS} requests were sent before a response."
            )
        self._is_in_head, self._content, self._chunks = True, 0, 0
        # At most the slice that was parsed last; some of its bytes belong to the request before.
        self._received = min(self._received, SLICE)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add a piece of the path and query string."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET_SIZE:
            raise _LimitExceeded(
                "414 URI Too Long", f"The path and query string are longer than {MAX_TARGET_SIZE} bytes."
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header. Trailers of a body are ignored."""
        if not self._is_in_head:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _LimitExceeded(_HEAD_TOO_LARGE[0], f"The request has more than {MAX_HEADERS} headers.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to count the body."""
        if sum(name == b"host" for name, _ in self.headers) > 1:
            raise _LimitExceeded("400 Bad Request", "The request has more than one Host header.")
        self._is_in_head, self._received = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep at most `MAX_CONTENT_SIZE` bytes of the body."""
        free = MAX_CONTENT_SIZE - self._content
        self._content += len(body)
        if free > 0:
            super().on_body(body[:free])

    def on_chunk_header(self) -> None:
        """Count the chunks of a body."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise _LimitExceeded("400 Bad Request", f"The body has more than {MAX_CHUNKS} chunks.")

    def on_message_complete(self) -> None:
        """Start to count the head of the next request."""
        self._is_in_head, self._received = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait until the client has received the response, and for its next request."""
        super().on_response_complete()
        self._update_timer()

    def pause_writing(self) -> None:
        """Wait until the client has received a part of a long response."""
        super().pause_writing()
        self._update_timer()

    def resume_writing(self) -> None:
        """Continue to send the response."""
        super().resume_writing()
        self._update_timer()

    @property
    def _remote(self) -> str | None:
        return self.client and self.client[0]

    def _is_between_requests(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's annotation ignores the initial None
        return cycle is None or cycle.response_complete

    def _update_timer(self) -> None:
        if self._is_between_requests() or self.cycle.more_body or self.flow.write_paused:
            self._start_timer()
        else:
            self._stop_timer()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._timeout, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_TLS_HANDSHAKE = b"\x16\x03"  # RFC 8446, 5.1: type of a handshake record, and first byte of its version
_HEAD_TOO_LARGE = ("431 Request Header Fields Too Large", f"The request's head is longer than {MAX_HEAD_SIZE} bytes.")

_PEER: ContextVar[str] = ContextVar("_PEER", default="")
"""Address of the client of the current connection. asyncio copies the context in which a connection was accepted to all
calls for that connection."""


class _ListeningSocket(socket.socket):
    """A socket that stores the address of each accepted client in `_PEER`, for the log of failed handshakes."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, as `socket.socket` does."""
        connection, address = super().accept()
        _PEER.set(address[0])
        return connection, address


class _TlsConnection(ssl.SSLObject):
    """A TLS connection that logs a failed handshake; asyncio logs it in its debug mode only."""

    def do_handshake(self) -> None:
        """Do the next step of the handshake."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            advice = {"advice": "TLS? Use https:// in the URL"} if error.reason == "HTTP_REQUEST" else {}
            log.warning("TLS handshake failed", error=error.reason, remote=_PEER.get(), **advice)
            raise


class _Server(uvicorn.Server):
    """uvicorn's server, with a callback when it answers requests."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()


def _raise_file_limit(needed: int) -> None:
    """Raise the limit of open files of this process to the number that it needs.

    Raises:
        FileLimitError: The hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FileLimitError(
            f"This process may open {hard} files, and {needed} may be needed. Raise the limit (LimitNOFILE= in the "
            "service's unit, ulimit -n), or lower `max_connections`."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _read_tls(settings: Settings) -> Tls | None:
    if settings.tls_certificate_file is None or settings.tls_key_file is None:
        return None
    tls = Tls(certificate=settings.tls_certificate_file, key=settings.tls_key_file)
    tls.check()
    return tls


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _listen(host: str, port: int, setting: str) -> socket.socket:
    """Listen on an address, which the settings `{setting}_address` and `{setting}_port` name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server_socket = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:  # socket.gaierror is one
        raise AddressError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Change `{setting}_address` or "
            f"`{setting}_port`."
        ) from error
    listener = _ListeningSocket(family, fileno=server_socket.detach())
    listener.set_inheritable(False)
    # Connections inherit the option. A response is sent in two pieces, and without it the second waits 40 ms for the
    # client to acknowledge the first. asyncio sets it only on sockets that it created itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
