"""Image locks of Thrave and of QEMU: which opens they refuse, and when they end."""

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import sys
from contextlib import contextmanager

import pytest

from support.disks.qemu_images import converted, qemu_img, qemu_io, written_to
from thrave.volumes import image_locks
from thrave.volumes.errors import VolumeInUseError, VolumeUnreadableError
from thrave.volumes.formats import open_volume
from thrave.volumes.host_files import HostFile
from thrave.volumes.image_locks import ImageLocks

pytestmark = pytest.mark.usefixtures("nbd")

FORMATS = pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vpc", "vhdx"])
BASES = pytest.mark.parametrize("image_format", ["raw", "qcow2"])
REFUSED = 'Failed to get "write" lock'


def image_of(raw, image_format):
    return raw if image_format == "raw" else converted(raw, image_format)


def overlay_on(image, image_format):
    overlay = image.with_name("overlay.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", image, "-F", image_format, overlay)
    return overlay


def commit(overlay):
    return subprocess.run(["qemu-img", "commit", "-f", "qcow2", overlay], check=False, capture_output=True, text=True)


def refused(image, image_format):
    """Return the error of opening the image."""
    with pytest.raises(VolumeInUseError) as caught, open_volume(image, image_format):
        pass
    return str(caught.value)


@FORMATS
def test_image_lock_refuses_image_that_qemu_writes(raw, image_format):
    image = image_of(raw, image_format)
    with written_to(image, image_format):
        assert refused(image, image_format) == (
            f"{image} is in use by another program: stop the machine that runs on it first"
        )
    with open_volume(image, image_format) as volume:
        assert volume.extents()


@FORMATS
def test_image_lock_prevents_writes_by_qemu(raw, image_format):
    image = image_of(raw, image_format)
    with open_volume(image, image_format):
        before = image.read_bytes()
        write = qemu_io(image, image_format)
        assert write.returncode != 0
        assert REFUSED in write.stderr
        assert image.read_bytes() == before
    assert qemu_io(image, image_format).returncode == 0


@FORMATS
def test_image_lock_allows_other_readers(raw, image_format):
    image = image_of(raw, image_format)
    with written_to(image, image_format, "-r"), open_volume(image, image_format), open_volume(image, image_format):
        assert str(image) in qemu_img("info", "-f", image_format, image)
        assert qemu_io(image, image_format, "-r", "-c", "read 0 64k").returncode == 0


@BASES
def test_image_lock_allows_guest_on_overlay_but_no_merge(raw, image_format):
    base = image_of(raw, image_format)
    overlay = overlay_on(base, image_format)
    with written_to(overlay, "qcow2"), open_volume(base, image_format):  # started before
        pass
    with open_volume(base, image_format) as volume:
        before = base.read_bytes()
        with written_to(overlay, "qcow2"):  # started while the volume is open
            volume.read_into(0, memoryview(bytearray(4096)))
        assert qemu_io(overlay, "qcow2").returncode == 0
        merge = commit(overlay)
        assert merge.returncode != 0
        assert "lock" in merge.stderr
        assert base.read_bytes() == before
    assert commit(overlay).returncode == 0
    assert base.read_bytes() != before


@BASES
def test_image_lock_covers_every_image_of_a_chain(raw, image_format):
    base = image_of(raw, image_format)
    overlay = overlay_on(base, image_format)
    with written_to(base, image_format):
        assert str(base) in refused(overlay, "qcow2")
    with open_volume(overlay, "qcow2"):
        for image, its_format in ((base, image_format), (overlay, "qcow2")):
            assert REFUSED in qemu_io(image, its_format).stderr


def test_image_lock_covers_extent_files_of_a_vmdk(raw):
    image = converted(raw, "vmdk", "-o", "subformat=monolithicFlat")
    flat = image.with_name("disk-flat.vmdk")
    with written_to(flat, "raw"):
        assert str(flat) in refused(image, "vmdk")
    with open_volume(image, "vmdk"):
        assert REFUSED in qemu_io(flat, "raw").stderr


