"""A store that sends scripted responses, byte for byte, one per request."""

import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

SILENCE = b""
"""Instead of a response: nothing until the test ends."""


@dataclass
class Script:
    """A running store; `requests` has the first line of each request."""

    url: str
    answers: list[bytes]
    requests: list[str] = field(default_factory=list)
    pause: float = 0
    """Seconds before each piece of an answer that is a list of them."""
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def scripted(*answers):
    """Give the answers in their order, then the last of them again and again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script = Script(f"http://127.0.0.1:{listener.getsockname()[1]}", [*answers])
        thread = threading.Thread(target=_serve, args=(listener, script))
        thread.start()
        try:
            yield script
        finally:
            script.over.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener, script):
    while not script.over.is_set():
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            script.requests.append(_read(connection))
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if answer is SILENCE:
                script.over.wait()
            for piece in answer if isinstance(answer, list) else [answer]:
                time.sleep(script.pause)
                connection.sendall(piece)


def _read(connection):
    head = b""
    while b"\r\n\r\n" not in head:
        received = connection.recv(1 << 16)
        if not received:
            return ""
        head += received
    headers, _, body = head.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    left = length - len(body)
    while left > 0:
        received = connection.recv(1 << 16)
        if not received:
            return ""  # it was cut off
        left -= len(received)
    return headers.split(b"\r\n")[0].decode()


def http(status, body=b"", **headers):
    """An answer as it should be; a header's name has `_` for `-`."""
    fields = {"Content_Length": len(body), "Connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} Said", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def error(status, code, message="words"):
    """An answer that is S3's error."""
    return http(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())
