"""A forward proxy that resolves every host name to 127.0.0.1."""

import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """A running proxy; `forwarded` has method and target of every request as received."""

    url: str = ""
    forwarded: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def forwarding(wanted=None, refusal=407):  # noqa: C901 (a server, and what it does)
    """Forward requests (and tunnels, for TLS) to the port that they name, on 127.0.0.1.

    With `wanted`, only those with that Proxy-Authorization; others are refused with the status `refusal`.
    """
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _refuses(self):
            if wanted is None or self.headers.get("Proxy-Authorization") == wanted:
                return False
            self.send_response_only(refusal)
            page = b"<html>no</html>"
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page)
            self.close_connection = True
            return True

        def _forward(self):
            if self._refuses():
                return
            proxy.forwarded.append((self.command, self.path))
            target = urlsplit(self.path)
            upstream = HTTPConnection("127.0.0.1", target.port)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream.request(self.command, target._replace(scheme="", netloc="").geturl(), body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name != "Transfer-Encoding":
                    self.send_header(name, value)
            if answer.getheader("Content-Length") is None:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815 (http.server looks for these names)

        def do_CONNECT(self):
            if self._refuses():
                return
            proxy.forwarded.append((self.command, self.path))
            self.send_response_only(200)
            self.end_headers()
            with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
                back = threading.Thread(target=_relay, args=(upstream, self.connection))
                back.start()
                _relay(self.connection, upstream)
                back.join()
            self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


def _relay(source, sink):
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