@contextmanager
def killed_reader(image):
    """Run a process with the raw image open; kill it at the end of the block."""
    code = (
        "import sys, time; from pathlib import Path; from thrave.volumes.formats import open_volume\n"
        "with open_volume(Path(sys.argv[1]), 'raw'): print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, image], stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout.readline() == b"open\n"
            yield
        finally:
            reader.kill()


def test_image_lock_ends_with_its_process(raw):
    with killed_reader(raw):
        assert REFUSED in qemu_io(raw, "raw").stderr
    assert qemu_io(raw, "raw").returncode == 0


def test_release_ends_locks_although_a_child_inherited_the_file(raw):
    """A program inherits all descriptors until it is executed."""
    locks = ImageLocks()
    locks.lock(HostFile(raw))
    for fd in [locked.fd for locked in locks._files]:
        fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        assert REFUSED in qemu_io(raw, "raw").stderr
        locks.release()
        assert qemu_io(raw, "raw").returncode == 0


def test_refused_image_leaves_no_lock(raw):
    with written_to(raw, "raw"):
        before = locked_bytes(raw)
        assert 101 in before
        assert refused(raw, "raw")
        assert locked_bytes(raw) == before


def locked_bytes(image):
    """Return the bytes on which any process has a lock."""
    with image.open("rb") as file:
        return {byte for byte in range(512) if image_locks._is_locked(file.fileno(), byte)}


def test_image_locks_equal_those_of_a_reading_qemu(raw):
    with open_volume(raw, "raw"):
        assert locked_bytes(raw) == {100, 201, 203}
    assert locked_bytes(raw) == set()


def lock(file, kind, byte=0, length=0):
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, length, 0))


@pytest.mark.parametrize("byte", [101, 103, 200])
def test_image_lock_refuses_image_open_for_writing(raw, byte):
    with raw.open("rb") as file:
        lock(file, fcntl.F_RDLCK, byte, 1)
        assert refused(raw, "raw")
        lock(file, fcntl.F_UNLCK)
        lock(file, fcntl.F_RDLCK, 0, 100)
        with open_volume(raw, "raw"):
            pass


def test_image_lock_refuses_image_locked_as_a_whole(raw):
    with raw.open("r+b") as file:
        lock(file, fcntl.F_WRLCK)
        assert refused(raw, "raw")


class Flock(ctypes.Structure):
    """struct flock of fcntl(2), with off_t of 64 bits."""

    _fields_ = (
        ("type", ctypes.c_short),
        ("whence", ctypes.c_short),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("process", ctypes.c_int),
    )


def test_lock_structure_matches_the_kernel():
    packed = image_locks._FLOCK.pack(1, 2, 3, 4, 5)
    assert len(packed) == ctypes.sizeof(Flock)
    flock = Flock.from_buffer_copy(packed)
    assert [getattr(flock, name) for name, _ in Flock._fields_] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_open_volume_reads_on_file_system_without_locks(raw, monkeypatch, error):
    """The errors of such a file system are simulated."""
    monkeypatch.setattr(image_locks, "fcntl", FcntlWithoutLocks(error))
    with open_volume(raw, "raw") as volume:
        assert volume.size == raw.stat().st_size


def test_image_lock_raises_other_lock_errors(raw, monkeypatch):
    monkeypatch.setattr(image_locks, "fcntl", FcntlWithoutLocks(errno.EIO))
    with pytest.raises(VolumeUnreadableError, match="cannot be locked: Input/output error"), open_volume(raw, "raw"):
        pass


class FcntlWithoutLocks:
    """The module fcntl on a file system without locks."""

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        return getattr(fcntl, name)

    def fcntl(self, *_):
        raise OSError(self._error, os.strerror(self._error))


@pytest.mark.parametrize("kind", ["folder", "fifo", "character device", "nothing"])
def test_open_volume_rejects_other_file_types_at_once(tmp_path, kind):
    path = tmp_path / "thing"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "character device":
            path.symlink_to("/dev/zero")
    locks = ImageLocks()
    with pytest.raises(VolumeUnreadableError, match="thing"):
        locks.lock(HostFile(path))


def test_release_may_be_repeated(raw):
    locks = ImageLocks()
    locks.lock(HostFile(raw))
    locks.release()
    locks.release()
