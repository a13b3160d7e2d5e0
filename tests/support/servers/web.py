"""A real web server for the files of a folder, which can also behave like a hostile or broken one."""

import ssl
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Behaviour = Callable[[SimpleHTTPRequestHandler], bool]
"""Answers a request; returns False for the ordinary response."""


@dataclass
class Site:
    """A running server.

    Attributes:
        url: URL of the folder.
        behaviour: Behaviour by the end of a file name; the first that matches is used.
        requested: (method, path) of every request.
        ended: Set when the test has ended.
    """

    url: str
    behaviour: dict[str, Behaviour] = field(default_factory=dict)
    requested: list[tuple[str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving_files(folder: Path, *, certificate: Path | None = None):
    """Serve a folder on a free port of 127.0.0.1, over TLS if there is a file with certificate and key."""
    site = Site("")

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            self._answer(super().do_GET)

        def do_HEAD(self):
            self._answer(super().do_HEAD)

        def _answer(self, properly):
            site.requested.append((self.command, self.path))
            for ending, behave in site.behaviour.items():
                if self.path.endswith(ending) and behave(self):
                    return
            properly()

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # clients that give up

    server = Server(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    site.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield site
    finally:
        site.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def status(code: int, **headers: str) -> Behaviour:
    """Answer with a status, and headers."""

    def behave(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return behave


def times(count: int, behave: Behaviour) -> Behaviour:
    """Use a behaviour for the first requests only."""
    remaining = [count]

    def limited(handler):
        remaining[0] -= 1
        return remaining[0] >= 0 and behave(handler)

    return limited


def endless(handler) -> bool:
    """Answer with a body that does not end."""
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**18))
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def promising(length: int, body: bytes) -> Behaviour:
    """Announce a length of the body, and send another one."""

    def behave(handler):
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return behave


longer_than_said = promising(10, b"<manifest>" * 100)
cut_off = promising(1_000_000, b"x" * 1000)


def hung_up(handler) -> bool:
    """Close the connection without a response."""
    handler.close_connection = True
    return True


def gibberish(handler) -> bool:
    """Answer with bytes that are not HTTP."""
    handler.close_connection = True
    handler.wfile.write(b"\xff\x00 SSH-2.0 what?\r\n\r\n")
    return True


def endless_headers(handler) -> bool:
    """Answer with headers that do not end."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-More: " + b"x" * 60000 + b"\r\n")


def trickle(site: Site) -> Behaviour:
    """Send headers that never end, a byte at a time, so that there is always progress."""

    def behave(handler):
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not site.ended.wait(0.05):
            handler.wfile.write(b"x")
        return True

    return behave


def hidden_size(handler) -> bool:
    """Answer to HEAD without a length."""
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    return True
