"""The HTTP server: timeouts and limits of a client, TLS, and the addresses on which it listens."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from urllib.parse import urlsplit

import psutil
import pytest
from botocore.exceptions import ClientError, SSLError

from support.eventually import eventually
from support.servers.tls import certificate
from support.service.forked_server import ForkedServer, run_thrave
from thrave.cli.exit_codes import Exit
from thrave.config import Settings, SettingsError, load_settings
from thrave.database import open_engine
from thrave.http_server import MAX_CHUNKED_SIZE, MAX_CHUNKS, MAX_HEAD_SIZE, MAX_HEADERS, HttpServer, PlainHttpNotAllowed
from thrave.identity.accounts import Accounts
from thrave.identity.users import Users
from thrave.testing import ServerError, ThraveServer
from thrave.vault import Vault

TIMEOUT = 60  # seconds
REQUEST = b"GET / HTTP/1.1\r\nHost: thrave\r\n\r\n"


@pytest.fixture(scope="module")
def server_with_short_timeout(tmp_path_factory):
    """A server that waits one second."""
    with ForkedServer.running(tmp_path_factory.mktemp("server"), request_timeout=1) as server:
        yield server


@contextmanager
def connected(server):
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT) as connection:
        yield connection


def read_to_end(connection):
    """Return all bytes until the connection ends, cleanly or with a reset."""
    chunks = []
    try:
        while chunk := connection.recv(65536):
            chunks.append(chunk)
    except ConnectionResetError:
        pass
    return b"".join(chunks)


def read_response(connection):
    """Return one response, up to the end of its document; the connection stays open."""
    response = b""
    while b"</Response>" not in response:
        chunk = connection.recv(65536)
        assert chunk, response
        response += chunk
    return response


def is_answered(server):
    """Whether a request on a new connection is answered."""
    with connected(server) as connection:
        try:
            connection.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return b"<Code>MissingParameter</Code>" in read_to_end(connection)


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"P",
        b"POST / HTTP/1.1\r\nHost: thra",
        b"POST / HTTP/1.1\r\nHost: thrave\r\n",
        b"POST / HTTP/1.1\r\nHost: thrave\r\nContent-Length: 10\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: thrave\r\nContent-Length: 10\r\n\r\nAction",
        b"POST / HTTP/1.1\r\nHost: thrave\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nActio",
        REQUEST,
        REQUEST + b"GET / HTTP/1.1\r\nHo",
    ],
)
def test_connection_closes_when_a_client_stops_sending(server_with_short_timeout, beginning):
    with connected(server_with_short_timeout) as connection:
        connection.sendall(beginning)
        response = read_to_end(connection)
    assert response.count(b"<Code>MissingParameter</Code>") == beginning.count(REQUEST)
    assert is_answered(server_with_short_timeout)


@pytest.mark.parametrize(
    "beginning",
    [
        b"POST / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n",
        REQUEST,
    ],
)
def test_connection_closes_when_a_client_sends_too_slowly(server_with_short_timeout, beginning):
    slow_bytes = b"X-A: b\r\n" if beginning.count(b"\r\n\r\n") == 0 else b"GET /"
    with connected(server_with_short_timeout) as connection:
        connection.sendall(beginning)
        try:
            for number in range(TIMEOUT * 20):
                connection.sendall(slow_bytes[number % len(slow_bytes) :][:1])
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail("the connection was not closed")


def test_connection_closes_when_a_head_exceeds_its_limit(server_with_short_timeout):
    sent = 0
    with connected(server_with_short_timeout) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        try:
            while sent < 100 * MAX_HEAD_SIZE:
                sent += connection.send(b"X-A: " + b"x" * 4096 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail(f"{sent} bytes were taken")


def test_connection_limit_closes_further_connections_only(tmp_path):
    with ForkedServer.running(tmp_path, max_connections=6) as server:
        with ExitStack() as stack:
            connections = [stack.enter_context(connected(server)) for _ in range(6)]
            for connection in connections:
                connection.sendall(REQUEST[:-2])
            assert not is_answered(server)
            for connection in connections:
                connection.sendall(REQUEST[-2:])
                assert b"MissingParameter" in read_response(connection)
        assert eventually(lambda: is_answered(server))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ThraveServer.running(tmp_path_factory.mktemp("server"), request_timeout=5) as server:
        yield server


def memory(server):
    return psutil.Process(server.process.pid).memory_info().rss


def test_stalled_clients_do_not_block_other_clients(server):
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(server)).sendall(
                b"POST / HTTP/1.1\r\nHost: thrave\r\nContent-Length: 9\r\n\r\nA"
            )
        assert is_answered(server)


def test_requests_with_unknown_keys_use_no_memory_afterwards(server):
    form = "/?Action=DescribeInstances&Version=2016-11-15&SignatureVersion=2&SignatureMethod=HmacSHA256&Signature=x"
    timestamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def send_requests(first, last):
        with connected(server) as connection, connection.makefile("rb") as responses:
            for number in range(first, last):
                key = f"AKIA{number:016d}"
                line = f"GET {form}&Timestamp={timestamp}&AWSAccessKeyId={key} HTTP/1.1\r\nHost: thrave\r\n\r\n"
                connection.sendall(line.encode())
                assert responses.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
                length = next(
                    int(line.split(b":")[1]) for line in iter(responses.readline, b"\r\n") if b"length" in line
                )
                while responses.readline() != b"\r\n":
                    pass
                responses.read(length)

    send_requests(0, 200)
    before = memory(server)
    send_requests(200, 1700)
    assert memory(server) - before < 8 << 20


def test_connection_closes_when_a_client_does_not_read_responses(server_with_short_timeout):
    """The client requests long responses and reads none: first the socket buffers fill up, then the server's buffer."""
    _, key = server_with_short_timeout.account("alice")
    url = server_with_short_timeout.client(key).generate_presigned_url(
        "describe_instances", Params={"InstanceIds": ["i-" + "x" * 50_000]}, HttpMethod="GET"
    )
    address = urlsplit(url)
    request = f"GET /?{address.query} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    with connected(server_with_short_timeout) as connection:
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
        try:
            while True:
                connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert is_answered(server_with_short_timeout)


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    with ForkedServer.running(folder / "data", request_timeout=1, **certificate(folder)) as server:
        yield server


