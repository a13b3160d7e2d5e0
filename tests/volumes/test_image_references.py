"""Files that an image refers to: which are accepted, and that the checked files are the ones that are read."""

import os
import shutil
import subprocess
import sys

import pytest

from support.disks.block_devices import loop_device
from support.disks.qemu_images import converted, qemu_img
from thrave.volumes import image_chain
from thrave.volumes.errors import VolumeChangedError, VolumeUnreadableError
from thrave.volumes.formats import open_volume, read_metadata

pytestmark = pytest.mark.usefixtures("nbd")

SECRET = b"HOST-SECRET-"


@pytest.fixture
def host(raw, tmp_path):
    """Two folders: the image's own, and another one of the host with a secret."""
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    own.mkdir()
    elsewhere.mkdir()
    raw.rename(own / "base.raw")
    size = (own / "base.raw").stat().st_size
    (elsewhere / "secret.raw").write_bytes(SECRET * (size // len(SECRET)) + bytes(size % len(SECRET)))
    converted(elsewhere / "secret.raw", "vmdk")
    return tmp_path


def content(image, image_format, **options):
    with open_volume(image, image_format, **options) as volume:
        buffer = bytearray(volume.size)
        volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


# Ways to name a file in another folder, from the folder `own`.
NAMES = {
    "absolute": lambda host, name: str(host / "elsewhere" / name),
    "dots": lambda _host, name: f"../elsewhere/{name}",
    "link": lambda host, name: linked(host / "own" / f"link-{name}", host / "elsewhere" / name),
    "link of a link": lambda host, name: linked(
        host / "own" / f"second-{name}",
        host / "own" / linked(host / "own" / f"first-{name}", host / "elsewhere" / name),
    ),
    "linked folder": lambda host, name: linked(host / "own" / "folder", host / "elsewhere") + f"/{name}",
    "folder below": lambda host, name: copied(host / "own" / "below", host / "elsewhere" / name) + f"/{name}",
}


def linked(link, target):
    link.symlink_to(target)
    return link.name


def copied(folder, file):
    folder.mkdir()
    shutil.copy(file, folder)
    return folder.name


def backing(host, name):
    qemu_img("create", "-f", "qcow2", "-u", "-b", name("secret.raw"), "-F", "raw", host / "own" / "top.qcow2", "8M")
    return "qcow2"


def second_backing(host, name):
    backing(host, name)
    (host / "own" / "top.qcow2").rename(host / "own" / "middle.qcow2")
    qemu_img("create", "-f", "qcow2", "-u", "-b", "middle.qcow2", "-F", "qcow2", host / "own" / "top.qcow2", "8M")
    return "qcow2"


def parent(host, name):
    child = host / "own" / "child.vmdk"
    qemu_img("create", "-f", "vmdk", "-b", host / "elsewhere" / "secret.vmdk", "-F", "vmdk", child)
    text = child.read_bytes()
    old, new = str(host / "elsewhere" / "secret.vmdk").encode(), name("secret.vmdk").encode()
    child.write_bytes(text.replace(old + b'"', (new + b'"').ljust(len(old) + 1, b"\n"), 1))
    return "vmdk"


def extent(host, name):
    described(host / "own" / "flat.vmdk", name("secret.raw"))
    return "vmdk"


def described(path, name):
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 16384 FLAT "{name}" 0\n'
    )
    return path


REFERENCES = {"backing": backing, "second backing": second_backing, "parent": parent, "extent": extent}
TOP = {"backing": "top.qcow2", "second backing": "top.qcow2", "parent": "child.vmdk", "extent": "flat.vmdk"}


@pytest.mark.parametrize("name_kind", NAMES)
@pytest.mark.parametrize("reference", REFERENCES)
def test_file_elsewhere_is_read_only_from_image_directories(host, reference, name_kind):
    image_format = REFERENCES[reference](host, lambda name: NAMES[name_kind](host, name))
    image = host / "own" / TOP[reference]
    with pytest.raises(VolumeUnreadableError, match="neither the image's own folder nor") as caught:
        content(image, image_format)
    assert str(host) not in caught.value.public
    directory = host / ("own" if name_kind == "folder below" else "elsewhere")
    assert SECRET in content(image, image_format, directories=(directory,))


@pytest.mark.parametrize("name", ["file:base.raw", "nbd:127.0.0.1:9", "fat:/etc", 'json:{"driver":"null-co"}', "a:b/c"])
def test_open_volume_rejects_protocol_as_file(host, name):
    top = host / "own" / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-u", "-b", name, "-F", "raw", top, "8M")
    with pytest.raises(VolumeUnreadableError, match="not a local file"):
        content(top, "qcow2")
    described(host / "own" / "flat.vmdk", name.replace('"', ""))
    with pytest.raises(VolumeUnreadableError, match="not a local file"):
        content(host / "own" / "flat.vmdk", "vmdk")


def test_error_replaces_control_characters_of_an_image(host):
    top = host / "own" / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-u", "-b", "nbd://x/\033]0;owned\a\u202e", "-F", "raw", top, "1M")
    with pytest.raises(VolumeUnreadableError) as caught:
        content(top, "qcow2")
    assert str(caught.value).isprintable()
    assert caught.value.public.isprintable()


def test_image_named_by_a_link_has_its_real_folder(host):
    top = host / "own" / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", host / "own" / "base.raw", "-F", "raw", top)
    link = host / "elsewhere" / "link.qcow2"
    link.symlink_to(top)
    assert content(link, "qcow2") == (host / "own" / "base.raw").read_bytes()


def test_open_volume_rejects_reference_to_a_named_pipe(host):
    top = host / "own" / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-u", "-b", "pipe", "-F", "raw", top, "1M")
    os.mkfifo(host / "own" / "pipe")
    with pytest.raises(VolumeUnreadableError, match="neither a regular file nor a block device"):
        content(top, "qcow2")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make block devices")
def test_image_on_a_device_cannot_refer_to_other_devices(host):
    """The folder of the image would be /dev."""
    top = host / "own" / "top.qcow2"
    with loop_device(host / "elsewhere" / "secret.raw") as other:
        qemu_img("create", "-f", "qcow2", "-u", "-b", other, "-F", "raw", top, "8M")
        with loop_device(top) as device, pytest.raises(VolumeUnreadableError, match="neither the image's own folder"):
            content(device, "qcow2")


@pytest.fixture(params=["qcow2", "vmdk", "flat"])
def chain(request, host):
    """An image with its backing images in one folder: path, format, and all files."""
    own = host / "own"
    base = own / "base.raw"
    if request.param == "flat":
        return described(own / "flat.vmdk", "base.raw"), "vmdk", [own / "flat.vmdk", base]
    if request.param == "vmdk":
        below, top = converted(base, "vmdk"), own / "top.vmdk"
        qemu_img("create", "-f", "vmdk", "-b", below, "-F", "vmdk", top)
        return top, "vmdk", [top, below]
    middle, top = own / "middle.qcow2", own / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", middle)
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    return top, "qcow2", [top, middle, base]


@pytest.mark.parametrize("which", [0, -1], ids=["topmost", "lowest"])
def test_file_replaced_after_its_check_is_not_read(host, chain, monkeypatch, which):
    image, image_format, files = chain
    content_before = (host / "own" / "base.raw").read_bytes()
    check_images = image_chain.ImageChain.check_images

    def replace_and_check(self, secret_file):
        files[which].rename(host / "moved")
        files[which].symlink_to(host / "elsewhere" / "secret.raw")
        return check_images(self, secret_file)

    monkeypatch.setattr(image_chain.ImageChain, "check_images", replace_and_check)
    read = bytearray(len(content_before))
    with (
        pytest.raises(VolumeChangedError, match=files[which].name),
        open_volume(image, image_format) as volume,
    ):
        volume.read_into(0, memoryview(read))
    assert bytes(read) == content_before


def overwritten(file):
    with file.open("r+b") as disk:
        disk.seek(file.stat().st_size // 2)
        disk.write(b"WRITTEN MEANWHILE")


def mtime_set_back(file):
    before = file.stat()
    overwritten(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_link(file, other):
    shutil.copy(file, other)
    file.unlink()
    file.symlink_to(other)


CHANGES = {
    "written": lambda file, _other: overwritten(file),
    "mtime set back": lambda file, _other: mtime_set_back(file),
    "longer": lambda file, _other: os.truncate(file, file.stat().st_size + 512),
    "removed": lambda file, _other: file.unlink(),
    "renamed over": lambda file, other: shutil.copy(file, other).rename(file),
    "another file by a link": replaced_by_link,
}


def read_while(change, image, image_format):
    """Read the first bytes of the volume, then change it."""
    with open_volume(image, image_format) as volume:
        volume.read_into(0, memoryview(bytearray(4096)))
        change()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, -1], ids=["topmost", "lowest"])
def test_change_of_a_file_while_it_is_read_is_detected(host, chain, which, change):
    image, image_format, files = chain
    with pytest.raises(VolumeChangedError, match=files[which].name) as caught:
        read_while(lambda: CHANGES[change](files[which], host / "own" / "other"), image, image_format)
    assert str(host) not in caught.value.public


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_raw_volume_while_it_is_read_is_detected(host, change):
    disk = host / "own" / "base.raw"
    with pytest.raises(VolumeChangedError, match=r"base\.raw"):
        read_while(lambda: CHANGES[change](disk, host / "own" / "other"), disk, "raw")


def test_change_does_not_hide_an_error_of_the_caller(host):
    disk = host / "own" / "base.raw"

    def fail():
        overwritten(disk)
        raise KeyError

    with pytest.raises(KeyError):
        read_while(fail, disk, "raw")


def test_read_is_not_detected_as_change(host, chain):
    image, image_format, _ = chain
    for _ in range(2):
        assert content(image, image_format) == (host / "own" / "base.raw").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make block devices")
def test_write_to_a_device_while_it_is_read_is_detected(host):
    with loop_device(host / "own" / "base.raw") as device:
        content(device, "raw")
        with pytest.raises(VolumeChangedError, match=device.name):
            read_while(lambda: written_through(device), device, "raw")


def written_through(device):
    disk = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(disk, b"x" * 4096, 4096)
        os.fsync(disk)
    finally:
        os.close(disk)


def test_volume_reports_its_files_and_those_written_to(chain):
    image, image_format, files = chain
    metadata = read_metadata(image, image_format)
    numbers = {(file.stat().st_dev, file.stat().st_ino) for file in files}
    assert {tuple(one) for one in metadata.files} == numbers
    written = files if image.name == "flat.vmdk" else files[:1]
    assert {tuple(one) for one in metadata.written} == {(file.stat().st_dev, file.stat().st_ino) for file in written}


def test_files_with_lowest_descriptors_are_passed_to_the_server(host, chain):
    """In a new process the first opened file has descriptor 3, which qemu-nbd uses for its socket."""
    image, image_format, _ = chain
    code = (
        "import sys; from pathlib import Path; from thrave.volumes.formats import open_volume\n"
        "with open_volume(Path(sys.argv[1]), sys.argv[2]) as volume:\n"
        "    buffer = bytearray(volume.size); volume.read_into(0, memoryview(buffer)); sys.stdout.buffer.write(buffer)"
    )
    read = subprocess.run([sys.executable, "-c", code, image, image_format], capture_output=True, check=True).stdout
    assert read == (host / "own" / "base.raw").read_bytes()
