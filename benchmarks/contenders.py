"""Who is measured: Thrave's own commands, and the programs that do the same without it.

Every bundler does the same work, as ec2-ami-tools 1.5.3 does it: a sparse tar, its SHA-1, gzip, AES-128-CBC, parts of
10 MiB, the SHA-1 of each (Thrave adds SHA-256, signs, and seals its key). Each result is opened with OpenSSL, igzip and
GNU tar and compared with the disk before its time counts.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from extents import are_equal, stored_bytes
from measure import CORES, Arguments, ProgramFailedError, Run, Step, run

from thrave.bundle.reading import read_manifest
from thrave.bundle.secrets import BundleSecrets, unlock
from thrave.identity.certificates import load_private_key, new_certificate

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
    name: str,
    disk: Path,
    data: int,
    keys: Keys,
    *options: str,
    before: Sequence[str] = (),
    is_same: Callable[[Path], bool] | None = None,
) -> Contender:
    """`thrave bundle` of a disk.

    Args:
        name: the contender's.
        disk: what is sealed.
        data: bytes of data on it.
        keys: whose bundle it is.
        options: of the command.
        before: what stands before the command.
        is_same: whether the opened image is right; unless given, it has to be the disk.
    """

    def seal(folder: Path) -> Run:
        done = run([Step([[*before, *thrave_bundle(disk, keys, folder, *options)]])])
        return replace(done, size=total_size(parts_in(folder)))

    def check(folder: Path) -> None:
        secrets = keys.secrets(folder / f"{PREFIX}.manifest.xml")
        if is_same is None:
            check_bundle(parts_in(folder), secrets, disk, folder)
        else:
            _check(_opened(parts_in(folder), secrets, folder), is_same)

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
        yield Step([["openssl", "sha1", *parts_in(folder)]])

    def seal(folder: Path) -> Run:
        done = run(steps(folder))
        staged = (folder / encrypted).stat().st_size
        (folder / encrypted).unlink()
        return replace(done, staged=staged, size=total_size(parts_in(folder)))

    def check(folder: Path) -> None:
        check_bundle(parts_in(folder), _RIVALS_SECRETS, disk, folder)

    return Contender(name, data, seal, check)


def components(name: str, what: str, disk: Path, data: int, cores: int = CORES) -> Contender:
    """What the machine could do if the libraries alone worked, on so many cores, and nobody waited for anybody.

    Args:
        name: the contender's.
        what: the work, one of `limit.WORK`.
        disk: what it is done to.
        data: bytes of data on it.
        cores: that it can use.
    """

    def measure(folder: Path) -> Run:
        answer = folder / "answer.json"
        done = run([Step([[sys.executable, Path(__file__).with_name("limit.py"), what, disk, folder]], answer)])
        seconds: dict[str, float] = json.loads(answer.read_text())
        total = sum(seconds.values())
        return replace(done, wall=total / cores, cpu=total, detail=seconds)

    return Contender(name, data, measure, lambda _: None)


def thrave_opening(name: str, bundle: Path, disk: Path, data: int, keys: Keys) -> Contender:
    """`thrave open` with every check."""

    def open_(folder: Path) -> Run:
        manifest, trust = bundle / f"{PREFIX}.manifest.xml", ("--certificate", keys.certificate)
        return run([Step([[*_THRAVE, "open", manifest, "--key", keys.private_key, *trust, "-o", folder / disk.name]])])

    return Contender(name, data, open_, lambda folder: _check(folder / disk.name, partial(are_equal, disk)))


def thrave_both_ways(name: str, disk: Path, data: int, keys: Keys) -> Contender:
    """`thrave bundle`, and in the details the memory of `thrave open --stdout` of what it made, compared with the disk.

    For disks that leave no room for a copy. What `cmp` needs beside it is counted, too: two MiB.
    """

    def both(folder: Path) -> Run:
        bundle = folder / "bundle"
        sealed = run([Step([thrave_bundle(disk, keys, bundle)])])
        manifest, trust = bundle / f"{PREFIX}.manifest.xml", ("--certificate", keys.certificate)
        opening: Arguments = [*_THRAVE, "open", manifest, "--key", keys.private_key, *trust, "--stdout"]
        opened = run([Step([opening, ["cmp", "-", disk]])])
        return replace(sealed, size=total_size(parts_in(bundle)), detail={"memory to open": opened.memory})

    return Contender(name, data, both, lambda _: None)


def shell_opening(name: str, bundle: Path, disk: Path, data: int, keys: Keys) -> Contender:
    """The openers' pipeline, with no check at all."""
    secrets = keys.secrets(bundle / f"{PREFIX}.manifest.xml")

    def open_(folder: Path) -> Run:
        return run([Step([*_deciphering(parts_in(bundle), secrets, "gzip"), ["tar", "-x", "-C", folder]])])

    return Contender(name, data, open_, lambda folder: _check(_only_file(folder), partial(are_equal, disk)))


def _openssl(direction: str, secrets: BundleSecrets) -> Arguments:
    return ["openssl", "enc", direction, "-aes-128-cbc", "-K", secrets.key.hex(), "-iv", secrets.iv.hex()]


def _deciphering(parts: Sequence[Path], secrets: BundleSecrets, inflater: str) -> list[Arguments]:
    return [["cat", *parts], _openssl("-d", secrets), [inflater, "-d", "-c"]]


def parts_in(folder: Path) -> list[Path]:
    # Both Thrave's and split's numbers have one width.
    return sorted(folder.glob(f"{PREFIX}.part.*"))


def total_size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def check_bundle(parts: Sequence[Path], secrets: BundleSecrets, disk: Path, folder: Path) -> None:
    """Open a bundle with other programs than Thrave, and compare the image with the disk."""
    if stored_bytes(disk) < disk.stat().st_size:
        _check(_opened(parts, secrets, folder), partial(are_equal, disk))
        return
    try:  # without a copy of it
        run([Step([*_deciphering(parts, secrets, "igzip"), ["tar", "-x", "-O"], ["cmp", "-", disk]])])
    except ProgramFailedError as error:
        raise WrongOutputError(str(error)) from error


def _opened(parts: Sequence[Path], secrets: BundleSecrets, folder: Path) -> Path:
    opened = folder / "opened"
    opened.mkdir()
    run([Step([*_deciphering(parts, secrets, "igzip"), ["tar", "-x", "-C", opened]])])
    return _only_file(opened)


def _only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def _check(image: Path, is_same: Callable[[Path], bool]) -> None:
    if not is_same(image):
        raise WrongOutputError(f"{image} is not what was sealed")
