"""The files of overlays, made and merged with qemu-img while no QEMU has them open.

QEMU's image locks see to the last: qemu-img opens nothing for writing that a guest, or another qemu-img, has. Every
format is given, none is probed. Nothing here knows which domain an image belongs to.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from thrave import files, programs
from thrave.compute.errors import HypervisorError, ImageInUseError, LibraryNotInstalled
from thrave.compute.libvirt.domain_xml import DiskImage
from thrave.compute.timeouts import Pause, report_progress

_PACKAGE = "qemu-utils"
_DEFINITIONS = Path("/etc/libvirt/qemu")
_TIMEOUT = 7 * 86400.0  # seconds; merging a large overlay takes hours, and its caller may end it at any time
_LOOK_AGAIN = 0.2  # seconds
_MAX_OUTPUT = 256 << 20  # bytes; `qemu-img map` of an image that is in very many pieces


def create(instance_id: str, overlay: Path, volume: DiskImage) -> None:
    """Make an empty overlay over a volume, in the place of one that may be there, and have it on the disk.

    Whoever may open the volume may open the overlay, as far as this process may say so.

    Raises:
        HypervisorError: It cannot be made, in qemu-img's words.
    """
    _run(
        instance_id,
        ["create", "-q", "-f", "qcow2", "-b", str(volume.path), "-F", volume.format, str(overlay)],
        lambda _seconds: None,
    )
    with _told(instance_id, overlay):
        _give_to_owner_of(volume.path, overlay)
        with overlay.open("rb") as file:
            os.fsync(file.fileno())
        files.sync_folder(overlay.parent)


def commit(instance_id: str, overlay: Path, pause: Pause) -> None:
    """Write what is in an overlay into the volume below it. The overlay keeps it, so that it may be done again.

    Raises:
        ImageInUseError: Some program has one of them open.
        HypervisorError: It cannot be done, in qemu-img's words.
    """
    _run(instance_id, ["commit", "-q", "-d", "-f", "qcow2", str(overlay)], pause)


def is_empty(instance_id: str, overlay: Path) -> bool:
    """Whether nothing was written to an overlay. Raises as `commit`."""
    said = _run(instance_id, ["map", "--output=json", "-f", "qcow2", str(overlay)], lambda _seconds: None)
    return not any(extent["depth"] == 0 and extent["present"] for extent in json.loads(said))


def sync_definitions() -> None:
    """Have what libvirt has just defined on the disk, as far as this process may say so.

    It writes the new definition and gives it the old one's name; a host that loses its power may forget the latter.
    """
    with suppress(OSError):  # another libvirt than the system's, or no right to
        files.sync_folder(_DEFINITIONS)


def with_suffix(path: Path, name: str) -> Path:
    """A file's name with a word at its end."""
    return path.with_name(f"{path.name}.{name}")


def exists(instance_id: str, path: Path) -> bool:
    """Whether there is such a file. Raises HypervisorError if that cannot be seen."""
    with _told(instance_id, path):
        return path.exists()


def move(instance_id: str, path: Path, to: Path) -> None:
    """Give a file another name in its folder, and have it on the disk. Raises HypervisorError."""
    with _told(instance_id, path):
        path.rename(to)
        files.sync_folder(to.parent)


def remove(instance_id: str, path: Path) -> None:
    """Remove a file; it may be gone already, and its folder too. Raises HypervisorError."""
    with _told(instance_id, path), suppress(FileNotFoundError):
        path.unlink()
        files.sync_folder(path.parent)


@contextmanager
def _told(instance_id: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HypervisorError(instance_id, f"{path}: {os.strerror(error.errno or 0)}") from error


def _give_to_owner_of(volume: Path, overlay: Path) -> None:
    as_volume = volume.stat()
    with suppress(PermissionError):  # libvirt gives it to QEMU's user itself, if it is told to (dynamic_ownership)
        os.chown(overlay, as_volume.st_uid, as_volume.st_gid)
    overlay.chmod(stat.S_IMODE(as_volume.st_mode))


def _run(instance_id: str, arguments: Sequence[str], pause: Pause) -> str:
    program = shutil.which("qemu-img")
    if program is None:
        raise LibraryNotInstalled("qemu-img", _PACKAGE)
    try:
        done = _finished([program, *arguments], pause)
    except programs.ProgramError as error:
        raise HypervisorError(instance_id, str(error)) from error
    if done.status:
        raise _failure(instance_id, done.error_text)
    return done.text


def _finished(argv: Sequence[str], pause: Pause) -> programs.FinishedProgram:
    running = programs.Program(argv, timeout=_TIMEOUT, max_output=_MAX_OUTPUT, max_memory=programs.MAX_MEMORY)
    counter = None
    try:
        while (finished := running.poll(_LOOK_AGAIN)) is None:
            before, counter = counter, running.io_counter
            if counter is None or counter != before:  # without a counter, only _TIMEOUT ends a program that hangs
                report_progress(pause)
            pause(0.0)
        return finished
    finally:
        running.kill()


def _failure(instance_id: str, err: str) -> HypervisorError:
    lines = err.strip().splitlines() or ["qemu-img has failed and does not say why"]
    kind = ImageInUseError if '" lock' in err else HypervisorError
    return kind(instance_id, lines[0].removeprefix("qemu-img: ")[:300])
