"""The HTTP server: where it listens, whether it speaks TLS, and how much a client can cost it.

uvicorn and httptools speak HTTP; this module adds the limits. Bytes are counted where they arrive, before they are
parsed: of a request's head, of its body with whatever frames it, and of requests that are sent ahead of answers. A
client has `request_timeout` seconds to send a whole request, and as many to take its answer. The number of connections
has a limit: one more is closed as soon as it is made. Plain HTTP is spoken on loopback only, unless the operator allows
more.
What a request means is not known here.

    ListeningError
    ├── AddressError        the address cannot be listened on
    ├── CertificateError    the certificate and key cannot be used
    ├── FileLimitError      the process may not open enough files
    └── PlainHttpRefused    it would be plain HTTP on an address that others can reach
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

from thrave.config import Settings

GRACEFUL_SHUTDOWN = 3  # seconds that a request under way has to be answered when the service is asked to stop
KEEP_ALIVE = 5  # seconds that a connection may be idle between two requests
HEAD_LIMIT = 128 * 1024  # bytes of a request's line and headers; a query string has 64 KiB of them
TARGET_LIMIT = 66 * 1024  # bytes of a request's path and query string
MAX_HEADERS = 100
CONTENT_LIMIT = 64 * 1024 + 1  # bytes of a body that are kept: what the API takes, and one more to show it more came
BODY_LIMIT = 8 * 1024 * 1024  # bytes of a body that are read; whoever sends so many is told first that it is too much
CHUNKED_LIMIT = 256 * 1024  # bytes of a chunked body that are read, with extensions and trailers
MAX_CHUNKS = 512
MAX_AHEAD = 8  # requests that a client may send before it has taken the answer to an earlier one
SLICE = 16 * 1024  # bytes that are parsed before the limits are checked again

log = structlog.get_logger()


class ListeningError(Exception):
    """The service cannot listen as it was told to."""


class AddressError(ListeningError):
    """The address is in use, not ours, or no address."""


class CertificateError(ListeningError):
    """The certificate or the key is missing, damaged, encrypted, or they do not belong together."""


class FileLimitError(ListeningError):
    """The limit of open files is too low for the settings."""


class PlainHttpNotAllowed(ListeningError):
    """Signed requests would cross a network readable by everybody on it."""


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
        """Raise CertificateError if a server cannot use them."""
        try:
            # The password is for an encrypted key, which is to fail instead of asking for it.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            raise CertificateError(f"{self.certificate} and {self.key} cannot be used for TLS: {reason}") from error


class HttpServer:
    """A socket that listens, and the server behind it.

    Args:
        settings: The address, the certificate, the limits.

    Raises:
        ListeningError: They cannot be used, or must not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        _allow_open_files(settings.max_open_files)
        self._tls = _tls(settings)
        self._socket = _listen(settings.listen_address, settings.listen_port)
        if not (self._tls or settings.plain_http == "anywhere" or _is_loopback(self._socket)):
            self._socket.close()
            raise PlainHttpNotAllowed(
                f"{settings.listen_address} can be reached by others, and plain HTTP can be read by them: set "
                'tls_certificate_file and tls_key_file, or plain_http = "anywhere" if something in front of the '
                "service speaks TLS"
            )

    @property
    def url(self) -> str:
        """Where clients find it, with the port that it really has."""
        host, port = self._socket.getsockname()[:2]
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self, app: ASGIApp, listening: Callable[[str], None]) -> None:
        """Answer requests until SIGTERM or SIGINT; call `listening(url)` once they are answered."""
        config = _Config(
            app,
            http=ClientConnection,
            loop="asyncio",  # whatever else is installed: `_PEER` relies on it
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # whoever reaches us could write them
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN,
            ssl_certfile=self._tls.certificate if self._tls else None,
            ssl_keyfile=self._tls.key if self._tls else None,
        )
        config.connections = self._settings.max_connections
        config.request_timeout = self._settings.request_timeout
        if self._tls:
            config.load()
            assert config.ssl is not None
            config.ssl.sslobject_class = _TlsConnection
        _Server(config, partial(listening, self.url)).run(sockets=[self._socket])


class _Config(uvicorn.Config):
    """uvicorn's settings, and ours of a connection."""

    connections: int
    request_timeout: float


