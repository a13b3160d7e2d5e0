"""The cost of each part of an unauthenticated request is at most linear in its size.

CPU time and memory of the service's process are compared between sizes; no time is asserted.
"""

import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from thrave.testing import ThraveServer

KIB = 1024
SIZES = (8 * KIB, 32 * KIB, 128 * KIB, 512 * KIB)
TIMES, ROUNDS = 8, 3
SLACK = 2.5  # a quadratic part has a ratio four times too large
MAX_MEMORY = 24 * KIB * KIB
FORM = "Content-Type: application/x-www-form-urlencoded\r\n"


def now():
    return datetime.now(UTC)


def version_4(signed_headers="host", signature="0" * 64, more=""):
    stamp = now().strftime("%Y%m%dT%H%M%SZ")
    return (
        f"X-Amz-Date: {stamp}\r\nAuthorization: AWS4-HMAC-SHA256 "
        f"Credential=AKIAX/{stamp[:8]}/us-east-1/ec2/aws4_request,SignedHeaders={signed_headers},Signature={signature}{more}\r\n"
    )


def version_2():
    return "AWSAccessKeyId=x&Signature=y&SignatureVersion=2&SignatureMethod=HmacSHA256&Timestamp=" + now().strftime(
        "%Y-%m-%dT%H:%M:%SZ"
    )


def presigned(signed_headers="host"):
    stamp = now().strftime("%Y%m%dT%H%M%SZ")
    return (
        f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAX%2F{stamp[:8]}%2Fus-east-1%2Fec2%2Faws4_request"
        f"&X-Amz-Date={stamp}&X-Amz-Expires=900&X-Amz-SignedHeaders={signed_headers}&X-Amz-Signature={'0' * 64}"
    )


def get(target="/", headers=""):
    return f"GET {target} HTTP/1.1\r\nHost: thrave\r\n{headers}\r\n".encode()


def post(body, headers="", target="/"):
    framing = f"{FORM}Content-Length: {len(body)}\r\n"
    return f"POST {target} HTTP/1.1\r\nHost: thrave\r\n{headers}{framing}\r\n{body}".encode()


def chunked(chunks, trailers="", extension="", headers=""):
    body = "".join(f"{len(chunk):x}{extension}\r\n{chunk}\r\n" for chunk in chunks)
    return (
        f"POST / HTTP/1.1\r\nHost: thrave\r\n{headers}{FORM}Transfer-Encoding: chunked\r\n\r\n{body}0\r\n{trailers}\r\n"
    ).encode()


def pairs(size, form="{:x}=", joiner="&"):
    number = size // (len(form.format(9999)) + 1)
    return joiner.join(form.format(each) for each in range(number))


