"""Encrypted images: opened with the passphrase in a file, and refused without it."""

import os

import psutil
import pytest

from support.disks.qemu_images import (
    PASSPHRASE,
    converted,
    encrypted,
    encrypted_overlay,
    qemu_img,
    secret_object,
    write_passphrase,
    written_to,
)
from thrave.volumes.errors import VolumeEncryptedError, VolumeError, VolumeInUseError, VolumeUnreadableError
from thrave.volumes.formats import open_volume

pytestmark = pytest.mark.usefixtures("nbd")

BOTH = pytest.mark.parametrize("image_format", ["qcow2", "luks"])


@pytest.fixture
def secret_file(raw):
    return write_passphrase(raw)


def content(image, image_format, secret_file):
    with open_volume(image, image_format, secret_file=secret_file) as volume:
        buffer = bytearray(volume.size)
        volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


def refused(image, image_format, secret_file, error=VolumeEncryptedError):
    """Return the error message of opening the image, which never contains the passphrase."""
    with pytest.raises(VolumeError) as caught, open_volume(image, image_format, secret_file=secret_file):
        pass
    assert type(caught.value) is error
    assert str(image) in str(caught.value)
    assert PASSPHRASE not in str(caught.value)
    return str(caught.value)


@BOTH
def test_open_volume_with_passphrase_reads_the_disk(raw, image_format, secret_file):
    image = encrypted(raw, image_format, secret_file)
    assert b"quick brown fox" in raw.read_bytes()
    assert b"quick brown fox" not in image.read_bytes()
    assert content(image, image_format, secret_file) == raw.read_bytes()


def test_encrypted_qcow2_keeps_its_holes(raw, secret_file):
    image = encrypted(raw, "qcow2", secret_file)
    with open_volume(image, "qcow2", secret_file=secret_file) as volume, open_volume(raw, "raw") as plain:
        assert volume.extents() == plain.extents()


def test_passphrase_is_in_no_command_line(raw, secret_file):
    image = encrypted(raw, "qcow2", secret_file)
    with open_volume(image, "qcow2", secret_file=secret_file):
        (server,) = [one for one in psutil.Process().children() if one.name() == "qemu-nbd"]
        words = " ".join(server.cmdline())
    assert "--object secret" in words
    assert PASSPHRASE not in words
    assert str(raw.parent) not in words


@BOTH
def test_open_volume_without_passphrase_names_the_reason(raw, image_format, secret_file):
    image = encrypted(raw, image_format, secret_file)
    assert "is encrypted: the file that holds its passphrase must be given" in refused(image, image_format, None)


@BOTH
@pytest.mark.parametrize("passphrase", [PASSPHRASE + "\n", "another", PASSPHRASE[:-1]])
def test_open_volume_with_wrong_passphrase_names_the_reason(raw, image_format, secret_file, passphrase):
    image = encrypted(raw, image_format, secret_file)
    secret_file.write_text(passphrase)
    said = refused(image, image_format, secret_file)
    assert f"the passphrase in {secret_file} does not decrypt it. Each byte of the file is used" in said


@pytest.mark.parametrize("what", [b"", b"\xff\xfe"])
def test_open_volume_rejects_invalid_passphrase_file(raw, secret_file, what):
    image = encrypted(raw, "qcow2", secret_file)
    secret_file.write_bytes(what)
    with pytest.raises(VolumeError), open_volume(image, "qcow2", secret_file=secret_file):
        pass


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "No such file"),
        ("folder", "neither a regular file"),
        ("fifo", "neither a regular file"),
        ("device", "neither a regular file"),
    ],
)
def test_open_volume_names_what_is_not_a_passphrase_file(raw, secret_file, kind, words):
    image = encrypted(raw, "qcow2", secret_file)
    secret_file.unlink()
    match kind:
        case "folder":
            secret_file.mkdir()
        case "fifo":
            os.mkfifo(secret_file)
        case "device":
            secret_file.symlink_to("/dev/zero")
    said = refused(image, "qcow2", secret_file)
    assert str(secret_file) in said
    assert words in said


@BOTH
def test_plain_overlay_on_encrypted_image_is_read(raw, image_format, secret_file):
    base = encrypted(raw, image_format, secret_file)
    top = raw.with_name("top.qcow2")
    qemu_img("create", "-f", "qcow2", "-u", "-b", base, "-F", image_format, top, raw.stat().st_size)
    assert content(top, "qcow2", secret_file) == raw.read_bytes()
    with pytest.raises(VolumeEncryptedError, match=str(base)), open_volume(top, "qcow2"):
        pass


@pytest.mark.parametrize("below", ["raw", "qcow2", "luks", "vmdk"])
def test_encrypted_overlay_is_read(raw, below, secret_file):
    base = raw
    if below != "raw":
        base = encrypted(raw, below, secret_file) if below == "qcow2" else converted(raw, below)
    top = encrypted_overlay(base, below, raw.stat().st_size, secret_file)
    assert content(top, "qcow2", secret_file) == raw.read_bytes()


def test_file_name_with_a_comma_is_not_an_option(raw, tmp_path):
    folder = tmp_path / "a,b=c, d"
    folder.mkdir()
    disk = raw.rename(folder / "x,y.raw")
    secret_file = write_passphrase(disk)
    base = encrypted(disk, "luks", secret_file)
    top = encrypted_overlay(base, "luks", disk.stat().st_size, secret_file)
    assert content(top, "qcow2", secret_file) == disk.read_bytes()


def test_encrypted_image_open_in_qemu_is_in_use(raw, secret_file):
    image = encrypted(raw, "qcow2", secret_file)
    options = f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"
    with written_to(options, None, *secret_object(secret_file), "--image-opts"):
        refused(image, "qcow2", secret_file, VolumeInUseError)


def test_open_volume_rejects_truncated_encrypted_image(raw, secret_file):
    image = encrypted(raw, "qcow2", secret_file)
    os.truncate(image, image.stat().st_size // 2)
    refused(image, "qcow2", secret_file, VolumeUnreadableError)


def test_open_volume_rejects_passphrase_for_raw_disk(raw, secret_file):
    assert "the format of a raw disk in LUKS is luks" in refused(raw, "raw", secret_file, VolumeUnreadableError)


def test_unneeded_passphrase_is_not_used(raw, tmp_path):
    assert content(converted(raw, "qcow2"), "qcow2", tmp_path / "nowhere") == raw.read_bytes()
