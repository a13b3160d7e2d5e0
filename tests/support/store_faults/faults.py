"""Faults between Thrave and its store; each happens on the wire (`fault_proxy.py`)."""

import hashlib
from dataclasses import replace

from support.store_faults.fault_proxy import Answer, Exchange

SOME = 1000  # bytes of a request that arrive before it is cut off
STALL = 30  # seconds, unless nobody waits any more


def internal_error(exchange: Exchange):
    """The store answers 500 InternalError."""
    _refuse(exchange, 500, "InternalError")


def slow_down(exchange: Exchange):
    """The store answers 503 SlowDown."""
    _refuse(exchange, 503, "SlowDown")


def denied_midway(exchange: Exchange):
    """The store answers 403 AccessDenied while the request is still being sent."""
    exchange.read(SOME)
    exchange.answer(_error(403, "AccessDenied"))
    exchange.linger()


def clock_skewed(exchange: Exchange):
    """The store answers 403 RequestTimeTooSkewed."""
    _refuse(exchange, 403, "RequestTimeTooSkewed")


def request_cut(exchange: Exchange):
    """The connection is cut after a part of the request."""
    exchange.read(SOME)
    exchange.hang_up()


def answer_lost(exchange: Exchange):
    """The store does it, and the connection is cut before its answer."""
    exchange.forward()
    exchange.hang_up()


def head_cut(exchange: Exchange):
    """The store does it, and the connection is cut within the answer's headers, between two lines."""
    answer = exchange.forward()
    exchange.send(f"HTTP/1.1 {answer.status} OK\r\nServer: store\r\n".encode())
    exchange.hang_up()


def content_cut(exchange: Exchange):
    """The store does it, and the connection is cut within the answer's content."""
    answer = exchange.forward()
    exchange.answer(answer, only=len(answer.content) // 2)
    exchange.hang_up()


def silence(exchange: Exchange):
    """The store takes the connection, and says nothing for 30 seconds."""
    exchange.over.wait(STALL)
    exchange.hang_up()


def silence_midway(exchange: Exchange):
    """The store does it, and stops for 30 seconds in the middle of its answer."""
    answer = exchange.forward()
    exchange.send(f"HTTP/1.1 {answer.status} OK\r\nContent-Length: 1".encode())
    exchange.over.wait(STALL)
    exchange.hang_up()


def twice(exchange: Exchange):
    """The request reaches the store twice, and the second answer comes back."""
    body = exchange.read()
    exchange.forward(body)
    exchange.answer(exchange.forward(body))


def other_etag(exchange: Exchange):
    """The store's answer has another ETag than the object."""
    answer = exchange.forward()
    exchange.answer(_with(answer, "ETag", f'"{hashlib.md5(b"other").hexdigest()}"'))


def swallowed(exchange: Exchange):
    """The store answers as if it had done it, with the right ETag, and has done nothing."""
    body = exchange.read()
    etag = hashlib.md5(_content(body)).hexdigest()
    exchange.answer(Answer(200, [("ETag", f'"{etag}"')], b"<DeleteResult/>" if body.startswith(b"<Delete") else b""))


def swallowed_unproved(exchange: Exchange):
    """The store answers 200 without an ETag, and keeps nothing."""
    exchange.read()
    exchange.answer(Answer(200, [], b""))


def changed(exchange: Exchange):
    """A byte is changed on the way: of the request's content, or else of the answer's."""
    body = exchange.read()
    answer = exchange.forward(_flipped(body))
    exchange.answer(answer if body else replace(answer, content=_flipped(answer.content)))


def other_date(exchange: Exchange):
    """The store's answer has a Date of many years ago."""
    exchange.answer(_with(exchange.forward(), "Date", "Mon, 01 Jan 2001 00:00:00 GMT"))


def _refuse(exchange, status, code):
    exchange.read()
    exchange.answer(_error(status, code))


def _error(status, code):
    return Answer(status, [], f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode())


def _with(answer, name, value):
    others = [header for header in answer.headers if header[0].lower() != name.lower()]
    return replace(answer, headers=[*others, (name, value)])


def _flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b""


def _content(body):
    """Of a form its file, of anything else all."""
    _, of_form, file = body.partition(b'filename="file"\r\n\r\n')
    return file[: file.rindex(b"\r\n--")] if of_form else body
