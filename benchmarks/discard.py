"""A store that discards: it answers uploads as S3 does, with the ETag of what came, and keeps nothing but that.

    python benchmarks/discard.py

Prints its URL and serves until it is killed. It looks at no signature. What it remembers of an object is its size and
its MD5, for who asks whether it is there.
"""

import hashlib
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_CHUNK = 256 << 10
_HEAD = 64 << 10  # bytes in which the fields before a form's file have ended
_KEY = re.compile(rb'name="key"\r\n\r\n([^\r]*)\r\n')
_FILE = re.compile(rb'name="file"[^\r]*\r\n\r\n')
_NO_SUCH_KEY = b"<Error><Code>NoSuchKey</Code><Message>It was discarded</Message></Error>"


class Discard(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    kept: dict[str, tuple[int, str]]
    """Size and MD5 of every object, by path."""

    def do_PUT(self) -> None:
        """Take an object."""
        digest = hashlib.md5(usedforsecurity=False)
        length = self._length()
        self._take(length, digest)
        self._keep(urlsplit(self.path).path, length, digest)

    def do_POST(self) -> None:
        """Take a form with an object, or a list of what is to be deleted."""
        length = self._length()
        if "?delete" in self.path:
            self._take(length, None)
            self._answer(200, b"<DeleteResult/>")
            return
        head = self.rfile.read(min(length, _HEAD))
        key, file = _KEY.search(head), _FILE.search(head)
        assert key is not None
        assert file is not None
        closing = len("\r\n----\r\n") + len(self.headers["Content-Type"].partition("boundary=")[2])
        size = length - file.end() - closing
        digest = hashlib.md5(head[file.end() : file.end() + size], usedforsecurity=False)
        self._take(file.end() + size - len(head), digest)
        self._take(length - max(file.end() + size, len(head)), None)
        self._keep(f"{self.path}/{key[1].decode()}", size, digest)

    def do_HEAD(self) -> None:
        """Tell size and ETag."""
        size, digest = self.kept.get(urlsplit(self.path).path, (-1, ""))
        if size < 0:
            self._answer(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", f'"{digest}"')
        self.end_headers()

    def do_GET(self) -> None:
        """Have nothing."""
        self._answer(404, _NO_SUCH_KEY)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (as above)
        """Say nothing of a request."""

    def _length(self) -> int:
        return int(self.headers["Content-Length"])

    def _take(self, length: int, digest: "hashlib._Hash | None") -> None:
        while length > 0:
            piece = self.rfile.read(min(length, _CHUNK))
            if not piece:
                return
            length -= len(piece)
            if digest is not None:
                digest.update(piece)

    def _keep(self, path: str, size: int, digest: "hashlib._Hash") -> None:
        self.kept[path] = (size, digest.hexdigest())
        self.send_response(200)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve on a free port."""
    Discard.kept = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Discard)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
