"""Who is measured: Thrave's own commands, and the programs that do the same without it.

Every bundler does the same work, as ec2-ami-tools 1.5.3 does it: a sparse tar, its SHA-1, gzip, AES-128-CBC, parts of
10 MiB, the SHA-1 of each (Thrave adds SHA-256, signs, and seals its key). Each result is opened with OpenSSL, gzip and
GNU tar and compared with the disk before its time counts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from extents import are_equal
from measure import CORES, Arguments, Run, Step, Usage, observed, run

from thrave.bundle.reading import read_manifest
from thrave.bundle.secrets import BundleSecrets, unlock
from thrave.identity.certificates import load_private_key, new_certificate
from thrave.testing import ThraveServer

PREFIX = "image"
PART_SIZE = 10 << 20
_THRAVE = (sys.executable, "-m", "thrave")
_ACCOUNT = "123456789012"
_RIVALS_SECRETS = BundleSecrets(bytes(range(16)), bytes(range(16, 32)))


class WrongOutputError(Exception):
    """A contender's result is not the disk."""


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: as the table shows it.
        data: bytes of data that it works on.
        run: does the work in an empty folder on tmpfs, and says what it cost.
        check: looks at what is in the folder then; raises WrongOutputError.
    """

    name: str
    data: int
    run: Callable[[Path], Run]
    check: Callable[[Path], None]


@dataclass(frozen=True)
class Keys:
    """A certificate and its key, as files."""

    certificate: Path
    private_key: Path

    @classmethod
    def made_in(cls, folder: Path) -> "Keys":
        """New ones."""
        keys = cls(folder / "cert.pem", folder / "pk.pem")
        for path, pem in zip((keys.certificate, keys.private_key), new_certificate("bench"), strict=True):
            path.write_text(pem)
        return keys

    def secrets(self, manifest: Path) -> BundleSecrets:
        """A bundle's key and IV, as its manifest has them."""
        said = read_manifest(manifest.read_bytes())
        return unlock((said.user_slot, said.ec2_slot), load_private_key(self.private_key.read_bytes()))


def thrave_bundle(disk: Path, keys: Keys, folder: Path, *options: str) -> list[str | Path]:
    """`thrave bundle`."""
    return [
        *_THRAVE, "bundle", disk, "--prefix", PREFIX, "--to", folder, "--account", _ACCOUNT,
        "--user-certificate", keys.certificate, "--service-certificate", keys.certificate,
        "--signing-key", keys.private_key, *options,
    ]  # fmt: skip


def thrave_sealing(
    name: str, disk: Path, data: int, keys: Keys, *options: str, before: Sequence[str] = (), exact: bool = True
) -> Contender:
    """`thrave bundle` of a disk; `before` stands before the command, `exact` says whether all bytes come back."""

    def seal(folder: Path) -> Run:
        done = run([Step([[*before, *thrave_bundle(disk, keys, folder, *options)]])])
        return replace(done, size=_size(_parts(folder)))

    def check(folder: Path) -> None:
        if exact:
            _compare(_parts(folder), keys.secrets(folder / f"{PREFIX}.manifest.xml"), disk, folder)

    return Contender(name, data, seal, check)


def shell_sealing(name: str, disk: Path, data: int, *compressor: str) -> Contender:
    """The pipeline that ec2-ami-tools runs, with any compressor."""
    encrypted, fifo = "image.enc", "fifo"

    def steps(folder: Path) -> Iterator[Step]:
        os.mkfifo(folder / fifo)
        tar: Arguments = ["tar", "-c", "-h", "-S", "--owner", "0", "--group", "0", "-C", disk.parent, disk.name]
        pipeline: list[Arguments] = [tar, ["tee", folder / fifo], compressor, _openssl("-e", _RIVALS_SECRETS)]
        yield Step(pipeline, folder / encrypted, [["openssl", "sha1", folder / fifo]])
        parts: Arguments = [folder / encrypted, folder / f"{PREFIX}.part."]
        yield Step([["split", "-b", str(PART_SIZE), "-d", "-a", "4", *parts]])
        yield Step([["openssl", "sha1", *_parts(folder)]])

    def seal(folder: Path) -> Run:
        done = run(steps(folder))
        staged = (folder / encrypted).stat().st_size
        (folder / encrypted).unlink()
        return replace(done, staged=staged, size=_size(_parts(folder)))

    def check(folder: Path) -> None:
        _compare(_parts(folder), _RIVALS_SECRETS, disk, folder)

    return Contender(name, data, seal, check)


