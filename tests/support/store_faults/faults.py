"""Faults between Thrave and its store, made by `fault_proxy`. The docstrings are in the documentation."""

import hashlib
from dataclasses import replace

from support.store_faults.fault_proxy import Exchange, StoreResponse

CUT_AFTER = 1000  # bytes of a request
STALL = 30  # seconds, or until the test ends


def internal_error(exchange: Exchange):
    """The store answers 500 InternalError."""
    _refuse(exchange, 500, "InternalError")


def slow_down(exchange: Exchange):
    """The store answers 503 SlowDown."""
    _refuse(exchange, 503, "SlowDown")


def denied_early(exchange: Exchange):
    """The store answers 403 AccessDenied while the request is still being sent."""
    exchange.read(CUT_AFTER)
    exchange.respond(_error(403, "AccessDenied"))
    exchange.close_after_request()


def clock_skewed(exchange: Exchange):
    """The store answers 403 RequestTimeTooSkewed."""
    _refuse(exchange, 403, "RequestTimeTooSkewed")


def request_cut(exchange: Exchange):
    """The connection is cut after a part of the request."""
    exchange.read(CUT_AFTER)
    exchange.close()


def response_lost(exchange: Exchange):
    """The store executes the request, and the connection is cut before its response."""
    exchange.forward()
    exchange.close()


def headers_cut(exchange: Exchange):
    """The store executes the request, and the connection is cut between two lines of the response's headers."""
    response = exchange.forward()
    exchange.send(f"HTTP/1.1 {response.status} OK\r\nServer: store\r\n".encode())
    exchange.close()


def response_cut(exchange: Exchange):
    """The store executes the request, and the connection is cut within the response's content."""
    response = exchange.forward()
    exchange.respond(response, max_bytes=len(response.content) // 2)
    exchange.close()


def no_response(exchange: Exchange):
    """The store accepts the connection and sends nothing for 30 seconds."""
    exchange.test_ended.wait(STALL)
    exchange.close()


def stalled_response(exchange: Exchange):
    """The store executes the request, and stops for 30 seconds in the middle of its response."""
    response = exchange.forward()
    exchange.send(f"HTTP/1.1 {response.status} OK\r\nContent-Length: 1".encode())
    exchange.test_ended.wait(STALL)
    exchange.close()


def sent_twice(exchange: Exchange):
    """The request reaches the store twice, and the client receives the second response."""
    body = exchange.read()
    exchange.forward(body)
    exchange.respond(exchange.forward(body))


def wrong_etag(exchange: Exchange):
    """The ETag of the response is not the object's."""
    response = exchange.forward()
    exchange.respond(_with_header(response, "ETag", f'"{hashlib.md5(b"other").hexdigest()}"'))


def discarded(exchange: Exchange):
    """The store reports success with the right ETag, but does not execute the request."""
    body = exchange.read()
    etag = hashlib.md5(_content(body)).hexdigest()
    exchange.respond(
        StoreResponse(200, [("ETag", f'"{etag}"')], b"<DeleteResult/>" if body.startswith(b"<Delete") else b"")
    )


def discarded_without_etag(exchange: Exchange):
    """The store answers 200 without an ETag, but stores nothing."""
    exchange.read()
    exchange.respond(StoreResponse(200, [], b""))


def byte_changed(exchange: Exchange):
    """A byte is changed on the way: of the request's content, or of the response's if the request has none."""
    body = exchange.read()
    response = exchange.forward(_flipped(body))
    exchange.respond(response if body else replace(response, content=_flipped(response.content)))


def old_date(exchange: Exchange):
    """The Date of the response is many years ago."""
    exchange.respond(_with_header(exchange.forward(), "Date", "Mon, 01 Jan 2001 00:00:00 GMT"))


def _refuse(exchange, status, code):
    exchange.read()
    exchange.respond(_error(status, code))


def _error(status, code):
    return StoreResponse(status, [], f"<Error><Code>{code}</Code><Message>fault of a test</Message></Error>".encode())


def _with_header(response, name, value):
    others = [header for header in response.headers if header[0].lower() != name.lower()]
    return replace(response, headers=[*others, (name, value)])


def _flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b""


def _content(body):
    """The content of a request: the file of a form, or the whole body."""
    _, is_form, file = body.partition(b'filename="file"\r\n\r\n')
    return file[: file.rindex(b"\r\n--")] if is_form else body
