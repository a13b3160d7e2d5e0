"""What a client may cost the service, and where it listens: raw sockets, TLS, and the real command."""

import json
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
from support.service.forked_server import ForkedServer
from thrave.cli.exit_codes import Exit
from thrave.config import Settings, SettingsError, load_settings
from thrave.database import open_engine
from thrave.http_server import CHUNKED_LIMIT, HEAD_LIMIT, MAX_CHUNKS, MAX_HEADERS, HttpServer, PlainHttpNotAllowed
from thrave.identity.accounts import Accounts
from thrave.identity.users import Users
from thrave.testing import ServerError, ThraveServer
from thrave.vault import Vault

TIMEOUT = 60  # seconds
REQUEST = b"GET / HTTP/1.1\r\nHost: thrave\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """A server that waits one second."""
    with ForkedServer.running(tmp_path_factory.mktemp("impatient"), request_timeout=1) as server:
        yield server


@contextmanager
def connected(server):
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=TIMEOUT) as connection:
        yield connection


def received(connection):
    """Everything until the end of the connection, which must come, be it a clean one or not."""
    chunks = []
    try:
        while chunk := connection.recv(65536):
            chunks.append(chunk)
    except ConnectionResetError:
        pass
    return b"".join(chunks)


def one_answer(connection):
    """An answer as far as the end of its document; the connection stays."""
    answer = b""
    while b"</Response>" not in answer:
        chunk = connection.recv(65536)
        assert chunk, answer
        answer += chunk
    return answer


def is_answered(server):
    """Whether a request is answered on a connection of its own."""
    with connected(server) as connection:
        try:
            connection.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return b"<Code>MissingParameter</Code>" in received(connection)


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
def test_a_client_that_stops_in_the_middle_is_not_waited_for(impatient, beginning):
    with connected(impatient) as connection:
        connection.sendall(beginning)
        answer = received(connection)
    assert answer.count(b"<Code>MissingParameter</Code>") == beginning.count(REQUEST)
    assert is_answered(impatient)


@pytest.mark.parametrize(
    "beginning",
    [
        b"POST / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n",
        REQUEST,
    ],
)
def test_a_client_that_keeps_dripping_is_cut_off_all_the_same(impatient, beginning):
    drops = b"X-A: b\r\n" if beginning.count(b"\r\n\r\n") == 0 else b"GET /"
    with connected(impatient) as connection:
        connection.sendall(beginning)
        try:
            for number in range(TIMEOUT * 20):
                connection.sendall(drops[number % len(drops) :][:1])
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail("it was never cut off")


def test_a_head_without_end_is_cut_off_at_its_limit(impatient):
    sent = 0
    with connected(impatient) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        try:
            while sent < 100 * HEAD_LIMIT:
                sent += connection.send(b"X-A: " + b"x" * 4096 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail(f"{sent} bytes were taken")


def test_one_client_too_many_is_not_let_in_and_those_inside_are_served(tmp_path):
    with ForkedServer.running(tmp_path, max_connections=6) as server:
        with ExitStack() as inside:
            connections = [inside.enter_context(connected(server)) for _ in range(6)]
            for connection in connections:
                connection.sendall(REQUEST[:-2])
            assert not is_answered(server)
            for connection in connections:
                connection.sendall(REQUEST[-2:])
                assert b"MissingParameter" in one_answer(connection)
        assert eventually(lambda: is_answered(server))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ThraveServer.running(tmp_path_factory.mktemp("server"), request_timeout=5) as server:
        yield server


def memory(server):
    return psutil.Process(server.process.pid).memory_info().rss


def test_clients_that_stop_in_the_middle_do_not_keep_others_from_being_served(server):
    with ExitStack() as crowd:
        for _ in range(300):
            crowd.enter_context(connected(server)).sendall(
                b"POST / HTTP/1.1\r\nHost: thrave\r\nContent-Length: 9\r\n\r\nA"
            )
        assert is_answered(server)


def test_strangers_keys_leave_nothing_behind(server):
    form = "/?Action=DescribeInstances&Version=2016-11-15&SignatureVersion=2&SignatureMethod=HmacSHA256&Signature=x"
    timestamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def ask(first, last):
        with connected(server) as connection, connection.makefile("rb") as answers:
            for number in range(first, last):
                key = f"AKIA{number:016d}"
                line = f"GET {form}&Timestamp={timestamp}&AWSAccessKeyId={key} HTTP/1.1\r\nHost: thrave\r\n\r\n"
                connection.sendall(line.encode())
                assert answers.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
                length = next(int(line.split(b":")[1]) for line in iter(answers.readline, b"\r\n") if b"length" in line)
                while answers.readline() != b"\r\n":
                    pass
                answers.read(length)

    ask(0, 200)
    before = memory(server)
    ask(200, 1700)
    assert memory(server) - before < 8 << 20


def test_whoever_does_not_take_the_answer_is_cut_off(impatient):
    """Long answers are asked for and never read: first the sockets' buffers fill up, then ours, then it is over."""
    _, key = impatient.account("alice")
    url = impatient.client(key).generate_presigned_url(
        "describe_instances", Params={"InstanceIds": ["i-" + "x" * 50_000]}, HttpMethod="GET"
    )
    place = urlsplit(url)
    request = f"GET /?{place.query} HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode()
    with connected(impatient) as connection:
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
        try:
            while True:
                connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert is_answered(impatient)


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    with ForkedServer.running(folder / "data", request_timeout=1, **certificate(folder)) as server:
        yield server