def test_tls_serves_boto3_which_checks_the_certificate(secure):
    assert secure.url.startswith("https://127.0.0.1:")
    account, key = secure.account("alice")
    assert secure.client(key).describe_instances()["Reservations"] == []
    assert secure.client(key, "sts").get_caller_identity()["Account"] == account.account_id
    with pytest.raises(SSLError):
        secure.client(key, verify=True).describe_instances()


def create_user_with_tls_policy(server):
    account, _ = server.account("acme")
    only_over_tls = {"Bool": {"aws:SecureTransport": "true"}}
    statement = {"Effect": "Allow", "Action": "ec2:*", "Resource": "*", "Condition": only_over_tls}
    engine = open_engine(server.data.database)
    users = Users(engine)
    user = users.create(account.account_id, "bob")
    document = json.dumps({"Version": "2012-10-17", "Statement": statement})
    users.put_policy(account.account_id, "bob", "only-over-tls", document)
    key = Accounts(engine, Vault.open_or_create(server.data.vault_key)).create_key(account.account_id, user)
    engine.dispose()
    return key


def test_policy_with_secure_transport_allows_tls_only(secure, server):
    over_tls = secure.client(create_user_with_tls_policy(secure))
    assert over_tls.describe_instances()["Reservations"] == []
    over_http = server.client(create_user_with_tls_policy(server))
    with pytest.raises(ClientError, match="UnauthorizedOperation"):
        over_http.describe_instances()


def connected_over_tls(server):
    context = ssl.create_default_context(cafile=server.environment["THRAVE_TLS_CERTIFICATE_FILE"])
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT) as connection:
        return context.wrap_socket(connection, server_hostname="127.0.0.1")


