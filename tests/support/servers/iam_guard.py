"""A proxy before a store that allows what an IAM policy allows and responds 403 to everything else.

It maps Thrave's requests to IAM actions. Like AWS it responds 403 instead of 404 if the policy does not allow to list
the bucket. Source: AWS S3 documentation, "Required permissions for Amazon S3 API operations".
"""

import json
import re
import threading
from contextlib import contextmanager
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from support.store_faults.fault_proxy import Exchange, StoreResponse

_DENIED = StoreResponse(
    403,
    [("Content-Type", "application/xml")],
    b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
)
_OF_BUCKET = {"HEAD": "s3:ListBucket", "GET": "s3:ListBucket", "PUT": "s3:CreateBucket", "DELETE": "s3:DeleteBucket"}
_OF_OBJECT = {
    "HEAD": "s3:GetObject", "GET": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject",
}  # fmt: skip
_DELETED = re.compile(r"<Key>(.*?)</Key>")
_FORM_KEY = re.compile(rb'name="key"\r\n\r\n([^\r]*)')


class IamGuard:
    """A running proxy; `denied` has the actions and resources that were refused."""

    def __init__(self, url, store, policy):
        self.url = url
        self.store = store
        self.statements = json.loads(policy)["Statement"] if policy else []
        self.denied = []

    def allows(self, action, resource):
        for statement in self.statements:
            actions, resources = (_listed(statement[name]) for name in ("Action", "Resource"))
            if any(fnmatchcase(action, one) for one in actions) and any(
                fnmatchcase(resource, one) for one in resources
            ):
                return True
        self.denied.append((action, resource))
        return False

    def handle(self, handler):
        """Send the response of the store, or a refusal."""
        exchange = Exchange(handler, self.store, threading.Event())
        body = exchange.read()
        where = urlsplit(handler.path)
        bucket, _, key = unquote(where.path).lstrip("/").partition("/")
        needed = [*self._needed(handler.command, bucket, key, where.query, body)]
        if not all(self.allows(*need) for need in needed):
            exchange.respond(_DENIED)
            return
        response = exchange.forward(body)
        if response.status == 404 and key and not self.allows("s3:ListBucket", f"arn:aws:s3:::{bucket}"):
            response = _DENIED
        exchange.respond(response)

    def _needed(self, method, bucket, key, query, body):
        if not bucket:
            yield "s3:ListAllMyBuckets", "*"
        elif method == "POST" and "delete" in query:
            for deleted in _DELETED.findall(body.decode()):
                yield "s3:DeleteObject", f"arn:aws:s3:::{bucket}/{deleted}"
        elif method == "POST":
            yield "s3:PutObject", f"arn:aws:s3:::{bucket}/{_FORM_KEY.search(body)[1].decode()}"
        elif key:
            yield _OF_OBJECT[method], f"arn:aws:s3:::{bucket}/{key}"
        else:
            yield _OF_BUCKET[method], f"arn:aws:s3:::{bucket}"


def _listed(value):
    return [value] if isinstance(value, str) else value


@contextmanager
def guarded(store, policy):
    """Stand before the store at a URL, on a free port of 127.0.0.1; `policy` is JSON, empty to allow nothing."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self):
            guard.handle(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 (http.server looks for these names)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        guard = IamGuard(f"http://127.0.0.1:{server.server_port}", store, policy)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield guard
        finally:
            server.shutdown()
            thread.join()
