"""The HTTP server: where it listens, whether it speaks TLS, and how little a client can cost it.

uvicorn speaks HTTP; what it leaves open is closed here. A client has `request_timeout` seconds to send a whole request,
and as many to take its answer; a request's head has a limit, and so has the number of connections: one more is closed
as soon as it is made. Plain HTTP is spoken on loopback only, unless the operator says otherwise. What a request means
is not known here.

    ListeningError
    ├── AddressError        the address cannot be listened on
    ├── CertificateError    the certificate and key cannot be used
    └── PlainHttpRefused    it would be plain HTTP on an address that others can reach
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from thrave.config import Settings

GRACEFUL_SHUTDOWN = 3  # seconds that a request under way has to be answered when the service is asked to stop
KEEP_ALIVE = 5  # seconds that a connection may be idle between two requests
HEAD_LIMIT = 128 * 1024  # bytes of a request's line and headers; a query string has 64 KiB of them

log = structlog.get_logger()


class ListeningError(Exception):
    """The service cannot listen as it was told to."""


class AddressError(ListeningError):
    """The address is in use, not ours, or no address."""


class CertificateError(ListeningError):
    """The certificate or the key is missing, damaged, encrypted, or they do not belong together."""


class PlainHttpRefused(ListeningError):  # noqa: N818 (says what happened)
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


class Listener:
    """A socket that listens, and the server behind it.

    Args:
        settings: The address, the certificate, the limits.

    Raises:
        ListeningError: They cannot be used, or must not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tls = _tls(settings)
        self._socket = _listen(settings.host, settings.port)
        if not (self._tls or settings.plain_http == "anywhere" or _is_loopback(self._socket)):
            self._socket.close()
            raise PlainHttpRefused(
                f"{settings.host} can be reached by others, and plain HTTP can be read by them: set tls_certificate and"
                ' tls_key, or plain_http = "anywhere" if something in front of the service speaks TLS'
            )

    @property
    def url(self) -> str:
        """Where clients find it, with the port that it really has."""
        host, port = self._socket.getsockname()[:2]
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self, app: Starlette, listening: Callable[[str], None]) -> None:
        """Answer requests until SIGTERM or SIGINT; call `listening(url)` once they are answered."""
        config = _Config(
            app,
            http=Connection,
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
        config.connections = self._settings.connections
        config.request_timeout = self._settings.request_timeout
        _Server(config, partial(listening, self.url)).run(sockets=[self._socket])


class _Config(uvicorn.Config):
    """uvicorn's settings, and ours of a connection."""

    connections: int
    request_timeout: float


class Connection(HttpToolsProtocol):
    """A client's connection: uvicorn's, with an end to its patience.

    One timer is enough: it runs while the client has to do something (send the rest of a request, take an answer, say
    what it wants next) and stands still while we have. When it ends, so does the connection, whatever is buffered.
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
        self._patience = config.request_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._head = 0  # bytes received of a request of which no more is known

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Take it, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            log.warning("too many connections", limit=self._limit)
            transport.abort()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_expecting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, never more of a head than the limit."""
        self._head += len(data)
        super().data_received(data)
        if not self._is_between_requests():
            self._head = 0
        elif self._head > HEAD_LIMIT:
            self.transport.abort()
        self._see_whose_turn_it_is()

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

    def _is_between_requests(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's annotation leaves the beginning out
        return cycle is None or cycle.response_complete

    def _see_whose_turn_it_is(self) -> None:
        if self._is_between_requests() or self.cycle.more_body or self.flow.write_paused:
            self._expect()
        else:
            self._stop_expecting()

    def _expect(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._patience, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it answers."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()


def _tls(settings: Settings) -> Tls | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    tls = Tls(certificate=settings.tls_certificate, key=settings.tls_key)
    tls.check()
    return tls


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:  # socket.gaierror is one
        raise AddressError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listener.set_inheritable(False)
    # Connections inherit it. An answer is sent in two pieces, and the second would else wait 40 ms for the client to
    # acknowledge the first; asyncio sees to that only on sockets that it has made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
