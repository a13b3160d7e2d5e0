"""A tiny guest for real hypervisors: Debian's kernel, busybox and ntfs-3g around a bootable disk with NTFS on C:.

No Windows can be had for tests. What this has of one is what a bundle is about: an NTFS volume in the first partition
of a disk with an MBR, written to all the time, marked as in use meanwhile, and unmounted when the power button is
pressed or the guest agent asked. What it does stands in `inside_guest/`.

It is made once and kept in `.cache` of the checkout. Packages of Debian's are fetched by apt and unpacked there; none
is installed, and it takes no right to anything.
"""

import fcntl
import hashlib
import lzma
import platform
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from support.disks.ntfs_disk import VOLUME_INFORMATION, Damage, ntfs_tool
from support.required_programs import require, require_file, unavailable
from thrave.demo.disk import PARTITION_OFFSET

MIB = 1 << 20
DISK_SIZE = 192 * MIB
NOISE = 96 * MIB
"""Bytes of C:\\pagefile.sys, which nothing compresses: so many have to be read and stored at least."""

COMMAND_LINE = "console=ttyS0 quiet panic=-1 tsc=reliable"

_CACHE = Path(__file__).parents[3] / ".cache" / "guest"
_KEPT = 2  # recipes
_INSIDE = Path(__file__).with_name("inside_guest")
_KERNEL, _PROGRAMS = "linux-image-cloud-amd64", ("busybox-static", "qemu-guest-agent")
_GRUB = Path("/usr/lib/grub/i386-pc")
_GRUB_MODULES = ("biosdisk", "part_msdos", "ntfs", "linux", "boot")
# In the order in which they have to be loaded.
_MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
    "virtio_console", "evdev", "button", "fuse",
)  # fmt: skip
_ATA_MODULES = ("scsi_common", "scsi_mod", "sd_mod", "libata", "ata_piix")
_FOLDERS = ("bin", "sbin", "proc", "sys", "dev", "mnt", "run", "tmp", "etc/acpi/PWRF", "lib/modules/ata")
_SCRIPTS = {"init": "init", "shutdown": "sbin/shutdown", "mark-volume": "sbin/mark-volume", "sysprep": "bin/sysprep"}
_POWER_BUTTON = "etc/acpi/PWRF/00000080"  # what acpid runs for it


@dataclass(frozen=True)
class GuestImage:
    """What a guest is made of. `disk` is to be copied; it boots by itself as well as with the kernel beside it."""

    kernel: Path
    initramfs: Path
    disk: Path


@cache
def guest_image() -> GuestImage:
    """The guest, made now unless it is there."""
    if platform.machine() != "x86_64":
        pytest.skip("the guest is an amd64 machine")
    _CACHE.mkdir(parents=True, exist_ok=True)
    folder = _CACHE / _recipe()
    with _one_at_a_time():
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=_CACHE, prefix=".new-") as unfinished:
                _make(Path(unfinished)).rename(folder)
            _forget_old_ones()
    return GuestImage(folder / "kernel", folder / "initramfs", folder / "disk.raw")


def volume_flags(disk: Path) -> str:
    """Where the volume's flags stand, as the guest's VOLUME_FLAGS wants it."""
    ntfs = Damage.to(disk)
    places = []
    for record in (ntfs.record(3), ntfs.mirror() + 3 * 1024):
        attribute = ntfs.attribute(record, VOLUME_INFORMATION)
        places.append(attribute + ntfs.number(attribute + 20, "<H") + 10 - PARTITION_OFFSET)
    return ",".join(map(str, places))