@pytest.mark.parametrize("beginning", [b"", b"POST / HTTP/1.1\r\nHost: thra"])
def test_tls_connection_closes_when_a_client_stops_sending(secure, beginning):
    # On a busy machine a handshake takes longer than the server waits.
    with eventually(lambda: connected_over_tls(secure), "a handshake ends in time", ignore=OSError) as connection:
        connection.sendall(beginning)
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            raise ConnectionResetError if connection.recv(1) == b"" else AssertionError


def test_tls_1_1_is_refused(secure):
    context = ssl.create_default_context(cafile=secure.environment["THRAVE_TLS_CERTIFICATE_FILE"])
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connected(secure) as raw, pytest.raises((ssl.SSLError, ConnectionResetError)):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_plain_http_on_a_tls_port_gets_no_response(secure):
    with connected(secure) as connection:
        connection.sendall(REQUEST)
        assert b"HTTP" not in read_to_end(connection)


def serve(folder, **settings):
    """Run the command until it ends by itself; return its status and stderr."""
    options = [f"{name} = {str(value)!r}" for name, value in settings.items()]
    (folder / "thrave.toml").write_text("\n".join(options))
    command = ["serve", "--listen-port", "0", "--config", folder / "thrave.toml", "--data-dir", folder / "data"]
    run = run_thrave(command, os.environ, timeout=TIMEOUT)
    return run.returncode, run.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_serve_refuses_plain_http_on_public_addresses(tmp_path, host):
    status, output = serve(tmp_path, listen_address=host)
    assert status == Exit.REFUSED
    assert "plain HTTP can be read by them: set tls_certificate_file and tls_key_file, or plain_http" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("host", "settings"),
    [
        ("127.0.0.1", {}),
        ("localhost", {}),
        ("127.9.9.9", {}),
        ("0.0.0.0", {"plain_http": "anywhere"}),
        ("0.0.0.0", "tls"),
    ],
)
def test_http_server_accepts_loopback_tls_and_plain_http_setting(tmp_path, host, settings):
    settings = certificate(tmp_path) if settings == "tls" else settings
    scheme = "https" if "tls_key_file" in settings else "http"
    http_server = HttpServer(Settings(listen_address=host, listen_port=0, **settings))
    with http_server._socket:
        assert http_server.url.startswith(f"{scheme}://")


