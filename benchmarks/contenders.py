"""The programs that are compared: Thrave's own commands and service, and pipelines of other programs.

Every contender that makes a bundle does the work of ec2-ami-tools 1.5.3: a sparse tar, its SHA-1, gzip, AES-128-CBC,
parts of 10 MiB, and the SHA-1 of each. (Thrave also adds SHA-256, signs, and encrypts its key.) Each result is opened
with OpenSSL, igzip and GNU tar and compared with the disk before its time counts.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from disks import GIB, Disk, DiskFolder, are_equal, stored_bytes
from harness import CORES, Arguments, ProgramFailedError, Run, Step, Usage, observe, run

from thrave.bundle.manifest import read_manifest
from thrave.bundle.model import BundleKey, decrypt_key
from thrave.identity.accounts import AccessKey
from thrave.identity.certificates import load_private_key, new_certificate
from thrave.testing import ThraveServer

PREFIX = "image"
PART_SIZE = 10 << 20
_THRAVE = (sys.executable, "-m", "thrave")
_ACCOUNT = "123456789012"
_BUCKET = "bench"
_SHELL_SECRETS = BundleKey(bytes(range(16)), bytes(range(16, 32)))
_LIMITS = Path(__file__).with_name("library_limits.py")

_TASK_INTERVAL = 0.25  # seconds between two requests about a task: each costs the server some milliseconds
_PART_INTERVAL = 0.005  # seconds between two looks for the next part in the bucket
_TASK_TIMEOUT = 600  # seconds


class WrongOutputError(Exception):
    """The result of a contender is not the disk."""


@dataclass(frozen=True)
class Keys:
    """Files of a certificate and its private key."""

    certificate: Path
    private_key: Path

    @classmethod
    def create(cls, folder: Path) -> "Keys":
        """Make a new pair."""
        keys = cls(folder / "cert.pem", folder / "pk.pem")
        for path, pem in zip((keys.certificate, keys.private_key), new_certificate("bench"), strict=True):
            path.write_text(pem)
        return keys

    def secrets(self, bundle: Path) -> BundleKey:
        """Decrypt key and IV of a bundle."""
        manifest = read_manifest(manifest_in(bundle).read_bytes())
        return decrypt_key((manifest.user_slot, manifest.ec2_slot), load_private_key(self.private_key.read_bytes()))


@dataclass(frozen=True)
class Workspace:
    """Everything that contenders share.

    Attributes:
        folder: Makes the disks.
        scratch: A folder on tmpfs, for keys and for bundles that are opened.
        used: Disks that were asked for.
    """

    folder: DiskFolder
    scratch: Path
    used: set[Path] = field(default_factory=set)

    @cached_property
    def keys(self) -> Keys:
        """Keys of all bundles."""
        return Keys.create(self.scratch)

    def path(self, disk: Disk) -> Path:
        """Return the file of a disk, which may have to be made."""
        path = self.folder.path(disk)
        self.used.add(path)
        return path

    def bundle(self, disk: Disk) -> Path:
        """Return the folder of a bundle of a disk, which is made once."""
        folder = self.scratch / f"bundle-of-{disk.name}"
        if not folder.exists():
            run([Step([_bundle_command(self, disk, folder)])])
        return folder


@dataclass(frozen=True)
class Contender:
    """One of the programs that are compared.

    Attributes:
        name: In the table.
        disk: The disk that it processes.
    """

    name: str
    disk: Disk

    def prepare(self, space: Workspace) -> None:
        """Make what is needed and not measured; raises CannotMakeError."""
        space.path(self.disk)

    def run(self, space: Workspace, folder: Path) -> Run:
        """Do the work in an empty folder on tmpfs, and measure it."""
        raise NotImplementedError

    def check(self, space: Workspace, folder: Path) -> None:
        """Check the result of a run in its folder; raises WrongOutputError."""


@dataclass(frozen=True)
class ThraveBundle(Contender):
    """`thrave bundle`.

    Attributes:
        options: Of the command.
        wrapper: A program that runs the command.
        is_same: Whether the opened image is right; by default it must equal the disk.
    """

    options: Sequence[str] = ()
    wrapper: Sequence[str] = ()
    is_same: Callable[[Path], bool] | None = None

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        command = _bundle_command(space, self.disk, folder, *self.options)
        done = run([Step([[*self.wrapper, *command]])])
        return replace(done, size=total_size(parts_in(folder)))

    def check(self, space: Workspace, folder: Path) -> None:
        """See Contender."""
        secrets = space.keys.secrets(folder)
        if self.is_same is None:
            check_bundle(folder, secrets, space.path(self.disk), folder)
        elif not self.is_same(image := _open(folder, secrets, folder)):
            raise WrongOutputError(f"{image} is not the bundled disk")


@dataclass(frozen=True)
class ShellBundle(Contender):
    """The pipeline that ec2-ami-tools runs, with any compressor; by default the command is the name."""

    compressor: Sequence[str] = ()

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        encrypted = folder / "image.enc"
        done = run(self._steps(space.path(self.disk), folder, encrypted))
        staged = encrypted.stat().st_size
        encrypted.unlink()
        return replace(done, staged=staged, size=total_size(parts_in(folder)))

    def check(self, space: Workspace, folder: Path) -> None:
        """See Contender."""
        check_bundle(folder, _SHELL_SECRETS, space.path(self.disk), folder)

    def _steps(self, disk: Path, folder: Path, encrypted: Path) -> Iterator[Step]:
        fifo = folder / "fifo"
        os.mkfifo(fifo)
        tar: Arguments = ["tar", "-c", "-h", "-S", "--owner", "0", "--group", "0", "-C", disk.parent, disk.name]
        compressor = self.compressor or self.name.split()
        pipeline: list[Arguments] = [tar, ["tee", fifo], compressor, _openssl("-e", _SHELL_SECRETS)]
        yield Step(pipeline, encrypted, [["openssl", "sha1", fifo]])
        parts: Arguments = [encrypted, folder / f"{PREFIX}.part."]
        yield Step([["split", "-b", str(PART_SIZE), "-d", "-a", "4", *parts]])
        yield Step([["openssl", "sha1", *parts_in(folder)]])


@dataclass(frozen=True)
class Libraries(Contender):
    """What the machine could do if the libraries alone worked, on all cores, and no thread waited for another.

    Attributes:
        work: A name in `library_limits.WORK`.
        cores: How many cores it can use.
    """

    work: str = ""
    cores: int = CORES

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        output = folder / "seconds.json"
        done = run([Step([[sys.executable, _LIMITS, self.work, space.path(self.disk), folder]], output)])
        seconds: dict[str, float] = json.loads(output.read_text())
        total = sum(seconds.values())
        return replace(done, wall=total / self.cores, cpu=total, detail=seconds)


@dataclass(frozen=True)
class ThraveOpen(Contender):
    """`thrave open` with every check."""

    def prepare(self, space: Workspace) -> None:
        """See Contender."""
        space.path(self.disk)
        space.bundle(self.disk)

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        return run([Step([[*_open_command(space, space.bundle(self.disk)), "-o", folder / "disk"]])])

    def check(self, space: Workspace, folder: Path) -> None:
        """See Contender."""
        _check_image(folder / "disk", space.path(self.disk))


@dataclass(frozen=True)
class ShellOpen(Contender):
    """A pipeline that opens a bundle without any check."""

    def prepare(self, space: Workspace) -> None:
        """See Contender."""
        space.path(self.disk)
        space.bundle(self.disk)

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        bundle = space.bundle(self.disk)
        decrypt = _decrypt_pipeline(bundle, space.keys.secrets(bundle), "gzip")
        return run([Step([*decrypt, ["tar", "-x", "-C", folder]])])

    def check(self, space: Workspace, folder: Path) -> None:
        """See Contender."""
        _check_image(_only_file(folder), space.path(self.disk))


@dataclass(frozen=True)
class ThraveBundleAndOpen(Contender):
    """`thrave bundle`, then `thrave open --stdout`, compared with the disk; details have the memory of the second.

    For disks that are too large for a copy on tmpfs. The memory of `cmp`, two MiB, is included.
    """

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        bundle = folder / "bundle"
        sealed = run([Step([_bundle_command(space, self.disk, bundle)])])
        opened = run([Step([[*_open_command(space, bundle), "--stdout"], ["cmp", "-", space.path(self.disk)]])])
        return replace(sealed, size=total_size(parts_in(bundle)), detail={"memory to open": opened.memory})


@dataclass(frozen=True)
class ThraveServe(Contender):
    """A task of `thrave serve`, from BundleInstance to `complete`, requested by an unmodified boto3.

    All data of the service are on tmpfs. The CPU time of the client does not count.
    """

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        with _Client.connected(folder, space.path(self.disk)) as client, observe() as observation:
            assert client.server.process is not None
            observation.roots.append(client.server.process.pid)
            before = client.usage()
            client.bundle()
            client.wait_until_complete()
            used = client.usage().since(before)
        foreign, size = observation.foreign(used.cpu), total_size(parts_in(_bucket(folder)))
        return Run(observation.wall, used.cpu, observation.memory, used.written or 0, foreign=foreign, size=size)

    def check(self, space: Workspace, folder: Path) -> None:
        """See Contender."""
        bucket = _bucket(folder)
        check_bundle(
            bucket, Keys(folder / "cert.pem", folder / "pk.pem").secrets(bucket), space.path(self.disk), folder
        )


@dataclass(frozen=True)
class ThraveKilled(ThraveServe):
    """The same, but the server is killed (SIGKILL) at half of the task and started again.

    The CPU time is that of both servers while they were running. Details: seconds from the start of the second server
    until the next new part in the bucket, number of parts that were sent twice, and GiB of data before the kill.
    """

    def run(self, space: Workspace, folder: Path) -> Run:
        """See Contender."""
        bucket, disk = _bucket(folder), space.path(self.disk)
        with _Client.connected(folder, disk) as client, observe() as observation:
            before = client.usage()
            client.bundle()
            client.wait_for_progress(50)
            first = client.usage().since(before)
            client.server.stop(signal.SIGKILL)
            sent = {part: part.stat().st_ino for part in parts_in(bucket)}
            client.server.start()
            started, before = time.perf_counter(), client.usage()
            _wait_for_new_part(bucket, len(sent))
            waited = time.perf_counter() - started
            client.wait_until_complete()
            second = client.usage().since(before)
        parts = parts_in(bucket)
        twice = sum(part.stat().st_ino != inode for part, inode in sent.items())
        done = len(sent) / len(parts) * stored_bytes(disk) / GIB
        detail = {"first new part": waited, "sent twice": twice, "GiB done": done}
        cpu = first.cpu + second.cpu
        return Run(observation.wall, cpu, foreign=observation.foreign(cpu), size=total_size(parts), detail=detail)


@dataclass
class _Client:
    """A client with a server and an instance."""

    server: ThraveServer
    key: AccessKey
    instance_id: str
    bundle_id: str = ""

    @classmethod
    @contextmanager
    def connected(cls, folder: Path, disk: Path) -> "Iterator[_Client]":
        """Start a server with an account and an instance that has this disk."""
        keys = Keys.create(folder)
        with ThraveServer.running(folder / "data") as server:
            account, key = server.account("bench", keys.certificate.read_text())
            yield cls(server, key, server.instance(account.account_id, disk).instance_id)

    def bundle(self) -> None:
        """Call BundleInstance."""
        storage = self.server.storage(self.key, _BUCKET, PREFIX)
        response = self.server.client(self.key).bundle_instance(InstanceId=self.instance_id, Storage=storage)
        self.bundle_id = response["BundleTask"]["BundleId"]

    def wait_for_progress(self, percent: int) -> None:
        """Wait until this much of the volume is sealed."""
        for task in self._poll():
            if int(task.get("Progress", "0%").rstrip("%")) >= percent:
                return

    def wait_until_complete(self) -> None:
        """Wait for the end of the task."""
        for _ in self._poll():
            pass

    def usage(self) -> Usage:
        """Read what the server has used."""
        assert self.server.process is not None
        return Usage.of(self.server.process.pid)

    def _poll(self) -> Iterator[dict[str, Any]]:
        """Yield descriptions of the task until it is complete."""
        ec2, deadline = self.server.client(self.key), time.monotonic() + _TASK_TIMEOUT
        while time.monotonic() < deadline:
            (task,) = ec2.describe_bundle_tasks(BundleIds=[self.bundle_id])["BundleTasks"]
            if task["State"] == "failed":
                raise WrongOutputError(f"the task failed: {task['BundleTaskError']}")
            yield task
            if task["State"] == "complete":
                return
            time.sleep(_TASK_INTERVAL)
        raise WrongOutputError(f"the task is not complete after {_TASK_TIMEOUT} seconds")


def _bucket(folder: Path) -> Path:
    return folder / "data" / "buckets" / _BUCKET


def _wait_for_new_part(bucket: Path, parts: int) -> None:
    deadline = time.monotonic() + _TASK_TIMEOUT
    while len(parts_in(bucket)) <= parts:
        if time.monotonic() > deadline:
            raise WrongOutputError("no new part was stored after the restart")
        time.sleep(_PART_INTERVAL)


# Bundles in folders.


def manifest_in(folder: Path) -> Path:
    """Return the manifest of a bundle."""
    return folder / f"{PREFIX}.manifest.xml"


def parts_in(folder: Path) -> list[Path]:
    """Return the parts of a bundle in their order."""
    # Thrave and split both write numbers of one width.
    return sorted(folder.glob(f"{PREFIX}.part.*"))


def total_size(files: Sequence[Path]) -> int:
    """Return the bytes of all files."""
    return sum(file.stat().st_size for file in files)


def check_bundle(bundle: Path, secrets: BundleKey, disk: Path, folder: Path) -> None:
    """Open a bundle with other programs than Thrave, and compare the image with the disk."""
    if stored_bytes(disk) < disk.stat().st_size:
        _check_image(_open(bundle, secrets, folder), disk)
        return
    try:  # without a copy of the image
        run([Step([*_decrypt_pipeline(bundle, secrets, "igzip"), ["tar", "-x", "-O"], ["cmp", "-", disk]])])
    except ProgramFailedError as error:
        raise WrongOutputError(str(error)) from error


def _bundle_command(space: Workspace, disk: Disk, folder: Path, *options: str) -> list[str | Path]:
    keys = space.keys
    return [
        *_THRAVE, "bundle", space.path(disk), "--prefix", PREFIX, "--to", folder, "--account", _ACCOUNT,
        "--user-certificate", keys.certificate, "--service-certificate", keys.certificate,
        "--signing-key", keys.private_key, *options,
    ]  # fmt: skip


def _open_command(space: Workspace, bundle: Path) -> list[str | Path]:
    keys = space.keys
    return [*_THRAVE, "open", manifest_in(bundle), "--key", keys.private_key, "--certificate", keys.certificate]


def _openssl(direction: str, secrets: BundleKey) -> Arguments:
    return ["openssl", "enc", direction, "-aes-128-cbc", "-K", secrets.key.hex(), "-iv", secrets.iv.hex()]


def _decrypt_pipeline(bundle: Path, secrets: BundleKey, inflater: str) -> list[Arguments]:
    return [["cat", *parts_in(bundle)], _openssl("-d", secrets), [inflater, "-d", "-c"]]


def _open(bundle: Path, secrets: BundleKey, folder: Path) -> Path:
    opened = folder / "opened"
    opened.mkdir()
    run([Step([*_decrypt_pipeline(bundle, secrets, "igzip"), ["tar", "-x", "-C", opened]])])
    return _only_file(opened)


def _only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def _check_image(image: Path, disk: Path) -> None:
    if not are_equal(disk, image):
        raise WrongOutputError(f"{image} is not the bundled disk")
