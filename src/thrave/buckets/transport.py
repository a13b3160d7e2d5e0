"""HTTP to a store: a bounded number of connections, each with an end to its patience, and S3's errors.

One request at a time goes out and its answer comes back, whole and no longer than was asked for. Whatever goes wrong is
a BucketError; nothing is tried twice here (`retrying.py`), and no message holds a URL, a header or a body.

It is urllib3, which botocore brings, for signed requests and forms alike.
"""

import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import responses
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as HTTPTimeout

from thrave.buckets.connection import StoreConnection
from thrave.buckets.errors import BucketError, InvalidArgument, StoreError, TransientError, error_of_store

Buffer = bytes | memoryview

_PIECE = 256 << 10  # bytes that are sent within one `timeout`
_ERROR_BYTES = 64 << 10  # of an error's document
_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class Answer:
    """A store's answer: success, for the transport raises the others."""

    status: int
    headers: Mapping[str, str]
    """Names in any case."""
    body: bytes

    @property
    def content_length(self) -> int:
        """Bytes that the object has which the answer is about.

        Raises:
            StoreError: It does not say, or says something else.
        """
        said = self.headers.get("Content-Length", "")
        if not (said.isascii() and said.isdecimal()):
            raise StoreError("InternalError", 500, "The store does not say how long the object is")
        return int(said)


class Transport:
    """The connections to one store. Safe to use from several threads."""

    def __init__(self, connection: StoreConnection) -> None:
        """Open nothing yet.

        Raises:
            InvalidArgument: The endpoint, the proxy or the file of certificates is none.
        """
        self._where = urlsplit(connection.endpoint).netloc
        self._timeout = connection.timeout
        try:
            self._pool = _pool(connection)
        except (HTTPError, OSError, ValueError) as error:
            raise InvalidArgument(f"The store {self._where} cannot be called like this: {_reason(error)}") from None

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Sequence[Buffer] = (), *, limit: int
    ) -> Answer:
        """Send a request, and give its answer.

        Args:
            method: `PUT`, …
            url: Quoted as it was signed.
            headers: All but Host and Content-Length.
            body: Its pieces; none is copied.
            limit: Bytes that a successful answer may have; a longer one is an error.

        Raises:
            BucketError: The store answered with an error, or with more than it was asked for.
            TransientError: It did not answer, or not to the end.
        """
        length = sum(memoryview(piece).nbytes for piece in body)
        lengths = {"Content-Length": str(length)} if body or method in ("PUT", "POST") else {}
        try:
            answer = self._pool.urlopen(
                method,
                url,
                body=_pieces(body) if length else None,
                headers={**headers, **lengths},
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            with answer:
                return _read(answer, limit)
        except (HTTPError, OSError) as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> BucketError:
        certificate = error.args[0] if isinstance(error, SSLError) and error.args else None
        if isinstance(certificate, ssl.SSLCertVerificationError):
            said = certificate.verify_message
            return StoreError("ServiceUnavailable", 503, f"The certificate of {self._where} is not trusted: {said}")
        if isinstance(error, HTTPTimeout) and not isinstance(error, NewConnectionError):
            return TransientError("RequestTimeout", 400, f"Nothing moved for {self._timeout:g} s to {self._where}")
        return TransientError("ServiceUnavailable", 503, f"The store {self._where} was lost: {_reason(error)}")


def _pool(connection: StoreConnection) -> urllib3.PoolManager:
    is_secure = urlsplit(connection.endpoint).scheme == "https"
    make = urllib3.PoolManager if connection.proxy is None else partial(urllib3.ProxyManager, connection.proxy)
    return make(
        maxsize=connection.connections,
        block=True,
        retries=False,
        timeout=urllib3.Timeout(connect=connection.timeout, read=connection.timeout),
        ssl_context=ssl.create_default_context(cafile=connection.ca) if is_secure else None,
    )


def _pieces(body: Sequence[Buffer]) -> Iterator[memoryview]:
    # Each is sent within the time-out: what is asked of a line is that it moves, not that it is fast.
    for piece in body:
        view = memoryview(piece).cast("B")
        for start in range(0, view.nbytes, _PIECE):
            yield view[start : start + _PIECE]


def _read(answer: urllib3.BaseHTTPResponse, limit: int) -> Answer:
    if answer.status >= 300:
        raise _refusal(answer.status, answer.read(_ERROR_BYTES))
    body = answer.read(limit + 1)
    if len(body) > limit or answer.read(1):  # at its end it says whether fewer came than were promised
        raise StoreError("InternalError", 500, f"The store answered with more than the {limit} bytes it was asked for")
    return Answer(answer.status, answer.headers, body)


def _refusal(status: int, document: bytes) -> BucketError:
    """The error of an answer: S3's document, or what another server in between says."""
    try:
        root = ET.fromstring(document)  # noqa: S314 (expat stops entity bombs itself, and the length is bounded)
        said = {child.tag.rpartition("}")[2]: child.text or "" for child in root}
    except ET.ParseError:
        said = {}
    code = said.get("Code") or _CODES.get(status, "InternalError")
    message = " ".join(said.get("Message", "").split())[:_MESSAGE_CHARACTERS]
    return error_of_store(code, status, message or responses.get(status, "no reason given"))  # Ceph gives none


# What a status means where there is no document, as in the answer to HEAD.
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 409: "OperationAborted", 412: "PreconditionFailed", 503: "SlowDown"}


def _reason(error: BaseException) -> str:
    """The system's own word for what is at the bottom of an error."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return getattr(error, "strerror", None) or type(error).__name__