def repeated(text, size):
    return text * (size // len(text))


PARTS = {
    "path": lambda size: get("/" + repeated("a", size)),
    "path of percent signs": lambda size: get("/" + repeated("%41", size)),
    "path of slashes": lambda size: get(repeated("/", size)),
    "path of dots": lambda size: get(repeated("/..", size)),
    "absolute form": lambda size: get("http://thrave/?a=" + repeated("b", size)),
    "query of one value": lambda size: get("/?a=" + repeated("b", size), version_4()),
    "query of percent signs": lambda size: get("/?a=" + repeated("%41", size), version_4()),
    "query of characters that are encoded again": lambda size: get("/?a=" + repeated("%C3%A9", size), version_4()),
    "query of pairs": lambda size: get("/?" + pairs(size), version_4()),
    "query of one name": lambda size: get("/?" + repeated("a=&", size), version_4()),
    "query of separators": lambda size: get("/?" + repeated("&", size), version_4()),
    "query, presigned": lambda size: get(f"/?{presigned()}&a=" + repeated("%2A", size)),
    "query with an action at its end": lambda size: get(f"/?{repeated('Action=', size)}&Action=DescribeBundleTasks"),
    "presigned headers": lambda size: get("/?" + presigned(pairs(size, "h{:x}", "%3B"))),
    "one header": lambda size: get("/", f"X-A: {repeated('b', size)}\r\n{version_4('host;x-a')}"),
    "one header of spaces": lambda size: get("/", f"X-A: {repeated('b  ', size)}\r\n{version_4('host;x-a')}"),
    "headers": lambda size: get("/", pairs(size, "H{:x}: b\r\n", "") + version_4()),
    "headers of one name": lambda size: get("/", repeated("X-A: b\r\n", size) + version_4("host;x-a")),
    "long headers": lambda size: get("/", pairs(size, "H{:x}: " + "b" * 1000 + "\r\n", "") + version_4()),
    "long header names": lambda size: get("/", repeated("a", size) + ": b\r\n" + version_4()),
    "signed headers": lambda size: get("/", version_4(pairs(size, "h{:x}", ";"))),
    "signature": lambda size: get("/", version_4(signature=repeated("0", size))),
    "parts of Authorization": lambda size: get("/", version_4(more=pairs(size, "h{:x}=", ","))),
    "Authorization of commas": lambda size: get("/", version_4(more=repeated(",", size))),
    "date": lambda size: get("/", f"Date: {repeated('1', size)}\r\n" + version_4().split("\r\n", 1)[1]),
    "date of brackets": lambda size: get("/", f"Date: {repeated('(', size)}\r\n" + version_4().split("\r\n", 1)[1]),
    "Host": lambda size: get("/", version_4()).replace(b"Host: thrave", b"Host: " + b"a" * size),
    "Host of brackets": lambda size: get("/", version_4()).replace(b"Host: thrave", b"Host: [" + b":" * size + b"]"),
    "Accept": lambda size: get("/", f"Accept: {repeated('text/htm,', size)}\r\n"),
    "body of one value": lambda size: post("a=" + repeated("b", size), version_4()),
    "body of pairs": lambda size: post(pairs(size), version_4()),
    "body of pairs, unsigned": lambda size: post(pairs(size)),
    "body of pairs, version 2": lambda size: post(f"{version_2()}&{pairs(size)}"),
    "body of one value, version 2": lambda size: post(f"{version_2()}&a={repeated('%C3%A9', size)}"),
    "body of plus signs, version 2": lambda size: post(f"{version_2()}&a={repeated('+', size)}"),
    "body of dots, version 2": lambda size: post(f"{version_2()}&{repeated('.', size)}=b"),
    "body and query, version 2": lambda size: post(pairs(size), target=f"/?{version_2()}&{pairs(size, 'q{:x}=')}"),
    "key id, version 2": lambda size: post(version_2().replace("Id=x", "Id=" + repeated("x", size))),
    "time, version 2": lambda size: post(version_2().replace("Timestamp=", "Timestamp=" + repeated("1", size))),
    "content type": lambda size: post("a=b", f"Content-Type: {repeated(';', size)}\r\n"),
    "chunks": lambda size: chunked(["a"] * (size // 6)),
    "chunk extension": lambda size: chunked(["a=b"], extension=";x=" + repeated("y", size)),
    "chunk extensions": lambda size: chunked(["a=b"] * 100, extension=";x=" + repeated("y", size // 100)),
    "zeros of a chunk's size": lambda size: chunked([repeated("0", size)]),
    "trailer": lambda size: chunked(["a=b"], trailers=f"X-A: {repeated('b', size)}\r\n"),
    "trailers": lambda size: chunked(["a=b"], trailers=repeated("X-A: b\r\n", size)),
    "pipelined requests": lambda size: repeated("GET / HTTP/1.1\r\nHost: x\r\n\r\n", size).encode(),
    "requests after an upgrade": lambda size: (
        get("/", "Connection: Upgrade\r\nUpgrade: websocket\r\n")
        + repeated("GET / HTTP/1.1\r\nHost: x\r\n\r\n", size).encode()
    ),
    "expected body": lambda size: post(repeated("b", size), "Expect: 100-continue\r\n"),
    "empty lines": lambda size: repeated("\r\n", size).encode() + get(),
    "no HTTP": lambda size: repeated("\0", size).encode(),
    "CONNECT": lambda size: b"CONNECT " + b"a" * size + b":443 HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ThraveServer.running(tmp_path_factory.mktemp("costs"), request_timeout=60) as server:
        yield server


def ask(server, request):
    """Send a request; give what comes back until one answer has ended or the connection is closed."""
    place = urlsplit(server.url)
    answer = b""
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        with suppress(OSError):
            connection.sendall(request)
        with suppress(OSError):
            while b"</Response>" not in answer and (part := connection.recv(65536)):
                answer += part
    return answer


def cpu(server):
    """Nanoseconds of CPU time of the process, with its ended threads."""
    return time.clock_gettime_ns(~server.process.pid << 3 | 2)  # as clock_getcpuclockid(3)


def cost(server, request):
    """CPU time of one request: the least of some rounds, since what else the machine does only adds to it."""
    rounds = []
    for _ in range(ROUNDS):
        before = cpu(server)
        for _ in range(TIMES):
            ask(server, request)
        ask(server, get())  # whatever is still to be done for the others is done before this one is answered
        rounds.append(cpu(server) - before)
    return min(rounds)


def peak(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * KIB


@pytest.mark.parametrize("part", PARTS)
def test_cost_of_unauthenticated_request_is_linear_in_each_part(server, part):
    make = PARTS[part]
    ask(server, make(SIZES[0]))
    before = peak(server)
    assert b" 50" not in ask(server, make(SIZES[-1]))[:16]
    costs = [cost(server, make(size)) for size in SIZES]
    for (small, cheap), (large, dear) in zip(
        zip(SIZES, costs, strict=True), zip(SIZES[1:], costs[1:], strict=False), strict=False
    ):
        assert dear <= SLACK * large / small * cheap, f"{small} bytes: {cheap} ns, {large} bytes: {dear} ns"
    assert peak(server) - before <= MAX_MEMORY
    assert b"MissingParameter" in ask(server, get())


def test_cost_of_each_part_is_a_small_multiple_of_a_small_request(server):
    small = cost(server, post("Action=DescribeRegions&Version=2016-11-15", version_4()))
    costs = {part: max(cost(server, make(size)) for size in (64_000, 120_000)) for part, make in PARTS.items()}
    assert {part: spent / small for part, spent in costs.items() if spent > 12 * small} == {}
