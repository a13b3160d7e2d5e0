"""An HTTP proxy before a store that injects faults into requests on the wire.

A `Rule` names the kind of request, the fault, and the first request of that kind that gets the fault. Requests without
a rule are forwarded unchanged, with their Host header and signature.
"""

import re
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Kind(StrEnum):
    """The requests that Thrave sends to a store."""

    LIST_BUCKETS = "list buckets"
    CREATE_BUCKET = "create bucket"
    HEAD_BUCKET = "HEAD bucket"
    LIST_OBJECTS = "list objects"
    GET_OBJECT = "GET object"
    GET_RANGE = "GET range"
    HEAD_OBJECT = "HEAD object"
    PUT_OWNER = "PUT owner"
    PUT_OBJECT = "PUT object"
    PUT_MANIFEST = "PUT manifest"
    POST_OBJECT = "POST object"
    POST_MANIFEST = "POST manifest"
    DELETE_OBJECTS = "delete objects"
    DELETE_OBJECT = "DELETE object"
    DELETE_BUCKET = "DELETE bucket"


@dataclass(frozen=True)
class StoreResponse:
    """The response of the store."""

    status: int
    headers: list[tuple[str, str]]
    content: bytes


class Exchange:
    """One request in progress, with the operations that faults use."""

    def __init__(self, handler: BaseHTTPRequestHandler, store: str, test_ended: threading.Event) -> None:
        self._handler = handler
        self._store = urlsplit(store)
        self._remaining = int(handler.headers.get("Content-Length", 0))
        self.test_ended = test_ended
        """Ends faults that stall."""

    def read(self, max_bytes: int | None = None) -> bytes:
        """Read the body of the request: all that remains, or at most `max_bytes`."""
        data = self._handler.rfile.read(self._remaining if max_bytes is None else min(max_bytes, self._remaining))
        self._remaining -= len(data)
        return data

    def forward(self, body: bytes | None = None) -> StoreResponse:
        """Send the request to the store, perhaps with another body, and return the response."""
        body = self.read() if body is None else body
        upstream = HTTPConnection(self._store.netloc, timeout=60)
        try:
            upstream.putrequest(self._handler.command, self._handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._handler.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            return StoreResponse(response.status, response.getheaders(), response.read())
        finally:
            upstream.close()

    def respond(self, response: StoreResponse, *, max_bytes: int | None = None) -> None:
        """Send a response. With `max_bytes` its content is cut, and Content-Length is still that of the whole."""
        handler = self._handler
        handler.send_response_only(response.status)
        lengths = [] if self._has_length(response) else [("Content-Length", str(len(response.content)))]
        for name, value in [*response.headers, *lengths]:
            if name.lower() not in ("transfer-encoding", "connection"):
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(response.content[:max_bytes])

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self._handler.wfile.write(data)

    def close(self) -> None:
        """Close the connection."""
        self._handler.close_connection = True

    def close_after_request(self) -> None:
        """Read the rest of the request before the connection is closed, so that the client receives the response."""
        self.close()
        with suppress(OSError):
            self._handler.connection.shutdown(socket.SHUT_WR)
            self.read()

    def _has_length(self, response: StoreResponse) -> bool:
        return response.status == 204 or any(name.lower() == "content-length" for name, _ in response.headers)


Fault = Callable[[Exchange], None]


@dataclass
class Rule:
    """Which requests get a fault."""

    kind: Kind
    fault: Fault
    first: int = 1
    """Number of the first request of this kind that gets the fault, counted from the creation of the rule."""
    is_repeated: bool = False
    """Whether all later requests of this kind get the fault, too."""
    requests: int = 0
    """Requests of this kind so far."""
    injected: int = 0
    """Requests that got the fault."""
    test_ended: threading.Event = field(default_factory=threading.Event)

    def count_request(self) -> bool:
        """Count a request; return whether it gets the fault."""
        self.requests += 1
        has_fault = self.requests == self.first or (self.is_repeated and self.requests > self.first)
        self.injected += has_fault
        return has_fault


class FaultProxy:
    """A running proxy; Thrave uses `url` as the URL of the store."""

    def __init__(self, url: str, store: str) -> None:
        self.url = url
        self._store = store
        self._rules: tuple[Rule, ...] = ()
        self._lock = threading.Lock()

    @contextmanager
    def injecting(self, *rules: Rule):
        """Inject faults by these rules; at the end of the block faults that stall are ended."""
        self._rules = rules
        try:
            yield
        finally:
            self._rules = ()
            for rule in rules:
                rule.test_ended.set()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Forward a request, or inject the fault of its rule."""
        kind = _find_kind(handler)
        with self._lock:
            rule = next((rule for rule in self._rules if rule.kind is kind and rule.count_request()), None)
        exchange = Exchange(handler, self._store, rule.test_ended if rule else threading.Event())
        if rule is None:
            exchange.respond(exchange.forward())
        else:
            rule.fault(exchange)


_KEY_OF_FORM = re.compile(rb'name="key"\r\n\r\n([^\r]*)')
_BY_REQUEST = {
    ("PUT", False): Kind.CREATE_BUCKET,
    ("HEAD", False): Kind.HEAD_BUCKET,
    ("GET", False): Kind.LIST_OBJECTS,
    ("HEAD", True): Kind.HEAD_OBJECT,
    ("GET", True): Kind.GET_OBJECT,
    ("DELETE", False): Kind.DELETE_BUCKET,
    ("DELETE", True): Kind.DELETE_OBJECT,
}
_BY_KEY = {"thrave-owner": Kind.PUT_OWNER, "xml": Kind.PUT_MANIFEST}


def _find_kind(handler: BaseHTTPRequestHandler) -> Kind:
    url = urlsplit(handler.path)
    _, _, key = url.path.lstrip("/").partition("/")
    if url.path == "/":
        return Kind.LIST_BUCKETS
    if handler.command == "POST":
        return Kind.DELETE_OBJECTS if "delete" in url.query else _kind_of_form(handler.rfile.peek(1))
    if handler.command == "PUT" and key:
        return _BY_KEY.get(key.rpartition(".")[2], Kind.PUT_OBJECT)
    if "Range" in handler.headers:
        return Kind.GET_RANGE
    return _BY_REQUEST[handler.command, bool(key)]


def _kind_of_form(beginning: bytes) -> Kind:
    key = _KEY_OF_FORM.search(beginning)
    return Kind.POST_MANIFEST if key and key[1].endswith(b".manifest.xml") else Kind.POST_OBJECT


@contextmanager
def fault_proxy(store: str):
    """Run a proxy before the store at a URL, on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and content are sent separately
        rbufsize = 1 << 16  # bytes of a form that `peek` returns

        def _handle(self):
            proxy.handle(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 (http.server looks for these names)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # clients that close the connection

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", store)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
