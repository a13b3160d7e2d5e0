"""Bundles on web servers: TLS, parallel requests, hostile and broken servers."""

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from support.bundles.sample_bundles import VECTORS
from support.servers import web
from support.servers.tls import certificate
from thrave.bundle.manifest import read_manifest
from thrave.cli import remote_folders
from thrave.cli.folders import LocalFolder, read_ahead
from thrave.cli.remote_folders import web_folder

FAILED, USAGE, NOT_FOUND, REFUSED, DAMAGED, INTERRUPTED = 1, 2, 3, 4, 10, 130
KEYS = VECTORS / "keys"
MIB = 1024 * 1024
IMAGES = {
    "ec2-ami-tools-1.5.3-dense-2-parts/small.img": "0fc3b64b0304d6e6da8ed6d9b445371c34570f51",
    "ec2-ami-tools-1.5.3-sparse/sparse.img": "c9a6ef082b2daa44ba5aac84f19197a6f07870de",
    "euca2ools-3.4.1-empty-last-part/tiny": "58bf0107d43bc5b1cc409c14598d4200527d674a",
    "go_ami_tools/tiny": "58bf0107d43bc5b1cc409c14598d4200527d674a",
}
TWO_PARTS = "ec2-ami-tools-1.5.3-dense-2-parts/small.img.manifest.xml"


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch):
    monkeypatch.setattr(remote_folders, "RETRY_TIMEOUT", 0.4)
    monkeypatch.setattr(remote_folders, "CALL_TIMEOUT", 30.0)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A file with a certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    files = certificate(folder)
    both = folder / "both.pem"
    both.write_bytes(files["tls_certificate_file"].read_bytes() + files["tls_key_file"].read_bytes())
    return both


