"""Disk images in QEMU's formats, made and written by QEMU's own programs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from support.required_programs import require

PASSPHRASE = "correct horse, battery"  # with what QEMU's options would take for their own

# Of each format what makes an encrypted image, and what opens it.
_MADE_WITH = {
    "luks": "key-secret=s,iter-time=10",
    "qcow2": "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
}
_OPENED_WITH = {"luks": "key-secret=s", "qcow2": "encrypt.key-secret=s"}
_EMPTY_SIZE = 8 << 20


def qemu_img(*words: object) -> str:
    """Run qemu-img, which must succeed; give what it printed."""
    program = require("qemu-img", package="qemu-utils")
    return subprocess.run([program, *map(str, words)], check=True, capture_output=True, text=True).stdout


def qemu_io(image: object, image_format: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What qemu-io says; without options it writes something at the image's beginning."""
    program = require("qemu-io", package="qemu-utils")
    argv = [program, "-f", image_format, *(options or ("-c", "write -P 119 0 64k")), str(image)]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


@contextmanager
def written_to(image: object, image_format: str | None, *options: str) -> Iterator[None]:
    """Have qemu-io keep an image open for writing, as a running guest does; with `-r` for reading.

    Without a format the image is one of QEMU's option strings.
    """
    program = require("qemu-io", package="qemu-utils")
    argv = [program, *options, *(("-f", image_format) if image_format else ()), str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout
            assert process.stdout.read(7) == b"qemu-io"  # its prompt: the image is open
            yield
        finally:
            process.kill()


def converted(raw: Path, image_format: str, *options: str) -> Path:
    """The same disk in another format, beside the raw image; luks has its passphrase in `passphrase_file_of` it."""
    image = raw.with_suffix(f".{image_format}")
    if image_format == "luks":
        return encrypted(raw, image_format, passphrase_file_of(raw))
    qemu_img("convert", "-f", "raw", "-O", image_format, *options, raw, image)
    return image


def encrypted(raw: Path, image_format: str, secret_file: Path) -> Path:
    """The same disk, encrypted, beside the raw image."""
    image = _new_encrypted(raw.with_suffix(f".{image_format}"), image_format, raw.stat().st_size)
    target = ("-n", "--target-image-opts", raw, _opened(image, image_format))
    qemu_img("convert", *secret_object(secret_file), "-f", "raw", *target)
    return image


def encrypted_overlay(below: Path, below_format: str, size: int, secret_file: Path) -> Path:
    """An empty encrypted image that stands on another."""
    top = _new_encrypted(below.with_name("top.qcow2"), "qcow2", size)
    on = ("-u", "-b", below, "-F", below_format, "--image-opts", _opened(top, "qcow2"))
    qemu_img("rebase", *secret_object(secret_file), *on)
    return top


def _opened(image: Path, image_format: str) -> str:
    escaped = str(image).replace(",", ",,")
    return f"driver={image_format},{_OPENED_WITH[image_format]},file.filename={escaped}"


def _new_encrypted(image: Path, image_format: str, size: int) -> Path:
    image.write_bytes(_empty_encrypted(image_format))
    if image_format == "luks":  # its content is all that follows the header
        os.truncate(image, image.stat().st_size + size)
    else:
        assert size == _EMPTY_SIZE
    return image


@cache
def _empty_encrypted(image_format: str) -> bytes:
    """An empty encrypted image, of luks the header alone. Made once: QEMU measures the processor for seconds."""
    with TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        secret_file = passphrase_file_of(image)
        words = ("-f", image_format, "-o", _MADE_WITH[image_format], image, _EMPTY_SIZE)
        while True:
            try:
                qemu_img("create", *secret_object(secret_file), *words)
            except subprocess.CalledProcessError as error:
                if "accurate CPU usage" not in error.stderr:  # a busy machine's
                    raise
            else:
                break
        content = image.read_bytes()
    return content[:-_EMPTY_SIZE] if image_format == "luks" else content


def passphrase_file_of(path: Path) -> Path:
    """A file with the passphrase."""
    secret_file = path.with_name("passphrase")
    secret_file.write_text(PASSPHRASE)
    return secret_file


def secret_of(image: Path, image_format: str) -> Path | None:
    """What opens a `converted` image."""
    return image.with_name("passphrase") if image_format == "luks" else None


def secret_object(secret_file: Path) -> tuple[str, str]:
    """QEMU's options for the passphrase, which it calls `s`."""
    escaped = str(secret_file).replace(",", ",,")
    return "--object", f"secret,id=s,file={escaped}"
