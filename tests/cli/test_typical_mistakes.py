"""Typical mistakes of new users: what was mistaken, exit code, message and remedy.

`test_usage_errors.py` has more mistakes in the calls of the bundle commands.
"""

import shlex
import shutil
import socket
from typing import NamedTuple

import pytest

from support.bundles.sample_bundles import VECTORS
from thrave.cli.exit_codes import Exit

UNRESOLVABLE = "no-such-host.invalid"  # RFC 2606: never resolves
DATA = "--data-dir data"
OPEN = "open small.img.manifest.xml --key user-pk.pem --certificate user-cert.pem"
BUNDLE = (
    "bundle disk.raw --prefix p --to new --account 123456789012 --user-certificate user-cert.pem"
    " --service-certificate cloud-cert.pem --signing-key user-pk.pem"
)
ADD = f"instance add {DATA} --account acme --platform windows --root-volume disk.raw"


class Mistake(NamedTuple):
    """A row of the table."""

    what: str
    command: str
    """Arguments of `thrave`, after `NAME=VALUE` of the environment. At `:PORT` nothing listens."""
    code: Exit
    message: str
    remedy: str


MISTAKES = [
    # Typing errors
    Mistake("command", "sevre", Exit.USAGE, "No such command 'sevre'", "Did you mean 'serve'?"),
    Mistake("command of a group", "task shwo", Exit.USAGE, "No such command 'shwo'", "Did you mean 'show'?"),
    Mistake("option", f"{OPEN} --kye x", Exit.USAGE, "No such option '--kye'", "Did you mean '--key'?"),
    Mistake("missing argument", "open", Exit.USAGE, "Missing argument 'LOCATION'", "See `thrave open --help`"),
    Mistake("format", f"{OPEN} --format qcow3 -o o", Exit.USAGE, "'qcow3' is not one of", "'raw', 'qcow2'"),
    Mistake("platform", ADD.replace("windows", "beos"), Exit.USAGE, "'beos' is not one of", "'windows', 'linux'"),
    Mistake("size", "demo-disk x.raw --size 10GIB9", Exit.USAGE, "'10GIB9' is not a size", "Examples: 256MiB, 10GB"),
    Mistake("size that is too small", "demo-disk x.raw --size 1", Exit.USAGE, "not 1 bytes", "at least 64 MiB"),
    Mistake("account id", BUNDLE.replace("123456789012", "1234"), Exit.USAGE, "account id '1234'", "is not 12 digits"),
    Mistake("port", f"serve {DATA} --listen-port 99999", Exit.USAGE, "--listen-port", "must be a whole number, 65535"),
    # Files
    Mistake("no manifest", OPEN.replace("small", "none") + " -o o", Exit.NOT_FOUND, "none.img", "Check the path"),
    Mistake("folder as manifest", OPEN.replace("small.img.manifest.xml", "empty") + " -o o", Exit.USAGE,
            "empty is a folder", "Pass the manifest: empty/PREFIX.manifest.xml"),
    Mistake("part as manifest", OPEN.replace("manifest.xml", "part.0") + " -o o", Exit.DAMAGED,
            "is a part of a bundle, not its manifest", "Pass small.img.manifest.xml"),
    Mistake("empty manifest", OPEN.replace("small.img.manifest.xml", "nothing") + " -o o", Exit.DAMAGED,
            "the manifest is truncated: it is empty", "Get another copy of the bundle"),
    Mistake("no part", OPEN.replace("small", "no-part/small") + " -o o", Exit.NOT_FOUND,
            "small.img.part.0 does not exist", "Copy the part into the directory of the manifest"),
    Mistake("truncated part", OPEN.replace("small", "short/small") + " -o o", Exit.DAMAGED,
            "part 'small.img.part.0' is damaged", "Copy the part again from another copy"),
    Mistake("output exists", f"{OPEN} -o disk.raw", Exit.REFUSED, "disk.raw exists", "replace it with --force"),
    Mistake("no image", BUNDLE.replace("disk.raw", "no.raw"), Exit.NOT_FOUND, "no.raw does not", "Check the path"),
    Mistake("demo disk exists", "demo-disk disk.raw", Exit.REFUSED, "disk.raw exists", "Remove it, or name another"),
    Mistake("prefix with a slash", BUNDLE.replace("--prefix p", "--prefix a/b"), Exit.USAGE,
            "the prefix 'a/b'", "must be a plain ASCII file name: no slash"),
    Mistake("no root volume", ADD.replace("disk.raw", "no.raw"), Exit.NOT_FOUND, "no.raw does not", "Check the path"),
    Mistake("qcow2 given as raw", ADD.replace("disk.raw", "disk.qcow2"), Exit.USAGE,
            "has the format qcow2, not raw", "Pass --format qcow2"),
    # Keys
    Mistake("no key", OPEN.replace("user-pk", "no-pk") + " -o o", Exit.NOT_FOUND, "no-pk.pem does", "Check the path"),
    Mistake("certificate as key", OPEN.replace("user-pk", "user-cert") + " -o o", Exit.USAGE,
            "this is a certificate", "Pass its key"),
    Mistake("key as certificate", OPEN.replace("user-cert", "user-pk") + " -o o", Exit.USAGE,
            "this is a private key", "Pass its certificate"),
    Mistake("key of another bundle", OPEN.replace("user-pk", "wrong-pk") + " -o o", Exit.WRONG_KEY,
            "was not encrypted for this private key", "Pass the private key that belongs to one of the two"),
    Mistake("certificate of another signer", OPEN.replace("user-cert", "cloud-cert") + " -o o", Exit.DAMAGED,
            "another key than this certificate's signed it", "Pass the certificate of the signer"),
    # Service: data directory, settings, names
    Mistake("no data directory", "account list --data-dir goood", Exit.USAGE,
            "No data directory at goood", "Create it with `thrave account create`"),
    Mistake("no settings file", "account list --config no.toml", Exit.NOT_FOUND, "no.toml does", "Check the path"),
    Mistake("unknown setting in a file", "account list --config unknown.toml", Exit.USAGE,
            "unknown.toml, line 1: shutdown_timout", "did you mean shutdown_timeout?"),
    Mistake("unknown setting in the environment", f"THRAVE_SHUTDOWN_TIMOUT=3 account list {DATA}", Exit.USAGE,
            "THRAVE_SHUTDOWN_TIMOUT: unknown setting", "did you mean THRAVE_SHUTDOWN_TIMEOUT?"),
    Mistake("wrong type of a setting", "account list --config type.toml", Exit.USAGE,
            "type.toml, line 1: shutdown_timeout", "must be a number"),
    Mistake("not TOML", "account list --config invalid.toml", Exit.USAGE,
            "invalid.toml, line 1, column 20: not valid TOML", "Text needs quotes, numbers do not"),
    Mistake("another database", f"THRAVE_DATABASE_URL=mysql://x/y account list {DATA}", Exit.USAGE,
            "THRAVE_DATABASE_URL", "must be postgresql://USER@HOST/NAME"),
    Mistake("name in use", f"account create acme {DATA}", Exit.REFUSED,
            "Account with name acme already exists", "Choose another name"),
    Mistake("no account", ADD.replace("acme", "nobody"), Exit.NOT_FOUND,
            "The account with id nobody cannot be found", "`thrave account list` lists"),
    Mistake("no access key", f"account key delete AKIANONE --yes {DATA}", Exit.NOT_FOUND,
            "Access Key with id AKIANONE cannot be found", "`thrave account list` lists"),
    Mistake("no instance", f"instance show i-00000000000000009 {DATA}", Exit.NOT_FOUND,
            "there is no instance 'i-00000000000000009'", "`thrave instance list` lists"),
    Mistake("no task", f"task show bun-00000000000000000 {DATA}", Exit.NOT_FOUND,
            "bundle task ID 'bun-00000000000000000' does not exist", "`thrave task list` lists"),
    Mistake("no host", f"host drain nohost {DATA}", Exit.NOT_FOUND, "no host nohost", "`thrave host list` lists"),
    # Network
    Mistake("bucket without a manifest", "show s3://bucket", Exit.USAGE,
            "s3://bucket is not the address of a manifest", "must end in /PREFIX.manifest.xml"),
    Mistake("plain HTTP", "show http://192.0.2.1/x.manifest.xml", Exit.USAGE,
            "http:// is allowed only for this machine", "use https:// for 192.0.2.1"),
    Mistake("no store at the port", "AWS_ENDPOINT_URL=http://127.0.0.1:PORT show s3://b/x.manifest.xml", Exit.FAILED,
            "Cannot connect to the store 127.0.0.1:PORT: Connection refused", "Check the address and the network"),
    Mistake("host that does not resolve", f"show https://{UNRESOLVABLE}/x.manifest.xml", Exit.FAILED,
            f"The host name of the store {UNRESOLVABLE} does not resolve", "Check the address and the network"),
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a bundle, keys, disks and wrong files."""
    folder = tmp_path_factory.mktemp("mistakes")
    bundle = VECTORS / "ec2-ami-tools-1.5.3-dense-2-parts"
    for place in (folder, folder / "no-part", folder / "short"):
        shutil.copytree(bundle, place, dirs_exist_ok=True)
    shutil.copytree(VECTORS / "keys", folder, dirs_exist_ok=True)
    (folder / "no-part" / "small.img.part.0").unlink()
    part = folder / "short" / "small.img.part.0"
    part.write_bytes(part.read_bytes()[:1000])
    (folder / "empty").mkdir()
    (folder / "nothing").touch()
    (folder / "disk.raw").write_bytes(bytes(4096))
    (folder / "disk.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(65528))
    (folder / "unknown.toml").write_text("shutdown_timout = 3\n")
    (folder / "type.toml").write_text('shutdown_timeout = "long"\n')
    (folder / "invalid.toml").write_text("shutdown_timeout = \n")
    return folder


@pytest.fixture
def folder(prepared, thrave, monkeypatch):
    """The working directory, with the data directory of a service that has the account `acme`."""
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HOME", str(prepared))
    if not (prepared / "data").exists():
        status, _, stderr = thrave("account", "create", "acme", *DATA.split())
        assert status == Exit.OK, stderr
    return prepared


@pytest.fixture(scope="module")
def closed_port():
    """A port at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_table_has_forty_mistakes():
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES) >= 40


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistake_has_exit_code_message_and_remedy(thrave, monkeypatch, closed_port, mistake):
    port = f":{closed_port}"
    words = shlex.split(mistake.command.replace(":PORT", port))
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        monkeypatch.setenv(name, value)
    if "s3://" in mistake.command:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    status, stdout, stderr = thrave(*words)
    assert (status, stdout) == (mistake.code, ""), stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("thrave: ")
    assert mistake.message.replace(":PORT", port) in last
    assert mistake.remedy in last
    assert "Traceback" not in stderr