def test_over_tls_boto3_is_served_and_checks_the_certificate(secure):
    assert secure.url.startswith("https://127.0.0.1:")
    account, key = secure.account("alice")
    assert secure.client(key).describe_instances()["Reservations"] == []
    assert secure.client(key, "sts").get_caller_identity()["Account"] == account.account_id
    with pytest.raises(SSLError):
        secure.client(key, verify=True).describe_instances()


def key_of_a_user_who_must_use_tls(server):
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


def test_a_policy_that_asks_for_tls_is_met_by_it_and_by_nothing_else(secure, server):
    over_tls = secure.client(key_of_a_user_who_must_use_tls(secure))
    assert over_tls.describe_instances()["Reservations"] == []
    in_plain = server.client(key_of_a_user_who_must_use_tls(server))
    with pytest.raises(ClientError, match="UnauthorizedOperation"):
        in_plain.describe_instances()


def connected_over_tls(server):
    context = ssl.create_default_context(cafile=server.environment["THRAVE_TLS_CERTIFICATE_FILE"])
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=TIMEOUT) as connection:
        return context.wrap_socket(connection, server_hostname="127.0.0.1")


@pytest.mark.parametrize("beginning", [b"", b"POST / HTTP/1.1\r\nHost: thra"])
def test_over_tls_too_a_client_that_stops_in_the_middle_is_not_waited_for(secure, beginning):
    # On a busy machine a handshake takes longer than the server waits.
    with eventually(lambda: connected_over_tls(secure), "a handshake ends in time", ignore=OSError) as connection:
        connection.sendall(beginning)
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            raise ConnectionResetError if connection.recv(1) == b"" else AssertionError


def test_an_old_tls_is_not_spoken(secure):
    context = ssl.create_default_context(cafile=secure.environment["THRAVE_TLS_CERTIFICATE_FILE"])
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connected(secure) as raw, pytest.raises((ssl.SSLError, ConnectionResetError)):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_plain_http_to_a_tls_port_learns_nothing(secure):
    with connected(secure) as connection:
        connection.sendall(REQUEST)
        assert b"HTTP" not in received(connection)


