"""Disk images in QEMU's formats, created and written by QEMU's programs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from support.required_programs import require

PASSPHRASE = "correct horse, battery"  # with characters that have a meaning in QEMU's options

# Options to create and to open an encrypted image.
_CREATE_OPTIONS = {
    "luks": "key-secret=s,iter-time=10",
    "qcow2": "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
}
_OPEN_OPTIONS = {"luks": "key-secret=s", "qcow2": "encrypt.key-secret=s"}
_EMPTY_SIZE = 8 << 20


def qemu_img(*arguments: object) -> str:
    """Run qemu-img, which must succeed; return its output."""
    program = require("qemu-img", package="qemu-utils")
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def qemu_io(image: object, image_format: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run qemu-io; without options it writes to the beginning of the image."""
    program = require("qemu-io", package="qemu-utils")
    argv = [program, "-f", image_format, *(options or ("-c", "write -P 119 0 64k")), str(image)]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


@contextmanager
def written_to(image: object, image_format: str | None, *options: str) -> Iterator[None]:
    """Keep an image open for writing with qemu-io, as a running guest does; with `-r` for reading.

    Without a format `image` is a QEMU option string.
    """
    program = require("qemu-io", package="qemu-utils")
    argv = [program, *options, *(("-f", image_format) if image_format else ()), str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout
            assert process.stdout.read(7) == b"qemu-io"  # the prompt: the image is open
            yield
        finally:
            process.kill()


def converted(raw: Path, image_format: str, *options: str) -> Path:
    """Convert a disk to another format, next to the raw image; luks with the passphrase of `write_passphrase`."""
    image = raw.with_suffix(f".{image_format}")
    if image_format == "luks":
        return encrypted(raw, image_format, write_passphrase(raw))
    qemu_img("convert", "-f", "raw", "-O", image_format, *options, raw, image)
    return image


def encrypted(raw: Path, image_format: str, secret_file: Path) -> Path:
    """Encrypt a disk, next to the raw image."""
    image = _new_encrypted(raw.with_suffix(f".{image_format}"), image_format, raw.stat().st_size)
    target = ("-n", "--target-image-opts", raw, _opened(image, image_format))
    qemu_img("convert", *secret_object(secret_file), "-f", "raw", *target)
    return image


def encrypted_overlay(below: Path, below_format: str, size: int, secret_file: Path) -> Path:
    """Create an empty encrypted image with a backing file."""
    top = _new_encrypted(below.with_name("top.qcow2"), "qcow2", size)
    on = ("-u", "-b", below, "-F", below_format, "--image-opts", _opened(top, "qcow2"))
    qemu_img("rebase", *secret_object(secret_file), *on)
    return top


def _opened(image: Path, image_format: str) -> str:
    escaped = str(image).replace(",", ",,")
    return f"driver={image_format},{_OPEN_OPTIONS[image_format]},file.filename={escaped}"


def _new_encrypted(image: Path, image_format: str, size: int) -> Path:
    image.write_bytes(_empty_encrypted(image_format))
    if image_format == "luks":  # the content is everything after the header
        os.truncate(image, image.stat().st_size + size)
    else:
        assert size == _EMPTY_SIZE
    return image


@cache
def _empty_encrypted(image_format: str) -> bytes:
    """An empty encrypted image; of luks only the header. Cached: QEMU measures the processor for seconds."""
    with TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        secret_file = write_passphrase(image)
        arguments = ("-f", image_format, "-o", _CREATE_OPTIONS[image_format], image, _EMPTY_SIZE)
        while True:
            try:
                qemu_img("create", *secret_object(secret_file), *arguments)
            except subprocess.CalledProcessError as error:
                if "accurate CPU usage" not in error.stderr:  # QEMU's error on a busy machine
                    raise
            else:
                break
        content = image.read_bytes()
    return content[:-_EMPTY_SIZE] if image_format == "luks" else content


def write_passphrase(path: Path) -> Path:
    """Write the passphrase to a file in the folder of `path`."""
    secret_file = path.with_name("passphrase")
    secret_file.write_text(PASSPHRASE)
    return secret_file


def passphrase_file_of(image: Path, image_format: str) -> Path | None:
    """The passphrase file of an image that `converted` has created."""
    return image.with_name("passphrase") if image_format == "luks" else None


def secret_object(secret_file: Path) -> tuple[str, str]:
    """QEMU's options for the passphrase, with the id `s`."""
    escaped = str(secret_file).replace(",", ",,")
    return "--object", f"secret,id=s,file={escaped}"
