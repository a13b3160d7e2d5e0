"""A proxy before a store that injects a fault into one request, or into all requests from then on.

It speaks HTTP for real: what is cut off is cut off on the wire, and what is delivered twice reaches the store twice. A
request is known by its `ErrorKind`; a `Rule` names the kind, the fault, and the first request of that kind to meet it.
Requests that no rule is for pass as they are, Host and signature untouched.
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
class Answer:
    """What the store has said."""

    status: int
    headers: list[tuple[str, str]]
    content: bytes


class Exchange:
    """A request that is under way, and what can be done with it."""

    def __init__(self, handler: BaseHTTPRequestHandler, store: str, over: threading.Event) -> None:
        self._handler = handler
        self._store = urlsplit(store)
        self._left = int(handler.headers.get("Content-Length", 0))
        self.over = over
        """Set when nobody waits any more for what stalls."""

    def read(self, most: int | None = None) -> bytes:
        """Of what the client sends, all that is left or `most` bytes."""
        data = self._handler.rfile.read(self._left if most is None else min(most, self._left))
        self._left -= len(data)
        return data

    def forward(self, body: bytes | None = None) -> Answer:
        """Have the store do it, with another body if one is given."""
        body = self.read() if body is None else body
        upstream = HTTPConnection(self._store.netloc, timeout=60)
        try:
            upstream.putrequest(self._handler.command, self._handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._handler.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            said = upstream.getresponse()
            return Answer(said.status, said.getheaders(), said.read())
        finally:
            upstream.close()

    def answer(self, answer: Answer, *, only: int | None = None) -> None:
        """Give an answer; of its content `only` so many bytes, though its length is told as it is."""
        handler = self._handler
        handler.send_response_only(answer.status)
        lengths = [] if self._has_length(answer) else [("Content-Length", str(len(answer.content)))]
        for name, value in [*answer.headers, *lengths]:
            if name.lower() not in ("transfer-encoding", "connection"):
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(answer.content[:only])

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._handler.wfile.write(data)

    def hang_up(self) -> None:
        """Say nothing more, and take nothing more."""
        self._handler.close_connection = True

    def linger(self) -> None:
        """Say nothing more, but let the client finish, so that it reads what was said."""
        self.hang_up()
        with suppress(OSError):
            self._handler.connection.shutdown(socket.SHUT_WR)
            self.read()

    def _has_length(self, answer: Answer) -> bool:
        return answer.status == 204 or any(name.lower() == "content-length" for name, _ in answer.headers)


Fault = Callable[[Exchange], None]


@dataclass
class Rule:
    """Which requests meet a fault."""

    kind: Kind
    fault: Fault
    first: int = 1
    """The first of its kind that does, counted from when the rule was made."""
    again: bool = False
    """Whether all later ones do, too."""
    seen: int = 0
    met: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def take(self) -> bool:
        """Count a request; say whether it meets the fault."""
        self.seen += 1
        meets = self.seen == self.first or (self.again and self.seen > self.first)
        self.met += meets
        return meets


class FaultProxy:
    """A proxy that runs: `url` is what Thrave takes for the store."""

    def __init__(self, url: str, store: str) -> None:
        self.url = url
        self._store = store
        self._rules: tuple[Rule, ...] = ()
        self._lock = threading.Lock()

    @contextmanager
    def doing(self, *rules: Rule):
        """Do to requests what the rules say; what still stalls afterwards is let go."""
        self._rules = rules
        try:
            yield
        finally:
            self._rules = ()
            for rule in rules:
                rule.over.set()

    def pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        """Do with a request what is to be done."""
        kind = _kind(handler)
        with self._lock:
            rule = next((rule for rule in self._rules if rule.kind is kind and rule.take()), None)
        exchange = Exchange(handler, self._store, rule.over if rule else threading.Event())
        if rule is None:
            exchange.answer(exchange.forward())
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


def _kind(handler: BaseHTTPRequestHandler) -> Kind:
    where = urlsplit(handler.path)
    _, _, key = where.path.lstrip("/").partition("/")
    if where.path == "/":
        return Kind.LIST_BUCKETS
    if handler.command == "POST":
        return Kind.DELETE_OBJECTS if "delete" in where.query else _kind_of_form(handler.rfile.peek(1))
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
    """Stand before the store at a URL, on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and content are sent one after the other
        rbufsize = 1 << 16  # what `peek` can see of a form

        def _pass_on(self):
            proxy.pass_on(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 (http.server looks for these names)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # clients that give up

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", store)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