def serve(folder, **settings):
    """Run the command until it ends by itself; give its status and stderr."""
    options = [f"{name} = {str(value)!r}" for name, value in settings.items()]
    (folder / "thrave.toml").write_text("\n".join(options))
    command = [sys.executable, "-m", "thrave", "serve", "--listen-port", "0", "--config", folder / "thrave.toml"]
    command += ["--data-dir", folder / "data"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return run.returncode, run.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_plain_http_that_others_can_reach_is_refused_at_the_start(tmp_path, host):
    status, said = serve(tmp_path, listen_address=host)
    assert status == Exit.REFUSED
    assert "plain HTTP can be read by them: set tls_certificate_file and tls_key_file, or plain_http" in said
    assert "Traceback" not in said


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
def test_loopback_tls_and_the_operators_word_are_good_enough(tmp_path, host, settings):
    settings = certificate(tmp_path) if settings == "tls" else settings
    scheme = "https" if "tls_key_file" in settings else "http"
    listener = HttpServer(Settings(listen_address=host, listen_port=0, **settings))
    with listener._socket:
        assert listener.url.startswith(f"{scheme}://")


def test_a_refusal_lets_go_of_the_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):
        with pytest.raises(PlainHttpNotAllowed):
            HttpServer(Settings(listen_address="0.0.0.0", listen_port=port))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: {**certificate(folder), "tls_key_file": folder / "nothing.pem"}, "No such file"),
        (lambda folder: {**certificate(folder), "tls_key_file": folder / "tls.pem"}, "cannot be used for TLS"),
        (lambda folder: certificate(folder, password=b"secret"), "cannot be used for TLS"),
        (lambda folder: {**certificate(folder), "listen_address": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
        (lambda folder: {"listen_address": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_listened_with_is_said_in_a_line(tmp_path, make, complaint):
    status, said = serve(tmp_path, **make(tmp_path))
    assert status == Exit.FAILED
    assert complaint in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["tls_certificate_file", "tls_key_file"])
def test_a_certificate_without_its_key_is_no_setting(tmp_path, name):
    with pytest.raises(SettingsError, match="belong together"):
        load_settings(None, **{name: tmp_path / "tls.pem"})
    assert serve(tmp_path, **{name: tmp_path / "tls.pem"})[0] == Exit.USAGE


def test_a_server_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(ServerError, match=f"status {Exit.REFUSED.value}"),
        ForkedServer.running(tmp_path, listen_address="0.0.0.0"),
    ):
        pass


def test_a_request_under_way_is_answered_when_the_service_is_asked_to_stop(tmp_path):
    with ForkedServer.running(tmp_path) as server:
        with connected(server) as connection:
            connection.sendall(REQUEST[:-2])
            time.sleep(0.2)
            stop = threading.Thread(target=server.stop, args=(signal.SIGTERM,))
            connection.sendall(REQUEST[-2:])
            assert b"MissingParameter" in one_answer(connection)
            stop.start()
        stop.join()
        assert server.process.returncode == 0


REFUSED = {
    "a head of one byte too many": (b"GET / HTTP/1.1\r\nX-A: " + b"a" * (HEAD_LIMIT - 24) + b"\r\n\r\n", b"431"),
    "headers of 150 KiB": (b"GET / HTTP/1.1\r\n" + b"X-A: " + b"a" * (150 << 10) + b"\r\n\r\n", b"431"),
    "101 headers": (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_HEADERS + b"\r\n", b"431"),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", b"400"),
    "a long target": (b"GET /?" + b"a" * (67 << 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
    "many chunks": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * (MAX_CHUNKS + 1),
        b"400",
    ),
    "a long chunk extension": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * CHUNKED_LIMIT + b"\r\na\r\n",
        b"4",
    ),
    "a long trailer": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: " + b"a" * CHUNKED_LIMIT,
        b"4",
    ),
    "no HTTP": (b"\0garbage\r\n\r\n", b"400"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_beyond_a_limit_is_refused_and_the_connection_closed(server, what):
    request, status = REFUSED[what]
    with connected(server) as connection:
        with suppress(OSError):
            connection.sendall(request)
        answer = received(connection)
    # A connection that is closed while more is on its way is reset, and the answer may be lost by that.
    assert answer.startswith(b"HTTP/1.1 " + status) or (answer == b"" and len(request) > 1 << 16)
    assert is_answered(server)


def test_a_head_within_the_limits_is_read(server):
    padding = b"X-A: " + b"a" * 1000 + b"\r\n"
    with connected(server) as connection:
        connection.sendall(REQUEST[:-2] + padding * 90 + b"\r\n")
        assert b"MissingParameter" in one_answer(connection)


def test_some_requests_may_be_sent_ahead_and_many_may_not(server):
    with connected(server) as connection:
        connection.sendall(REQUEST * 5)
        answer = b""
        while answer.count(b"</Response>") < 5:
            answer += connection.recv(65536)
    with connected(server) as connection:
        with suppress(OSError):
            connection.sendall(REQUEST * 10_000)
        assert received(connection).count(b"</Response>") < 10_000
    assert is_answered(server)


def test_a_body_that_is_too_long_is_told_so_by_its_length(server):
    with connected(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        assert b"<Code>RequestEntityTooLarge</Code>" in one_answer(connection)


def test_an_upgrade_is_answered_as_any_request(server):
    with connected(server) as connection:
        connection.sendall(REQUEST[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + REQUEST)
        answer = received(connection)
    assert answer.count(b"MissingParameter") == 1


def test_tls_on_the_port_of_plain_http_and_the_reverse_are_logged(tmp_path, capfd):
    with ForkedServer.running(tmp_path / "plain") as plain:
        place = urlsplit(plain.url)
        with pytest.raises(OSError), socket.create_connection((place.hostname, place.port), timeout=TIMEOUT) as raw:
            ssl.create_default_context().wrap_socket(raw, server_hostname="thrave")
    logged = capfd.readouterr().err
    assert "TLS? Use http://" in logged
    assert "remote=127.0.0.1" in logged
    with ForkedServer.running(tmp_path / "tls", **certificate(tmp_path)) as secure, connected(secure) as connection:
        connection.sendall(REQUEST)
        received(connection)
    logged = capfd.readouterr().err
    assert "TLS? Use https://" in logged
    assert "remote=127.0.0.1" in logged


@pytest.mark.parametrize(("hard", "expected"), [(4096, None), (300, "This process may open 300 files")])
def test_the_limit_of_open_files_is_raised_or_the_start_refused(tmp_path, hard, expected):
    limited = f"ulimit -Sn 64 && ulimit -Hn {hard} && exec {sys.executable} -m thrave serve -p 0 -d {tmp_path}/d"
    process = subprocess.Popen(["bash", "-c", limited], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        if expected is None:
            assert said.startswith("listening on ")
            assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == Settings().max_open_files
        else:
            assert said == ""
            assert expected in process.stderr.read()
            assert process.wait(TIMEOUT) == Exit.FAILED
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT)