class _LimitExceeded(Exception):
    """A request is refused while it is parsed; the text is for the client."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ClientConnection(HttpToolsProtocol):
    """One client connection: uvicorn's, with a request timeout and limits on what is parsed.

    One timer is enough: it runs while the client has to do something (send the rest of a request, take an answer, send
    its next request) and stands still while we have. When it ends, so does the connection, whatever is buffered.
    """

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limit = config.connections
        self._timeout = config.request_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True  # of a request whose head has not ended, or before one
        self._received = 0  # bytes of this head, or of this body
        self._content = 0  # bytes of this body without its framing
        self._chunks = 0
        self._is_finished = False  # nothing more is parsed
        self._is_new = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Take it, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            log.warning("too many connections", limit=self._limit, remote=self._remote)
            self._is_finished = True
            transport.abort()
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, a slice at a time, and never more than the limits allow."""
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
        self._see_whose_turn_it_is()

    def _parse(self, data: memoryview) -> None:
        self._received += len(data)
        try:
            self._check_size()
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # It has been handed on as an ordinary request. What follows is in a protocol that is not spoken here.
            self._is_finished = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            reason = error.__context__ if isinstance(error.__context__, _LimitExceeded) else None
            self._refuse(reason or _LimitExceeded("400 Bad Request", "Invalid HTTP request received."))
        except _LimitExceeded as reason:
            self._refuse(reason)

    def _check_size(self) -> None:
        if self._in_head and self._received > HEAD_LIMIT:
            raise _LimitExceeded(*_HEAD_TOO_LARGE)
        if not self._in_head and self._received > (CHUNKED_LIMIT if self._chunks else BODY_LIMIT):
            raise _LimitExceeded("413 Content Too Large", "The request's body is too long.")

    def _refuse(self, reason: _LimitExceeded) -> None:
        """Answer in plain text, unless an answer is under way, and close the connection."""
        log.warning("bad HTTP request", reason=str(reason), remote=self._remote)
        self._is_finished = True
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's annotation leaves the beginning out
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
        """Begin to count a request's head; refuse it if too many are waiting."""
        if len(self.pipeline) >= MAX_AHEAD:
            raise _LimitExceeded("400 Bad Request", f"More than {MAX_AHEAD} requests were sent ahead of answers.")
        self._in_head, self._content, self._chunks = True, 0, 0
        self._received = min(
            self._received, SLICE
        )  # at most what was fed last, of which some belongs to the one before
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the path and query string."""
        super().on_url(url)
        if len(self.url) > TARGET_LIMIT:
            raise _LimitExceeded("414 URI Too Long", f"The path and query string are longer than {TARGET_LIMIT} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or one of a body's trailers, which nobody reads."""
        if not self._in_head:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _LimitExceeded(_HEAD_TOO_LARGE[0], f"The request has more than {MAX_HEADERS} headers.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to count the body."""
        if sum(name == b"host" for name, _ in self.headers) > 1:
            raise _LimitExceeded("400 Bad Request", "The request has more than one Host header.")
        self._in_head, self._received = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep as much of the body as is read."""
        wanted = CONTENT_LIMIT - self._content
        self._content += len(body)
        if wanted > 0:
            super().on_body(body[:wanted])

    def on_chunk_header(self) -> None:
        """Count the chunks of a body."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise _LimitExceeded("400 Bad Request", f"The body has more than {MAX_CHUNKS} chunks.")

    def on_message_complete(self) -> None:
        """Begin to count the next request's head."""
        self._in_head, self._received = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the client to take the answer, and for its next request."""
        super().on_response_complete()
        self._see_whose_turn_it_is()

    def pause_writing(self) -> None:
        """Wait for the client to take some of a long answer."""
        super().pause_writing()
        self._see_whose_turn_it_is()

    def resume_writing(self) -> None:
        """Go on: it has."""
        super().resume_writing()
        self._see_whose_turn_it_is()

    @property
    def _remote(self) -> str | None:
        return self.client and self.client[0]

    def _is_between_requests(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's annotation leaves the beginning out
        return cycle is None or cycle.response_complete

    def _see_whose_turn_it_is(self) -> None:
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


_TLS_HANDSHAKE = b"\x16\x03"  # RFC 8446, 5.1: a handshake record's type, and the first byte of its version
_HEAD_TOO_LARGE = ("431 Request Header Fields Too Large", f"The request's head is longer than {HEAD_LIMIT} bytes.")

_PEER: ContextVar[str] = ContextVar("_PEER", default="")
"""The address of the client whose connection is being served. asyncio copies the context in which a connection was
accepted to whatever it calls for that connection."""


class _ListeningSocket(socket.socket):
    """A socket that notes whose connection it has accepted, for what happens before there is a `ClientConnection`."""

    def accept(self) -> tuple[socket.socket, Any]:
        """As any other's."""
        connection, address = super().accept()
        _PEER.set(address[0])
        return connection, address


class _TlsConnection(ssl.SSLObject):
    """A TLS connection that logs a handshake that fails. asyncio does so in its debug mode alone."""

    def do_handshake(self) -> None:
        """Go on with the handshake."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            advice = {"advice": "TLS? Use https:// in the URL"} if error.reason == "HTTP_REQUEST" else {}
            log.warning("TLS handshake failed", what=error.reason, remote=_PEER.get(), **advice)
            raise


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it answers."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()


def _allow_open_files(needed: int) -> None:
    """Raise the process's limit of open files as far as it needs.

    Raises:
        FileLimitError: It may not be raised so far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FileLimitError(
            f"This process may open {hard} files, and {needed} may be needed. Raise the limit (LimitNOFILE= in the"
            " service's unit, ulimit -n), or lower `max_connections`."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _tls(settings: Settings) -> Tls | None:
    if settings.tls_certificate_file is None or settings.tls_key_file is None:
        return None
    tls = Tls(certificate=settings.tls_certificate_file, key=settings.tls_key_file)
    tls.check()
    return tls


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:  # socket.gaierror is one
        raise AddressError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listener = _ListeningSocket(family, fileno=made.detach())
    listener.set_inheritable(False)
    # Connections inherit it. An answer is sent in two pieces, and the second would else wait 40 ms for the client to
    # acknowledge the first; asyncio sees to that only on sockets that it has made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
