"""A TCP relay between clients and the service, which records the requests of the clients."""

import re
import socket
import socketserver
import threading
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

BUFFER = 65536


class RequestStyle(NamedTuple):
    """Method, API version and signature of a request."""

    method: str
    api_version: str
    signature: str


class Relay(socketserver.ThreadingTCPServer):
    """Forwards all data to `upstream`, a host and port."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), ForwardHandler)
        self.upstream = upstream
        self.sent = bytearray()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def clear(self) -> None:
        """Delete the recorded requests."""
        self.sent.clear()

    def style(self) -> RequestStyle:
        """Return method, API version and signature of the recorded requests; all must be equal."""
        requests = bytes(self.sent)
        (method,) = set(re.findall(rb"(?m)^([A-Z]+) /\S* HTTP/1\.1\r", requests))
        (version,) = set(re.findall(rb"[&?\n]Version=([\d-]+)", requests))
        signed = set(re.findall(rb"AWS(4)-HMAC-SHA256 |[&?\n]SignatureVersion=(\d)", requests))
        ((four, other),) = signed
        return RequestStyle(method.decode(), version.decode(), f"version {(four or other).decode()}")


class ForwardHandler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Relay

    def handle(self) -> None:
        with socket.create_connection(self.server.upstream) as upstream:
            back = threading.Thread(target=self._forward, args=(upstream, self.request), daemon=True)
            back.start()
            self._forward(self.request, upstream, self.server.sent)
            back.join()

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket, record: bytearray | None = None) -> None:
        try:
            while data := source.recv(BUFFER):
                if record is not None:
                    record.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # one side has closed the connection


@contextmanager
def relaying(url: str):
    """Run a relay to the service at `url`."""
    place = urlsplit(url)
    with Relay((place.hostname, place.port)) as relay:
        thread = threading.Thread(target=relay.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield relay
        finally:
            relay.shutdown()
            thread.join()