@pytest.fixture
def secure(tls, monkeypatch):
    """A server of the bundles of old tools, with a trusted certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    with web.serving_files(VECTORS, certificate=tls) as site:
        yield site


@pytest.fixture
def site():
    with web.serving_files(VECTORS) as site:
        yield site


@pytest.mark.parametrize("bundle", IMAGES)
def test_open_reads_bundles_of_other_tools_over_https(thrave_json, secure, tmp_path, bundle):
    address = f"{secure.url}/{bundle}.manifest.xml"
    opened = thrave_json("open", address, "--key", KEYS / "user-pk.pem", "-o", tmp_path / "image")
    assert hashlib.sha1((tmp_path / "image").read_bytes()).hexdigest() == IMAGES[bundle]
    assert opened["manifest"] == address


def test_verify_and_show_print_same_for_url_and_file(thrave_json, secure):
    address, file = f"{secure.url}/{TWO_PARTS}", VECTORS / TWO_PARTS
    for command in (("show",), ("verify", "--certificate", KEYS / "user-cert.pem")):
        far, near = (thrave_json(command[0], where, *command[1:]) for where in (address, file))
        assert (far.pop("manifest"), near.pop("manifest")) == (address, str(file))
        assert far == near


def test_untrusted_certificate_is_refused(thrave, tls):
    with web.serving_files(VECTORS, certificate=tls) as site:
        status, _, stderr = thrave("show", f"{site.url}/{TWO_PARTS}")
    assert (status, "certificate" in stderr, site.requested) == (FAILED, True, [])


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://example.com/a.manifest.xml", "allowed only for this machine"),
        ("https://user:secret@example.com/a.manifest.xml", "a user"),
        ("https://example.com/a.manifest.xml?token=secret", "PREFIX.manifest.xml"),
        ("https://example.com/?token=secret/a.manifest.xml", "a query"),
        ("https:///a.manifest.xml", "PREFIX.manifest.xml"),
        ("https://example.com/folder/", "PREFIX.manifest.xml"),
        ("https://example.com/.manifest.xml", "PREFIX.manifest.xml"),
        ("ftp://example.com/a.manifest.xml", "neither"),
        ("s3://my bucket/a.manifest.xml", "bucket is not valid"),
        ("s3://../a.manifest.xml", "bucket is not valid"),
        ("s3://a.manifest.xml", "PREFIX.manifest.xml"),
    ],
)
def test_invalid_address_is_usage_error_without_request(thrave, address, reason):
    status, _, stderr = thrave("show", address)
    assert (status, reason in stderr) == (USAGE, True), stderr


@pytest.mark.parametrize("command", ["delete", "migrate", "copy"])
def test_delete_copy_and_migrate_refuse_web_server(thrave, site, command):
    address = f"{site.url}/{TWO_PARTS}"
    keys = (
        "--key",
        KEYS / "user-pk.pem",
        "--certificate",
        KEYS / "user-cert.pem",
        "--signing-key",
        KEYS / "user-pk.pem",
    )
    words = {
        "delete": ("delete", "--yes", address),
        "copy": ("copy", VECTORS / TWO_PARTS, f"{site.url}/"),
        "migrate": ("migrate", address, *keys, "--service-certificate", KEYS / "cloud-cert.pem"),
    }
    status, _, _ = thrave(*words[command])
    assert status == USAGE
    assert {method for method, _ in site.requested} <= {"GET"}


HOSTILE = {
    "a redirect to a file": (web.status(302, Location="file:///etc/passwd"), FAILED, "is redirected"),
    "a redirect to itself": (web.status(301, Location="/" + TWO_PARTS), FAILED, "is redirected"),
    "a redirect to another host": (
        web.status(307, Location="http://169.254.169.254/"),
        FAILED,
        "is redirected",
    ),
    "not there": (web.status(404), NOT_FOUND, "does not exist"),
    "forbidden": (web.status(403), REFUSED, "403"),
    "broken": (web.status(500), FAILED, "500"),
    "endless": (web.endless, FAILED, "more than"),
    "endless headers": (web.endless_headers, FAILED, "lost"),
    "shorter than it said": (web.longer_than_said, DAMAGED, "truncated"),
    "cut off": (web.cut_off, FAILED, "lost"),
    "hung up": (web.hung_up, FAILED, "lost"),
    "gibberish": (web.gibberish, FAILED, "lost"),
}


@pytest.mark.parametrize("behaviour", HOSTILE)
def test_hostile_web_server_causes_clear_error(thrave, site, behaviour):
    site.behaviour["manifest.xml"], code, reason = HOSTILE[behaviour]
    status, stdout, stderr = thrave("show", f"{site.url}/{TWO_PARTS}")
    assert (status, stdout) == (code, "")
    assert reason in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


# The same for S3 requests to a server that is not a store. Temporary redirects are part of S3 and are retried.
HOSTILE_STORE = {name: HOSTILE[name] for name in HOSTILE if name != "shorter than it said"}


@pytest.mark.parametrize("behaviour", HOSTILE_STORE)
def test_hostile_store_causes_clear_error(thrave, site, monkeypatch, behaviour):
    site.behaviour["manifest.xml"], code, reason = HOSTILE_STORE[behaviour]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", site.url)
    status, stdout, stderr = thrave("show", f"s3://{TWO_PARTS}")
    assert (status, stdout) == (code, "")
    assert reason in stderr.splitlines()[-1]


def test_show_reads_store_without_ranges(thrave, site, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", site.url)
    status, stdout, _ = thrave("show", f"s3://{TWO_PARTS}")
    assert (status, "FIELD" in stdout) == (0, True)


def test_copy_reports_store_without_object_size(thrave, site, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", site.url)
    site.behaviour["manifest.xml"] = web.status(404)
    site.behaviour["part.0"] = web.status(200, Content_Length="-many")
    status, _, stderr = thrave("copy", VECTORS / TWO_PARTS, "s3://ec2-ami-tools-1.5.3-dense-2-parts")
    assert (status, "does not report the size" in stderr) == (FAILED, True)


def test_slow_server_is_abandoned_after_timeout(thrave, site, monkeypatch):
    monkeypatch.setattr(remote_folders, "CALL_TIMEOUT", 0.5)
    site.behaviour["manifest.xml"] = web.trickle(site)
    status, _, stderr = thrave("show", f"{site.url}/{TWO_PARTS}")
    assert (status, "within 0.5 seconds" in stderr) == (FAILED, True)


@pytest.mark.parametrize(
    "fault",
    [web.status(503), web.status(429), web.cut_off, web.hung_up, web.gibberish],
)
def test_open_retries_transient_fault(thrave, site, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(remote_folders, "RETRY_TIMEOUT", 60.0)
    site.behaviour["part.1"] = web.times(2, fault)
    address = f"{site.url}/{TWO_PARTS}"
    status, _, stderr = thrave("open", address, "--key", KEYS / "user-pk.pem", "-o", tmp_path / "image")
    assert status == 0, stderr
    assert stderr.count("retrying in") == 2


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (web.status(404), NOT_FOUND),
        (web.endless, FAILED),
        (web.longer_than_said, DAMAGED),
        (web.hung_up, FAILED),
    ],
)
def test_open_with_missing_part_leaves_no_image(thrave, site, tmp_path, behaviour, code):
    site.behaviour["part.1"] = behaviour
    address = f"{site.url}/{TWO_PARTS}"
    status, _, stderr = thrave("open", address, "--key", KEYS / "user-pk.pem", "-o", tmp_path / "image")
    assert (status, "small.img.part.1" in stderr) == (code, True)
    assert list(tmp_path.iterdir()) == []


def test_verify_requests_several_parts_at_once(thrave_json, site, tmp_path):
    """The server sends no part before two are requested."""
    together = threading.Barrier(2, timeout=30)

    def wait(_):
        together.wait()
        return False

    site.behaviour = {"part.0": wait, "part.1": wait}
    thrave_json("verify", f"{site.url}/{TWO_PARTS}")
    assert not together.broken


def test_name_with_spaces_and_percent_signs_is_found(thrave_json, tmp_path):
    for path in (VECTORS / "go_ami_tools").iterdir():
        shutil.copy(path, tmp_path / path.name.replace("tiny.manifest", "100% of it.manifest"))
    with web.serving_files(tmp_path) as site:
        assert thrave_json("verify", f"{site.url}/100% of it.manifest.xml")["name"] == "tiny"
        assert thrave_json("verify", f"{site.url}/100%25%20of%20it.manifest.xml")["name"] == "tiny"


def test_verify_sample_checks_every_size_and_reads_sample(thrave_json, site):
    thrave_json("verify", f"{site.url}/{TWO_PARTS}", "--sample", "1%", "--seed", "1")
    asked = [(method, path.rpartition(".")[2]) for method, path in site.requested if ".part." in path]
    assert sorted(asked) == [("GET", asked[-1][1]), ("HEAD", "0"), ("HEAD", "1")]


def test_verify_reports_server_without_size(thrave, site):
    site.behaviour["part.0"] = lambda handler: handler.command == "HEAD" and web.hidden_size(handler)
    status, _, stderr = thrave("verify", f"{site.url}/{TWO_PARTS}", "--sample", "1%")
    assert (status, "does not report the size" in stderr) == (FAILED, True)


def test_copy_reads_web_server(thrave_json, secure, tmp_path):
    copied = thrave_json("copy", f"{secure.url}/{TWO_PARTS}", tmp_path, "--certificate", KEYS / "user-cert.pem")
    assert copied["partsSent"] == 2
    original = (VECTORS / TWO_PARTS).parent
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }


@pytest.mark.parametrize(("part_size", "ahead"), [(1, 8), (10 * MIB, 8), (16 * MIB, 7), (63 * MIB, 2), (200 * MIB, 2)])
def test_read_ahead_is_limited_by_memory(part_size, ahead):
    manifest = read_manifest((VECTORS / TWO_PARTS).read_bytes())
    manifest = replace(manifest, bundled_size=part_size * len(manifest.parts))
    assert read_ahead(web_folder("https://example.com/"), manifest) == ahead
    assert read_ahead(LocalFolder(VECTORS), manifest) is None


def test_ctrl_c_does_not_wait_for_unresponsive_server(site, tmp_path):
    asked = threading.Event()

    def silent(handler):
        handler.close_connection = True
        asked.set()
        return site.ended.wait(60)

    site.behaviour["part.0"] = silent
    words = ["open", f"{site.url}/{TWO_PARTS}", "--key", str(KEYS / "user-pk.pem"), "-o", str(tmp_path / "image")]
    with subprocess.Popen([sys.executable, "-m", "thrave", *words], stderr=subprocess.DEVNULL) as thrave:
        assert asked.wait(60)
        thrave.send_signal(signal.SIGINT)
        assert thrave.wait(20) == INTERRUPTED
    assert list(tmp_path.iterdir()) == []