def test_http_server_releases_the_port_after_a_refusal(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):
        with pytest.raises(PlainHttpNotAllowed):
            HttpServer(Settings(listen_address="0.0.0.0", listen_port=port))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: {**certificate(folder), "tls_key_file": folder / "nothing.pem"}, "No such file"),
        (lambda folder: {**certificate(folder), "tls_key_file": folder / "tls.pem"}, "cannot be used for TLS"),
        (lambda folder: certificate(folder, password=b"secret"), "cannot be used for TLS"),
        (lambda folder: {**certificate(folder), "listen_address": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
        (lambda folder: {"listen_address": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
    ],
)
def test_serve_reports_unusable_listen_settings_in_one_line(tmp_path, make, message):
    status, output = serve(tmp_path, **make(tmp_path))
    assert status == Exit.FAILED
    assert message in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["tls_certificate_file", "tls_key_file"])
def test_settings_refuse_certificate_or_key_alone(tmp_path, name):
    with pytest.raises(SettingsError, match="belong together"):
        load_settings(None, **{name: tmp_path / "tls.pem"})
    assert serve(tmp_path, **{name: tmp_path / "tls.pem"})[0] == Exit.USAGE


def test_forked_server_reports_a_failed_start(tmp_path):
    with (
        pytest.raises(ServerError, match=f"status {Exit.REFUSED.value}"),
        ForkedServer.running(tmp_path, listen_address="0.0.0.0"),
    ):
        pass


def test_request_in_progress_is_answered_during_shutdown(tmp_path):
    with ForkedServer.running(tmp_path) as server:
        with connected(server) as connection:
            connection.sendall(REQUEST[:-2])
            time.sleep(0.2)
            stop = threading.Thread(target=server.stop, args=(signal.SIGTERM,))
            connection.sendall(REQUEST[-2:])
            assert b"MissingParameter" in read_response(connection)
            stop.start()
        stop.join()
        assert server.process.returncode == 0


REFUSED = {
    "head one byte above the limit": (b"GET / HTTP/1.1\r\nX-A: " + b"a" * (MAX_HEAD_SIZE - 24) + b"\r\n\r\n", b"431"),
    "headers of 150 KiB": (b"GET / HTTP/1.1\r\n" + b"X-A: " + b"a" * (150 << 10) + b"\r\n\r\n", b"431"),
    "101 headers": (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_HEADERS + b"\r\n", b"431"),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", b"400"),
    "long target": (b"GET /?" + b"a" * (67 << 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
    "many chunks": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * (MAX_CHUNKS + 1),
        b"400",
    ),
    "long chunk extension": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * MAX_CHUNKED_SIZE + b"\r\na\r\n",
        b"4",
    ),
    "long trailer": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: " + b"a" * MAX_CHUNKED_SIZE,
        b"4",
    ),
    "not HTTP": (b"\0garbage\r\n\r\n", b"400"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_request_above_a_limit_is_refused_and_its_connection_closed(server, case):
    request, status = REFUSED[case]
    with connected(server) as connection:
        with suppress(OSError):
            connection.sendall(request)
        response = read_to_end(connection)
    # A connection that is closed while more bytes arrive is reset, and the response may be lost.
    assert response.startswith(b"HTTP/1.1 " + status) or (response == b"" and len(request) > 1 << 16)
    assert is_answered(server)


def test_request_head_below_the_limit_is_accepted(server):
    padding = b"X-A: " + b"a" * 1000 + b"\r\n"
    with connected(server) as connection:
        connection.sendall(REQUEST[:-2] + padding * 90 + b"\r\n")
        assert b"MissingParameter" in read_response(connection)


def test_pipelined_requests_are_limited(server):
    with connected(server) as connection:
        connection.sendall(REQUEST * 5)
        response = b""
        while response.count(b"</Response>") < 5:
            response += connection.recv(65536)
    with connected(server) as connection:
        with suppress(OSError):
            connection.sendall(REQUEST * 10_000)
        assert read_to_end(connection).count(b"</Response>") < 10_000
    assert is_answered(server)


def test_body_with_too_large_content_length_is_refused(server):
    with connected(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        assert b"<Code>RequestEntityTooLarge</Code>" in read_response(connection)


def test_upgrade_request_is_answered_as_an_ordinary_request(server):
    with connected(server) as connection:
        connection.sendall(REQUEST[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + REQUEST)
        response = read_to_end(connection)
    assert response.count(b"MissingParameter") == 1


def test_tls_on_a_plain_port_and_the_reverse_are_logged(tmp_path, capfd):
    with ForkedServer.running(tmp_path / "plain") as plain:
        address = urlsplit(plain.url)
        with pytest.raises(OSError), socket.create_connection((address.hostname, address.port), timeout=TIMEOUT) as raw:
            ssl.create_default_context().wrap_socket(raw, server_hostname="thrave")
    logged = capfd.readouterr().err
    assert "TLS? Use http://" in logged
    assert "remote=127.0.0.1" in logged
    with ForkedServer.running(tmp_path / "tls", **certificate(tmp_path)) as secure, connected(secure) as connection:
        connection.sendall(REQUEST)
        read_to_end(connection)
    logged = capfd.readouterr().err
    assert "TLS? Use https://" in logged
    assert "remote=127.0.0.1" in logged


@pytest.mark.parametrize(("hard", "expected"), [(4096, None), (300, "This process may open 300 files")])
def test_serve_raises_the_limit_of_open_files_or_refuses_to_start(tmp_path, hard, expected):
    limited = f"ulimit -Sn 64 && ulimit -Hn {hard} && exec {sys.executable} -m thrave serve -p 0 -d {tmp_path}/d"
    process = subprocess.Popen(["bash", "-c", limited], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output = process.stdout.readline()
        if expected is None:
            assert output.startswith("listening on ")
            assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == Settings().max_open_files
        else:
            assert output == ""
            assert expected in process.stderr.read()
            assert process.wait(TIMEOUT) == Exit.FAILED
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT)