def make_volume(volume: Path, size: int) -> None:
    """An empty NTFS volume of that size, which begins at PARTITION_OFFSET of its disk."""
    with volume.open("wb") as file:
        file.truncate(size)
    geometry = ("-s", 512, "-p", PARTITION_OFFSET // 512, "-H", 255, "-S", 63)
    ntfs_tool("mkntfs", "-F", "-Q", "-q", *geometry, "-L", "System", "-c", 4096, volume)


def make_disk(disk: Path, volume: Path) -> None:
    """A disk with an MBR and that volume; what is a hole in the volume is one in the disk."""
    size = volume.stat().st_size
    with disk.open("wb") as file:
        file.truncate(PARTITION_OFFSET + size)
    table = f"label: dos\nstart={PARTITION_OFFSET // 512}, size={size // 512}, type=7, bootable\n"
    _run(require("sfdisk", package="fdisk"), "--quiet", disk, given=table)
    seek = f"seek={PARTITION_OFFSET // MIB}"
    _run("dd", f"if={volume}", f"of={disk}", "bs=1M", seek, "conv=sparse,notrunc", "status=none")


def _make(folder: Path) -> Path:
    packages = _packages(folder)
    made, root = folder / "guest", folder / "root"
    made.mkdir()
    kernel = shutil.copyfile(_found(packages, "vmlinuz-*"), made / "kernel")
    _fill(root, packages)
    initramfs = made / "initramfs"
    # Not compressed: an emulated processor takes a second for what an emulated disk does at once.
    archive = ("--format=newc", "--uid=0", "--gid=0", "-C", root, "-cf", initramfs, ".")
    _run(require("bsdtar", package="libarchive-tools"), *archive)
    _make_root_disk(made / "disk.raw", folder, kernel, initramfs)
    return made


def _make_root_disk(disk: Path, folder: Path, kernel: Path, initramfs: Path) -> None:
    noise = folder / "noise"
    noise.write_bytes(random.Random(2006).randbytes(NOISE))
    volume = folder / "volume"
    make_volume(volume, DISK_SIZE - PARTITION_OFFSET)
    for name, source in (("vmlinuz", kernel), ("initramfs", initramfs), ("pagefile.sys", noise)):
        ntfs_tool("ntfscp", "-q", volume, source, name)
    make_disk(disk, volume)
    _put_boot_loader(disk, folder)


def _put_boot_loader(disk: Path, folder: Path) -> None:
    """GRUB, in the MBR and in the gap behind it, where it expects itself when nobody has told it otherwise."""
    first = require_file(_GRUB / "boot.img", package="grub-pc-bin").read_bytes()[:440]
    config, core = folder / "grub.cfg", folder / "core.img"
    linux = f"linux /vmlinuz {COMMAND_LINE} VOLUME_FLAGS={volume_flags(disk)}"
    config.write_text(f"set root=(hd0,msdos1)\n{linux}\ninitrd /initramfs\nboot\n")
    mkimage = require("grub-mkimage", package="grub-common")
    _run(mkimage, "-O", "i386-pc", "-d", _GRUB, "-p", "/grub", "-c", config, "-o", core, *_GRUB_MODULES)
    rest = core.read_bytes()
    assert len(rest) <= PARTITION_OFFSET - 512
    with disk.open("r+b") as file:
        file.write(first)
        file.seek(512)
        file.write(rest)


def _fill(root: Path, packages: Path) -> None:
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for script, path in _SCRIPTS.items():
        shutil.copy(_INSIDE / script, root / path)
    (root / _POWER_BUTTON).symlink_to("/sbin/shutdown")
    (root / "bin/sh").symlink_to("busybox")
    _put_program(root, _found(packages, "bin/busybox"), "bin/busybox")
    _put_program(root, _found(packages, "*bin/qemu-ga"), "sbin/qemu-ga")
    _put_program(root, Path(require("ntfs-3g", package="ntfs-3g")), "sbin/ntfs-3g")
    for folder, modules in (("lib/modules", _MODULES), ("lib/modules/ata", _ATA_MODULES)):
        for number, module in enumerate(modules):
            _put_module(root / folder / f"{number:02}-{module}.ko", packages, module)


def _put_program(root: Path, program: Path, path: str) -> None:
    """A program, with the libraries of this machine that it is linked to."""
    shutil.copy(program.resolve(), root / path)
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    if "not found" in libraries:
        unavailable(f"{program.name} misses a library: {libraries}")
    for library in re.findall(r"/\S+", libraries):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(library).resolve(), target)


def _put_module(target: Path, packages: Path, module: str) -> None:
    """A module of the kernel's, unless it is built in."""
    for found in packages.rglob(f"{module}.ko*"):
        data = found.read_bytes()
        target.write_bytes(lzma.decompress(data) if found.suffix == ".xz" else data)
        return
    built_in = _found(packages, "modules.builtin").read_text()
    assert f"/{module}.ko\n" in built_in, f"{module} is not in {_KERNEL}"


def _found(packages: Path, name: str) -> Path:
    """A file of the packages', wherever this release of Debian's has it."""
    return next(path for path in packages.rglob(name) if path.is_file())


def _packages(folder: Path) -> Path:
    """Debian's packages, unpacked; by the lists that apt has, or, where it has none or old ones, by ours."""
    apt = folder / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    ours = ("-o", "APT::Sandbox::User=root", "-o", f"Dir::State::Lists={apt / 'lists'}")
    if not _fetched(apt):
        _apt(apt, "apt-get", *ours, "update")
        if not _fetched(apt, *ours):
            unavailable(f"apt cannot fetch {_KERNEL}, {' and '.join(_PROGRAMS)}")
    unpacked = folder / "packages"
    for package in apt.glob("*.deb"):
        _run("dpkg-deb", "-x", package, unpacked)
    return unpacked


def _fetched(folder: Path, *options: str) -> bool:
    kernel = re.search(r"Depends: (linux-image-\S+)", _apt(folder, "apt-cache", *options, "depends", _KERNEL) or "")
    wanted = (kernel[1], *_PROGRAMS) if kernel else ()
    return kernel is not None and _apt(folder, "apt-get", *options, "download", *wanted) is not None


def _apt(folder: Path, program: str, *words: str) -> str | None:
    """What one of apt's programs prints, which works in a folder; None if it fails."""
    path = require(program, package="apt")
    # Its caches stay in memory: those of the machine may not be ours to write, and the lists may be others.
    caches = ("-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=")
    done = subprocess.run([path, *caches, *words], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _run(*argv: object, given: str | None = None) -> None:
    done = subprocess.run([*map(str, argv)], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv[0]}: {done.stderr or done.stdout}"


def _recipe() -> str:
    """A digest of all that decides what the guest is."""
    sources = [Path(__file__), *sorted(_INSIDE.iterdir())]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_old_ones() -> None:
    kept = sorted(_CACHE.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
    for outdated in kept[:-_KEPT]:
        shutil.rmtree(outdated)