def component_limit(name: str, disk: Path, data: int) -> Contender:
    """What the machine could do if the libraries alone worked, on every core, and nobody waited for anybody."""

    def measure(folder: Path) -> Run:
        answer = folder / "answer.json"
        done = run([Step([[sys.executable, Path(__file__).with_name("limit.py"), disk, folder]], answer)])
        seconds: dict[str, float] = json.loads(answer.read_text())
        total = sum(seconds.values())
        return replace(done, wall=total / CORES, cpu=total, detail=seconds)

    return Contender(name, data, measure, lambda _: None)


def thrave_opening(name: str, bundle: Path, disk: Path, data: int, keys: Keys) -> Contender:
    """`thrave open` with every check."""

    def open_(folder: Path) -> Run:
        manifest, trust = bundle / f"{PREFIX}.manifest.xml", ("--certificate", keys.certificate)
        return run([Step([[*_THRAVE, "open", manifest, "--key", keys.private_key, *trust, "-o", folder / disk.name]])])

    return Contender(name, data, open_, lambda folder: _same(folder / disk.name, disk))


def shell_opening(name: str, bundle: Path, disk: Path, data: int, keys: Keys) -> Contender:
    """The openers' pipeline, with no check at all."""
    secrets = keys.secrets(bundle / f"{PREFIX}.manifest.xml")

    def open_(folder: Path) -> Run:
        return run([Step([*_deciphering(_parts(bundle), secrets), ["tar", "-x", "-C", folder]])])

    return Contender(name, data, open_, lambda folder: _same(_only_file(folder), disk))


def thrave_serving(name: str, disk: Path, data: int) -> Contender:
    """A task from BundleInstance to `complete`, through a real server and an unmodified boto3 client."""

    def bundle(folder: Path) -> Run:
        keys = Keys.made_in(folder)
        with ThraveServer.running(folder / "data") as server:
            account, key = server.account("bench", keys.certificate.read_text())
            instance = server.instance(account.account_id, disk)
            ec2, storage = server.client(key), server.storage(key, "bench", PREFIX)
            assert server.process is not None
            with observed() as seen:
                seen.roots.append(server.process.pid)
                before = Usage.of(server.process.pid)
                task = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=storage)["BundleTask"]
                while task["State"] not in {"complete", "failed"}:
                    time.sleep(0.05)
                    (task,) = ec2.describe_bundle_tasks(BundleIds=[task["BundleId"]])["BundleTasks"]
            used = Usage.of(server.process.pid).since(before)
        if task["State"] != "complete":
            raise WrongOutputError(f"the task failed: {task}")
        size = _size(_parts(_bucket(folder)))
        return Run(seen.wall, used.cpu, seen.memory, used.written, foreign=seen.foreign(used.cpu), size=size)

    def check(folder: Path) -> None:
        bucket = _bucket(folder)
        secrets = Keys(folder / "cert.pem", folder / "pk.pem").secrets(bucket / f"{PREFIX}.manifest.xml")
        _compare(_parts(bucket), secrets, disk, folder)

    return Contender(name, data, bundle, check)


def _bucket(folder: Path) -> Path:
    return folder / "data" / "buckets" / "bench"


def _openssl(direction: str, secrets: BundleSecrets) -> Arguments:
    return ["openssl", "enc", direction, "-aes-128-cbc", "-K", secrets.key.hex(), "-iv", secrets.iv.hex()]


def _deciphering(parts: Sequence[Path], secrets: BundleSecrets) -> list[Arguments]:
    return [["cat", *parts], _openssl("-d", secrets), ["gzip", "-d"]]


def _parts(folder: Path) -> list[Path]:
    # Both Thrave's and split's numbers have one width.
    return sorted(folder.glob(f"{PREFIX}.part.*"))


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _compare(parts: Sequence[Path], secrets: BundleSecrets, disk: Path, folder: Path) -> None:
    """Open parts with other programs than Thrave and compare the image with the disk."""
    opened = folder / "opened"
    opened.mkdir()
    run([Step([*_deciphering(parts, secrets), ["tar", "-x", "-C", opened]])])
    _same(_only_file(opened), disk)


def _only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def _same(image: Path, disk: Path) -> None:
    if not are_equal(image, disk):
        raise WrongOutputError(f"{image} is not {disk}")
